# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands for the files of a pair: config, pki, init, join."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import FAILED, USAGE, app, fail
from .target import ConfigArg, load_config

config_app = typer.Typer(no_args_is_help=True, help="Check or print a configuration file.")
app.add_typer(config_app, name="config")
pki_app = typer.Typer(
    no_args_is_help=True, help="Create certificates for the control channel of a pair."
)
app.add_typer(pki_app, name="pki")


class RoleName(StrEnum):
    """Whose certificate."""

    primary = "primary"
    secondary = "secondary"


@config_app.command("check")
def config_check(config: ConfigArg) -> None:
    """Report all mistakes of a file at once."""
    c = load_config(config)
    typer.echo(f"{config}: pair {c.pair}, {c.role}: ok")


@config_app.command("show")
def config_show(config: ConfigArg) -> None:
    """Print the configuration with all defaults."""
    from ..config.file import as_toml

    typer.echo(as_toml(load_config(config)))


Directory = Annotated[Path, typer.Argument(help="Directory of the files, readable by you only.")]
Days = Annotated[int, typer.Option(min=1, max=36500, help="Validity in days.")]


@pki_app.command("init")
def pki_init(
    directory: Directory,
    pair: Annotated[str, typer.Option(help="Name of the pair, as in its configuration.")],
    days: Days = 3650,
) -> None:
    """Create a certificate authority for the pair: DIRECTORY/ca.crt and DIRECTORY/ca.key.

    Keep the key off the hosts.
    """
    from .. import validate
    from ..config import file as config
    from ..tools import pki

    want = validate.keys(config.Config)["pair"].metadata["check"](pair)
    if want:
        raise fail(f"--pair {pair}: {want}", USAGE)
    try:
        files = pki.init(directory, pair, days)
    except pki.PkiError as e:
        raise fail(str(e)) from e
    for path in files:
        typer.echo(f"wrote {path}")


@pki_app.command("issue")
def pki_issue(
    directory: Directory,
    role: Annotated[
        list[RoleName] | None, typer.Option(help="Only for this role; default: both.")
    ] = None,
    days: Days = 3650,
    renew: Annotated[bool, typer.Option(help="Replace existing files.")] = False,
) -> None:
    """Create key and certificate for each host; they name the pair and the role.

    Copy ca.crt and the role's .crt and .key to that host. Running controllers use renewed files
    from their next connection on.
    """
    from ..tools import pki

    try:
        for one in role or list(RoleName):
            for path in pki.issue(directory, one.value, days, renew=renew):
                typer.echo(f"wrote {path}")
    except pki.PkiError as e:
        raise fail(str(e)) from e


Bundles = Annotated[
    Path, typer.Option("--bundle", help="Directory of the two bundles and of the certificates.")
]
Replace = Annotated[
    bool, typer.Option("--replace", help="Replace what is different, and keep it as FILE.~1~ ...")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print what would be written, and write nothing.")
]


def _text(text: str) -> Any:
    return typer.Option(help=text, show_default=False)


