# SPDX-License-Identifier: GPL-2.0-or-later
"""Make the two bundles of a pair, with certificates of its own (`colo-xdp init`)."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ..config.file import Config, ConfigError, load
from ..tools import pki
from . import bundle, host, ports
from .answers import ROLES, Answers
from .files import certificate_names, config_of, config_path, host_files
from .flags import AnswersError, Flags
from .guest import Guest
from .reader import answers
from .transaction import Directory, InstallError, Target, install, lock, undo_interrupted


def _bundled(where: Path, pair: str) -> Iterator[Config]:
    """Return the configurations in bundles of other pairs that are still to be joined."""
    for path in sorted(where.glob("*.bundle")):
        with contextlib.suppress(OSError, bundle.BundleError):
            made = bundle.unpack(path.read_bytes())
            if made.pair != pair:
                yield config_of(made)


def resolve(
    flags: Flags, guest: Guest | None = None, root: Path = Path("/"), where: Path = Path()
) -> Answers:
    """Make the answers; ports are chosen that no pair of this host or bundle in `where` has.

    A pair that is here already keeps its ports. Raises AnswersError.
    """
    others, unreadable = host.other_pairs(root, flags.pair)
    if unreadable and not flags.base_port:
        raise AnswersError(
            [*unreadable, "so its ports are unknown: repair it, or choose ports with --base-port"]
        )
    others += _bundled(where, flags.pair)
    taken = {use.number for other in others for use in ports.uses(other)}
    if not flags.base_port and flags.pair:
        with contextlib.suppress(ConfigError):
            own = load(host.below(root, config_path(flags.pair)))
            base = ports.of(own)
            if base is not None and taken.isdisjoint(base.numbers):
                flags = replace(flags, base_port=str(base.base))
    return answers(flags, taken, guest)


def show(a: Answers) -> Iterator[str]:
    """Yield what a dry run prints: every file of both hosts."""
    for role in ROLES:
        made = host_files(a, role, {})
        yield f"==== {made.host}, the {role} host"
        for f in made.files:
            yield f"---- {f.path} (mode {f.mode:04o})"
            yield f.text
        yield from (f"note: {text}" for text in made.notes)


def _certificates(directory: Path, a: Answers) -> dict[str, str]:
    """Return what `colo-xdp pki` makes for both hosts, by name; what is there already is kept.

    It is made beside the directory and not in it, where it has to arrive with everything else.
    """
    found: dict[str, str] = {}
    try:
        for name in ("ca.key", *(n for role in ROLES for n in certificate_names(role))):
            with contextlib.suppress(FileNotFoundError):
                found[name] = (directory / name).read_text()
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as d:
            made = Path(d)
            for name, text in found.items():
                (made / name).write_text(text)
            if "ca.crt" not in found:
                pki.init(made, a.pair)
            for role in ROLES:
                if not found.keys() >= {f"{role}.crt", f"{role}.key"}:
                    pki.issue(made, role)
                seen = pki.ours(pki.look(made / f"{role}.crt"))
                if not seen.endswith(f"/{a.pair}/{role}"):
                    raise InstallError(f"{directory}/{role}.crt is that of {seen or 'nobody'}")
            return {p.name: p.read_text() for p in made.iterdir()}
    except pki.PkiError as e:
        raise InstallError(f"{directory}: {e}") from e
    except UnicodeDecodeError as e:
        raise InstallError(f"{directory}: a file is no certificate: {e}") from e
    except OSError as e:
        raise InstallError(f"{e.filename}: {e.strerror}; nothing was changed") from e


def write(a: Answers, where: Path, *, replace_old: bool = False) -> Iterator[str]:
    """Write both bundles and the certificates; yield what was done.

    Certificates that are there are used again, so that the hosts' files stay the same. Raises
    InstallError and AnswersError; everything is as it was then.
    """
    with lock(where):
        journal = where / f".{a.pair}.init"
        undo_interrupted(journal)
        paths = {role: where / bundle.name(a.pair, role) for role in ROLES}
        there = [str(p) for p in paths.values() if p.exists() or p.is_symlink()]
        if there and not replace_old:
            raise InstallError(
                f"{' and '.join(there)}: there already; --replace keeps them as FILE.~1~, ~2~ ..."
            )
        keys = where / f"{a.pair}-pki"
        if who := host.others_write(keys):
            raise InstallError(
                f"{keys} may have been filled by {who}, who would know the keys of this pair: "
                "use another directory (--bundle), or remove it"
            )
        for left in where.glob(f".{keys.name}.*"):  # of one that was killed
            shutil.rmtree(left, ignore_errors=True)
        certificates = _certificates(keys, a)
        made = [host_files(a, role, certificates) for role in ROLES]
        targets = [Target(paths[h.role], bundle.pack(h), 0o600) for h in made]
        new = {name: text for name, text in certificates.items() if not (keys / name).exists()}
        targets += [
            Target(keys / name, text.encode(), 0o600 if name.endswith(".key") else 0o644)
            for name, text in new.items()
        ]
        for path, kept in install(journal, targets, [Directory(keys, 0o700)]):
            if path.parent == where:
                yield f"wrote {path}" + (f" (before: {kept})" if kept else "")
        yield f"{'wrote' if new else 'used'} {keys}: keep its ca.key off both hosts"
        for h in made:
            yield f"on {h.host}: colo-xdp join {paths[h.role].name}"
        yield "each bundle contains a private key: copy it with scp, and remove it after the join"
        told = dict.fromkeys(text for h in made for text in h.notes)
        yield from (f"note: {text}" for text in told)
