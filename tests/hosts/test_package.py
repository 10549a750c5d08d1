# SPDX-License-Identifier: GPL-2.0-or-later
"""Build Debian's package, and install, upgrade, remove and purge it in a root that has only Debian.

The release is that of COLO_SUITE, by default Debian 12 (`make test-deb-13`: Debian 13). Each test
continues with what the one before it has left. What an upgrade does to a controller that runs is
tested in test_documents.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from colo_xdp import __version__
from colo_xdp.lab import debian
from colo_xdp.lab.net import LabError, sh

from . import root as roots

SUITE = os.environ.get("COLO_SUITE", debian.SUITE)
CONFIG = "/etc/colo-xdp/web1.toml"
CACHE = "/var/cache/colo-xdp"
LIB = "/usr/lib/colo-xdp"
#: imports everything that the package has, with what its dependencies are
IMPORTS = f"""
import importlib, pkgutil, sys
sys.path.insert(0, {LIB!r})
import colo_xdp
for m in pkgutil.walk_packages(colo_xdp.__path__, "colo_xdp."):
    importlib.import_module(m.name)
for name in ("etcd3gw", "prometheus_client", "pyroute2", "qemu.qmp", "scapy", "typer"):
    assert importlib.import_module(name).__file__.startswith({LIB!r}), name
for name in ("bcc", "cryptography", "requests", "click"):
    assert importlib.import_module(name).__file__.startswith("/usr/lib/python3/"), name
"""
COMPLETED = {
    "bash": """
. /usr/share/bash-completion/bash_completion
_completion_loader colo-xdp
complete -p colo-xdp
COMP_WORDS=(colo-xdp check) COMP_CWORD=1
_colo_xdp_completion colo-xdp
echo "${COMPREPLY[@]}"
""",
    "zsh": """
autoload -U compinit && compinit -u
[ "$_comps[colo-xdp]" = _colo-xdp ] || exit 1
_arguments() { print -l -- "$@" }; _describe() { print -l -- ${(P)@[-1]} ${(P)@[2]} }
compdef() { }
words=(colo-xdp check); CURRENT=2
_colo-xdp
""",
    "fish": "complete -C 'colo-xdp check'",
}
#: in place of systemd's: four controllers run, that of web1 does not come back
SYSTEMD = {
    "systemctl": """
[ "$1" = list-units ] || { echo systemctl "$@" >> /stubs/said; exit; }
for pair in alone wrong web1 web2; do echo "colo-xdp@$pair.service loaded active running"; done
""",
    "deb-systemd-invoke": """
echo "$@" >> /stubs/said
[ "$2" != colo-xdp@web1.service ]
""",
}


@dataclass
class Root:
    """A root of Debian, and a directory of packages that it sees."""

    path: Path
    packages: Path

    def run(self, *cmd: str, options: tuple[str, ...] = ()) -> str:
        return roots.inside(self.path, *cmd, packages=self.packages, options=options)

    def dpkg(self, deb: Path, options: tuple[str, ...] = ()) -> str:
        return self.run("dpkg", "--install", f"{roots.PACKAGES_DIR}/{deb.name}", options=options)

    def status(self) -> str:
        return self.run("dpkg-query", "-W", "-f", "${Version} ${db:Status-Status}", "colo-xdp")

    def file(self, path: str) -> Path:
        return self.path / path.lstrip("/")

    def version(self, release: int, change: Callable[[Path], None]) -> Path:
        """Make the package's next version."""
        target = self.packages / f"colo-xdp_{release}.deb"
        return roots.repack(roots.package(), target, f"{__version__}-{release}", change)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Root]:
    directory = roots.ROOT / "build/hosts"
    where = directory / "package"
    packages = tmp_path_factory.mktemp("packages")
    while (where / "root").is_mount():  # left by a run that was killed
        sh("umount", str(where / "root"))
    path = roots.overlay(roots.base(directory, SUITE), where)
    try:
        yield Root(path, packages)
    finally:
        sh("umount", str(path))


def new_program(tree: Path) -> None:
    """Change the source of one role's programs, so that what was compiled before does not fit."""
    source = tree / LIB.lstrip("/") / "colo_xdp/_bpf_src/secondary.bpf.c"
    source.write_text(f"{source.read_text()}\n/* {tree} */\n")


def test_two_builds_are_the_same() -> None:
    first = roots.package().read_bytes()
    roots.package.cache_clear()
    assert roots.package().read_bytes() == first


