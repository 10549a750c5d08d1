# SPDX-License-Identifier: GPL-2.0-or-later
"""What is on this host already: its name, files of other pairs, and files of systemd-networkd."""

from __future__ import annotations

import configparser
import os
import pwd
import socket
from collections.abc import Iterator
from pathlib import Path

from ..config.file import Config, ConfigError, load
from .networkd import DIRECTORY
from .transaction import Directory, InstallError

CONFIGS = "/etc/colo-xdp"
#: where systemd-networkd looks, the first of a name counts (systemd.network(5))
NETWORKD = (DIRECTORY, "/run/systemd/network", "/usr/local/lib/systemd/network",
            "/usr/lib/systemd/network")  # fmt: skip


def below(root: Path, path: str) -> Path:
    """Return the path of a file of the host whose root directory this is."""
    return root / path.lstrip("/")


def name(root: Path) -> str:
    """Return the host's name."""
    if root != Path("/"):
        try:
            return below(root, "/etc/hostname").read_text().strip()
        except OSError as e:
            raise InstallError(f"{e.filename}: {e.strerror} (--host names the host)") from e
    return socket.gethostname()


def is_called(own: str, wanted: str) -> bool:
    """Return whether these are names of one host: the domain counts only if both have one."""
    a, b = own.lower().rstrip("."), wanted.lower().rstrip(".")
    return a == b or (("." in a) != ("." in b) and a.split(".")[0] == b.split(".")[0])


def other_pairs(root: Path, pair: str) -> tuple[list[Config], list[str]]:
    """Return the configurations of other pairs here, and a sentence for each that is unreadable."""
    found, errors = [], []
    for path in sorted(below(root, CONFIGS).glob("*.toml")):
        if path.name == f"{pair}.toml":
            continue
        try:
            found.append(load(path))
        except ConfigError as e:
            errors += e.errors
    return found, errors


def _networkd_files(root: Path, suffix: str) -> Iterator[Path]:
    seen: set[str] = set()
    for where in NETWORKD:
        for path in sorted(below(root, where).glob(f"*{suffix}")):
            if path.name not in seen:
                seen.add(path.name)
                yield path


def network_exists(root: Path, name: str) -> bool:
    """Return whether systemd-networkd has a file of this name, to which a drop-in adds."""
    return any(path.name == name for path in _networkd_files(root, ".network"))


def configured_by(root: Path, device: str, own: Path) -> Path | None:
    """Return another file of the same kind that names this device, or None."""
    section, key = ("NetDev", "Name") if own.suffix == ".netdev" else ("Match", "Name")
    for path in _networkd_files(root, own.suffix):
        if path == own:
            continue
        parser = configparser.RawConfigParser(strict=False, allow_no_value=True)
        try:
            parser.read_string(path.read_text(errors="replace"))
            names = (parser.get(section, key, fallback="") or "").split()
        except (OSError, configparser.Error):
            continue
        if device in names:
            return path
    return None


def owned(path: Path, owner: str) -> Directory:
    """Return a directory of this user, that nobody else may enter.

    Raises InstallError if there is no such user here.
    """
    if not owner:
        return Directory(path, 0o700)
    try:
        user = pwd.getpwnam(owner)
    except KeyError as e:
        raise InstallError(f"--qemu-user {owner}: there is no such user on this host") from e
    return Directory(path, 0o700, (user.pw_uid, user.pw_gid))


def others_write(path: Path) -> str:
    """Return who besides this user (and root) may have put files there, or an empty string."""
    try:
        st = os.stat(path)
    except FileNotFoundError:
        return ""
    except OSError as e:
        raise InstallError(f"{path}: {e.strerror}") from e
    if st.st_uid not in (0, os.geteuid()):
        return f"user {st.st_uid}, to whom it belongs"
    return f"others (mode {st.st_mode & 0o7777:o})" if st.st_mode & 0o022 else ""


def program_trouble(root: Path, path: str) -> str:
    """Return why the program cannot be run, or an empty string."""
    there = below(root, path)
    if not there.is_file():
        return f"{path} is not there yet: without it nothing fences"
    return "" if os.access(there, os.X_OK) else f"{path} cannot be run: chmod +x"
