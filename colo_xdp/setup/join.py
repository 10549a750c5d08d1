# SPDX-License-Identifier: GPL-2.0-or-later
"""Put a bundle's files in place on the host that it was made for (`colo-xdp join`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ..config.file import ConfigError, parse
from . import bundle, host, ports, record
from .files import File, HostFiles, commands, config_of, config_path
from .leave import read as read_record
from .transaction import InstallError, Target, install, is_there, lock, undo_interrupted


class Refused(InstallError):
    """This bundle is not for here, or something is in its way; nothing was changed."""


def _read(path: Path) -> HostFiles:
    try:
        with path.open("rb") as f:
            data = f.read(bundle.MAX_BYTES + 1)
    except OSError as e:
        raise InstallError(f"{path}: {e.strerror}") from e
    try:
        return bundle.unpack(data)
    except bundle.BundleError as e:
        raise Refused(f"{path}: {e}") from e


def _check_host(root: Path, h: HostFiles, called: str) -> None:
    own = called or host.name(root)
    if not host.is_called(own, h.host):
        raise Refused(
            f"this bundle is for {h.host}, the {h.role} host of {h.pair}, and this host is {own}: "
            f"take the other bundle; if this is {h.host}, say so with --host {h.host}"
        )


def _other_role(root: Path, h: HostFiles) -> str:
    """Return what is wrong if this host is already the other one of the pair."""
    there = host.below(root, config_path(h.pair))
    try:
        config = parse(there.read_text(errors="replace"), str(there))
    except (FileNotFoundError, ConfigError):
        return ""
    except OSError as e:
        raise InstallError(f"{there}: {e.strerror}") from e
    if config.pair == h.pair and config.role == h.role:
        return ""
    return (
        f"{there} is that of the {config.role} of {config.pair}, and the bundle's of the {h.role}"
    )


def _conflicts(root: Path, h: HostFiles) -> tuple[list[str], list[str]]:
    """Return what other pairs of this host have already, and which of their files is unreadable."""
    others, unreadable = host.other_pairs(root, h.pair)
    found = ports.conflicts(config_of(h), others)
    for name in h.networks:
        if not host.network_exists(root, name):
            found.append(
                f"--migration-network {name}: systemd-networkd has no such file here, so the route "
                "of the migration channel would not be set"
            )
    return found, unreadable


def _kept(root: Path, f: File) -> Path | None:
    """Return the file of somebody else that configures the same device, or None."""
    return host.configured_by(root, f.device, host.below(root, f.path)) if f.device else None


def _record(root: Path, pair: str, *, replace: bool) -> record.Record | None:
    """Return what earlier joins have noted; None if nothing, or if what is there is replaced."""
    try:
        return read_record(root, pair)
    except InstallError:
        if replace:
            return None
        raise


def join(
    path: Path,
    *,
    root: Path = Path("/"),
    called: str = "",
    replace: bool = False,
    dry_run: bool = False,
) -> Iterator[str]:
    """Put the files of a bundle in place; yield what was done, and what is left to do.

    Raises InstallError, and everything is as it was then.
    """
    h = _read(path)
    if path.stat().st_mode & 0o077:
        yield f"note: {path} can be read by others, and contains a private key: chmod 600"
    _check_host(root, h, called)
    etc = host.below(root, host.CONFIGS)
    journal = etc / f".{h.pair}.join"
    if dry_run:
        yield from _steps(root, h, replace=replace, dry_run=True, journal=journal)
        return
    with lock(etc):
        undone = undo_interrupted(journal)
        if undone:
            yield f"an earlier `join` of {h.pair} was interrupted: {len(undone)} files are undone"
        yield from _steps(root, h, replace=replace, dry_run=False, journal=journal)


def _steps(
    root: Path, h: HostFiles, *, replace: bool, dry_run: bool, journal: Path
) -> Iterator[str]:
    trouble, unreadable = _conflicts(root, h)
    trouble += [text for text in [_other_role(root, h)] if text]
    if trouble:
        raise Refused("\n".join(trouble))
    wanted: list[Target] = []
    ours: list[File] = []
    notes = [f"{text}: not compared with this pair" for text in unreadable]
    same = 0
    for f in h.files:
        target = Target(host.below(root, f.path), f.text.encode(), f.mode)
        if other := _kept(root, f):
            notes.append(f"{f.path} is not written: {other} configures {f.device} already")
            continue
        ours.append(f)
        if is_there(target):
            same += 1
        else:
            wanted.append(target)
    differ = [t for t in wanted if t.path.exists() or t.path.is_symlink()]
    if differ and not replace:
        lines = [f"{t.path} is there already, and is different" for t in differ]
        raise Refused("\n".join([*lines, "--replace keeps what is there as FILE.~1~, ~2~ ..."]))
    directories = [host.owned(host.below(root, d), h.owner) for d in h.directories]
    before = _record(root, h.pair, replace=replace)
    note = record.of(h, ours, before)
    noted = Target(host.below(root, record.path(h.pair)), note.text().encode(), 0o600)
    if not is_there(noted):
        wanted.append(noted)
    verb = "would write" if dry_run else "wrote"
    if dry_run:
        done: list[tuple[Path, Path | None]] = [(t.path, None) for t in wanted]
    else:
        done = install(journal, wanted, directories)
    for path, kept in done:
        if path == noted.path:
            if kept and before is not None:  # everything in it is in the new one
                with contextlib.suppress(OSError):
                    kept.unlink()
            continue
        yield f"{verb} {path}" + (f" (before: {kept})" if kept else "")
    if same:
        yield f"{same} files are there already, and are the same"
    if differ:
        notes.append(f"`systemctl restart colo-xdp@{h.pair}` makes a running controller read it")
    notes += [text for p in h.programs if (text := host.program_trouble(root, p))]
    yield from (f"note: {text}" for text in (*notes, *h.notes))
    yield "now run:"
    yield from (f"    {line}" for line in commands(h.pair, h.role))