def test_lintian_has_nothing_to_say() -> None:
    r = subprocess.run(
        ["lintian", "--allow-root", "--display-info", str(roots.package())],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (r.returncode, r.stdout, r.stderr) == (0, "", "")


def test_what_is_in_it() -> None:
    lines = sh("dpkg-deb", "--contents", str(roots.package())).splitlines()
    files = {x.split(None, 5)[5].removeprefix("."): x.split()[:2] for x in lines}
    assert all(owner == "root/root" and mode[3] != "s" for mode, owner in files.values())
    assert not [f for f in files if "__pycache__" in f or f.endswith((".pyc", ".so"))]
    for f in (
        "/usr/bin/colo-xdp", "/usr/lib/systemd/system/colo-xdp@.service", "/etc/colo-xdp/",
        "/usr/lib/systemd/system/colo-xdp-handover@.service",
        "/usr/share/man/man8/colo-xdp.8.gz", "/usr/share/man/man5/colo-xdp.toml.5.gz",
        "/usr/share/doc/colo-xdp/README.md", "/usr/share/doc/colo-xdp/docs/operator/install.md",
        "/usr/share/doc/colo-xdp/examples/primary.toml", f"{LIB}/colo_xdp/_bpf_src/lib/abi.h",
        *(f"{LIB}/colo_xdp/status/page.{x}" for x in ("html", "css", "js")),
    ):  # fmt: skip
        assert f in files


def test_apt_installs_it_with_what_it_depends_on(root: Root) -> None:
    said = roots.install_package(root.path, roots.package())
    assert f"Setting up colo-xdp ({__version__}-1)" in said
    assert root.status() == f"{__version__}-1 installed"
    assert root.run("colo-xdp", "--version").strip() == __version__
    assert root.run("python3", "-I", "-B", "-c", IMPORTS) == ""
    for unit in ("colo-xdp@web1.service", "colo-xdp-handover@web1.service"):
        path = f"/usr/lib/systemd/system/{unit}"
        assert root.run("systemd-analyze", "verify", "--man=no", path) == ""
    assert root.run("dpkg", "--verify", "colo-xdp") == ""


def test_it_lists_the_libraries_that_it_carries(root: Root) -> None:
    bill = json.loads(root.file("/usr/share/doc/colo-xdp/sbom.cdx.json").read_text())
    assert bill["metadata"]["component"]["version"] == f"{__version__}-1"
    listed = {
        f"{c['name'].lower().replace('_', '-')}=={c['version']} "
        f"--hash=sha256:{c['hashes'][0]['content']}"
        for c in bill["components"]
    }
    text = (roots.ROOT / "deploy/debian/vendored.txt").read_text()
    assert listed == {x for x in text.splitlines() if x and x[0] != "#"}
    for c in bill["components"]:
        assert list(root.file(LIB).glob(f"{c['name'].replace('.', '_')}-{c['version']}.dist-info"))


@pytest.mark.parametrize("shell", COMPLETED)
def test_shells_complete_its_commands(root: Root, shell: str) -> None:
    assert "checkpoint" in root.run(shell, "-c", COMPLETED[shell])


def test_doctor_examines_the_host(root: Root) -> None:
    """There is no tap, but the compiler, the headers and the sources are there."""
    example = root.file("/usr/share/doc/colo-xdp/examples/primary.toml").read_text()
    root.file(CONFIG).write_text(example)
    with pytest.raises(LabError) as e:
        root.run("colo-xdp", "doctor", CONFIG)
    said = str(e.value)
    for line in (
        "ok    config: pair web1", r"ok    bcc: [^\n]*/usr/lib/python3/", "ok    kernel headers:",
        "warn  programs: not compiled yet", "FAIL  tap:",
    ):  # fmt: skip
        assert re.search(line, said), said
    assert "BPF sources" not in said and "Traceback" not in said


def test_an_upgrade_compiles(root: Root) -> None:
    said = root.dpkg(root.version(2, new_program))
    assert said.count("compiled in") == 3
    assert root.status() == f"{__version__}-2 installed"
    assert len(list(root.file(CACHE).glob("*.image"))) == 3


def test_a_full_disk_and_a_wrong_file_fail_no_upgrade(root: Root) -> None:
    wrong = root.file("/etc/colo-xdp/wrong.toml")
    wrong.write_text('pair = "wrong"\nrole = "third"\n')
    said = root.dpkg(root.version(3, new_program), (f"--tmpfs={CACHE}:size=8k,mode=755",))
    assert "No space left on device" in said and "compiled, but not kept" in said
    assert f"the programs of web1 are not compiled, for the reason above. Then: {CONFIG}" in (
        said.replace("colo-xdp compile ", "")
    )
    assert "the programs of wrong are not compiled" in said and 'role = "third"' in said
    assert root.status() == f"{__version__}-3 installed"
    wrong.unlink()
    said = root.run("colo-xdp", "compile", CONFIG)
    assert (said.count("compiled before"), said.count("compiled in")) == (2, 1)


def test_an_upgrade_restarts_one_controller_after_the_other(root: Root) -> None:
    """Not one that could not be compiled for; and none behind one that does not start."""
    wrong = root.file("/etc/colo-xdp/wrong.toml")
    wrong.write_text('pair = "wrong"\nrole = "third"\n')
    stubs = root.file("/stubs")
    stubs.mkdir()
    for name, text in SYSTEMD.items():
        (stubs / name).write_text(f"#!/bin/sh\n{text}")
        (stubs / name).chmod(0o755)
    deb = root.version(4, lambda tree: None)
    install = f"PATH=/stubs:$PATH dpkg --install {roots.PACKAGES_DIR}/{deb.name}"
    said = root.run("sh", "-c", f"mkdir -p /run/systemd/system && {install}")
    assert "colo-xdp@wrong.service goes on with the version before" in said
    assert "colo-xdp@web1.service does not start (journalctl -u colo-xdp@web1.service)" in said
    assert root.file("/stubs/said").read_text().splitlines() == [
        "systemctl daemon-reload",
        "restart colo-xdp@alone.service",
        "restart colo-xdp@web1.service",
    ]
    assert root.status() == f"{__version__}-4 installed"
    wrong.unlink()
    sh("rm", "-r", str(stubs))


@pytest.mark.parametrize(
    ("script", "state"), [("preinst", "half-installed"),
                                               ("postinst", "half-configured")])  # fmt: skip
def test_an_upgrade_that_was_killed_can_be_repeated(root: Root, script: str, state: str) -> None:
    """Before it, or behind what was unpacked: the command works in between."""

    def killed(tree: Path) -> None:
        path = tree / "DEBIAN" / script
        body = path.read_text().split("\n", 1)[1] if path.exists() else ""
        path.write_text(f"#!/bin/sh\n[ -e /survive ] || kill -9 $PPID\n{body}")
        path.chmod(0o755)

    deb = root.version(5 if script == "preinst" else 6, killed)
    with pytest.raises(LabError):
        root.dpkg(deb)
    assert root.status().endswith(state)
    assert root.run("colo-xdp", "--version").strip() == __version__
    assert root.run("colo-xdp", "config", "check", CONFIG).strip().endswith("ok")
    root.file("/survive").touch()
    if script == "preinst":
        root.dpkg(deb)
    else:
        root.run("dpkg", "--configure", "--pending")
    root.file("/survive").unlink()
    assert root.status().endswith(" installed")


def test_what_a_removal_leaves(root: Root) -> None:
    key = root.file("/etc/colo-xdp/web1/primary.key")
    key.parent.mkdir(mode=0o700)
    key.write_text("secret\n")
    listed = root.run("dpkg", "--listfiles", "colo-xdp").splitlines()
    said = root.run("dpkg", "--remove", "colo-xdp")
    assert "may stay attached" not in said
    assert root.status().endswith(" config-files")
    assert root.file(CONFIG).exists() and key.exists()
    left = [f for f in listed if "colo" in f and root.file(f).exists()]
    assert left == ["/etc/colo-xdp"] and not root.file(LIB).exists()


def test_what_a_purge_leaves(root: Root) -> None:
    wants = root.file("/etc/systemd/system/multi-user.target.wants/colo-xdp@web1.service")
    wants.parent.mkdir(parents=True, exist_ok=True)
    wants.symlink_to("/usr/lib/systemd/system/colo-xdp@.service")  # systemctl enable
    assert "/etc/colo-xdp is left" in root.run("dpkg", "--purge", "colo-xdp")
    found = root.run("find", "/", "-xdev", "-name", "*colo*xdp*", "-not", "-path", "/proc/*")
    assert found.split() == ["/etc/colo-xdp"]
    assert root.file(CONFIG).exists(), "what the administrator wrote, with keys, is theirs"


def test_a_purge_of_what_nobody_configured_leaves_nothing(root: Root) -> None:
    sh("rm", "-r", str(root.file("/etc/colo-xdp")))
    (root.packages / roots.package().name).write_bytes(roots.package().read_bytes())
    root.dpkg(root.packages / roots.package().name)
    root.run("colo-xdp", "--version")
    root.run("dpkg", "--purge", "colo-xdp")
    assert root.run("find", "/", "-xdev", "-name", "*colo*xdp*") == ""