@app.command("init")
def init(
    pair: Annotated[str, _text("Name of the pair.")] = "",
    hosts: Annotated[str, _text("Names of the hosts, such as hosta/hostb.")] = "",
    addresses: Annotated[str, _text("Their addresses for the control channel.")] = "",
    peer_link: Annotated[str, _text("Device that leads to the other host.")] = "",
    vxlan: Annotated[str, _text("Addresses of a VXLAN to make as the peer link.")] = "",
    bridge: Annotated[str, _text("Bridge of the clients' network.")] = "",
    tap: Annotated[str, _text("The guest's tap; default: tap-PAIR.")] = "",
    mac: Annotated[str, _text("The guest's MAC address; default: made of the pair's name.")] = "",
    queues: Annotated[str, _text("Queues of the guest's network card.")] = "",
    nic: Annotated[
        list[str] | None,
        _text("For several network cards, one each: name=,peer-link=,bridge=,tap=,mac= ..."),
    ] = None,
    migration: Annotated[str, _text("Addresses for migration; default: --addresses.")] = "",
    migration_network: Annotated[
        str, _text("File of systemd-networkd that configures their device: it gets quickack.")
    ] = "",
    heartbeat: Annotated[
        list[str] | None, _text("Addresses of a further link for heartbeats.")
    ] = None,
    memory: Annotated[str, _text("Memory of the guest, in MiB or such as 4G.")] = "",
    cpus: Annotated[str, _text("Virtual CPUs of the guest; default: 1.")] = "",
    machine: Annotated[str, _text("QEMU's -machine; default: pc.")] = "",
    cpu: Annotated[str, _text("QEMU's -cpu; default: host, with tcg max.")] = "",
    accel: Annotated[str, _text("kvm or tcg; default: kvm.")] = "",
    qemu: Annotated[str, _text("QEMU's program; default: qemu-system-x86_64.")] = "",
    qemu_user: Annotated[str, _text("User of QEMU on both hosts; default: root.")] = "",
    qemu_arg: Annotated[list[str] | None, _text("A further argument of QEMU.")] = None,
    disk: Annotated[
        list[str] | None,
        _text("A writable disk: file=PATH,format=,name=,secondary-file=,external"),
    ] = None,
    overlays: Annotated[str, _text("Directory of the disks' overlays, on both hosts.")] = "",
    arbiter: Annotated[str, _text("fence, lease or manual; default: by what is given.")] = "",
    fence_primary: Annotated[str, _text("Command that switches the primary's host off.")] = "",
    fence_secondary: Annotated[str, _text("Command that switches the secondary's host off.")] = "",
    etcd: Annotated[list[str] | None, _text("Endpoint of the etcd that has the lease.")] = None,
    etcd_ca: Annotated[str, _text("Authority of etcd's endpoints, on both hosts (PEM).")] = "",
    etcd_cert: Annotated[str, _text("Certificate for etcd, on both hosts (PEM).")] = "",
    etcd_key: Annotated[str, _text("Key of --etcd-cert (PEM).")] = "",
    base_port: Annotated[
        str, _text("First of ten ports in a row; default: the first that are free here.")
    ] = "",
    from_qemu: Annotated[
        int,
        typer.Option(help="Process id of a running QEMU whose guest it is.", show_default=False),
    ] = 0,
    from_libvirt: Annotated[str, _text("Domain of libvirt whose guest it is.")] = "",
    bundle: Bundles = Path(),
    replace: Replace = False,
    dry_run: DryRun = False,
) -> None:
    """Make everything that the two hosts of a pair need, as one bundle for each.

    Where the hosts differ, give the primary's value and the secondary's with / between. On a
    terminal it asks for what is missing. Nothing is installed: `join` does that, on each host.
    """
    given = {k: tuple(v or ()) if k in LISTS else v for k, v in locals().items()}
    from ..setup import command

    ask = typer.prompt if sys.stdin.isatty() else None
    _print(lambda: command.init(given, ask))


LISTS = ("nic", "heartbeat", "qemu_arg", "disk", "etcd")


@app.command("join")
def join(
    bundle: Annotated[Path, typer.Argument(help="Bundle that `init` has made for this host.")],
    host: Annotated[str, _text("Name of this host, if it is not its hostname.")] = "",
    root: Annotated[Path, typer.Option(help="Root directory of the host.")] = Path("/"),
    replace: Replace = False,
    dry_run: DryRun = False,
) -> None:
    """Put the files of a bundle in place, all or none, and print what to run then."""
    from ..setup import command

    _print(lambda: command.join(bundle, root, host, replace=replace, dry_run=dry_run))


@app.command("leave")
def leave(
    pair: Annotated[str, typer.Argument(help="Name of the pair.")],
    root: Annotated[Path, typer.Option(help="Root directory of the host.")] = Path("/"),
    dry_run: DryRun = False,
) -> None:
    """Remove what `join` has put in place, unless it was changed, and print what to run then.

    Refused while the pair's controller runs or its programs are attached: stop the controllers of
    both hosts first, and run `cleanup`.
    """
    from ..setup import command

    _print(lambda: command.leave(pair, root, dry_run=dry_run))


def _print(lines: Callable[[], Iterable[str]]) -> None:
    from ..setup.command import MISTAKES

    try:
        for line in lines():
            typer.echo(line)
    except MISTAKES as e:
        raise fail(str(e), USAGE if isinstance(e, ValueError) else FAILED) from e
