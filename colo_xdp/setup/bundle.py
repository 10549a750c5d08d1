# SPDX-License-Identifier: GPL-2.0-or-later
"""One file with all that one host of a pair gets: a tar whose first member lists the others. Pure.

The sums find a copy that was cut short or damaged. They do not prove who made the bundle: whoever
can change it can change them. It contains a private key.
"""

from __future__ import annotations

import hashlib
import io
import json
import posixpath
import re
import tarfile
from collections.abc import Mapping
from typing import Any

from .. import __version__
from ..config.file import ConfigError, parse
from .answers import ROLES
from .config_text import directory
from .files import File, HostFiles, certificate_names, config_path
from .networkd import DIRECTORY as NETWORKD
from .qemu_unit import UNITS

FORMAT = 1
MANIFEST = "manifest.json"
MAX_BYTES = 4 << 20
_TEXTS = ("pair", "role", "host", "owner", "version")
_LISTS = ("directories", "networks", "programs", "notes")


class BundleError(ValueError):
    """This is no bundle that can be used here; the text says why."""


def name(pair: str, role: str) -> str:
    """Return the name of the bundle's file."""
    return f"{pair}-{role}.bundle"


def _sum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def pack(host: HostFiles) -> bytes:
    """Return the bundle of one host: the same bytes for the same files."""
    manifest = {
        "format": FORMAT, "version": __version__,
        "pair": host.pair, "role": host.role, "host": host.host, "owner": host.owner,
        **{key: list(getattr(host, key)) for key in _LISTS},
        "files": [
            {"path": f.path, "mode": f.mode, "device": f.device, "sha256": _sum(f.text.encode())}
            for f in host.files
        ],
    }  # fmt: skip
    members = {MANIFEST: json.dumps(manifest, indent=2).encode() + b"\n"}
    members |= {f.path.lstrip("/"): f.text.encode() for f in host.files}
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path, data in members.items():
            info = tarfile.TarInfo(path)
            info.size, info.mode = len(data), 0o600
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _members(data: bytes) -> dict[str, bytes]:
    if len(data) > MAX_BYTES:
        raise BundleError(f"it has {len(data)} bytes, and a bundle {MAX_BYTES} at most")
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for info in tar:
                file = tar.extractfile(info) if info.isreg() else None
                if file is None or info.name in found:
                    raise BundleError(f"{info.name!r} in it is no file, or there twice")
                found[info.name] = file.read()
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as e:
        if isinstance(e, BundleError):
            raise
        raise BundleError(f"it is no bundle, or was cut short: {e}") from e
    return found


def _manifest(members: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        manifest = json.loads(members.get(MANIFEST, b""))
    except ValueError as e:
        raise BundleError(f"it is no bundle of `colo-xdp init`: no {MANIFEST} in it") from e
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise BundleError(f"it is no bundle of `colo-xdp init`: {MANIFEST} has no format")
    made_by = str(manifest.get("version"))
    if manifest["format"] != FORMAT or made_by != __version__:
        raise BundleError(
            f"it was made by colo-xdp {made_by:.40} (format {manifest['format']!s:.10}), and this "
            f"is {__version__} (format {FORMAT}): install the same version on both hosts"
        )
    for key, kind in (*((k, str) for k in _TEXTS), *((k, list) for k in (*_LISTS, "files"))):
        if not isinstance(manifest.get(key), kind):
            raise BundleError(f"{MANIFEST}: {key} is missing or no {kind.__name__}")
    for key in _LISTS:
        if not all(isinstance(v, str) for v in manifest[key]):
            raise BundleError(f"{MANIFEST}: {key} is no list of strings")
    if manifest["role"] not in ROLES:
        raise BundleError(f"{MANIFEST}: role {manifest['role']!r:.40}")
    return manifest


def _file(entry: Any, members: Mapping[str, bytes]) -> File:
    try:
        path, mode, device = entry["path"], entry["mode"], entry["device"]
        wanted = entry["sha256"]
        data = members[path.lstrip("/")]
        text = data.decode()
    except (TypeError, KeyError, AttributeError, UnicodeDecodeError) as e:
        raise BundleError(f"{MANIFEST} and the files do not belong together: {e!r}") from e
    if _sum(data) != wanted:
        raise BundleError(f"{path}: its sum is not that of {MANIFEST}: copy the bundle again")
    if mode not in (0o600, 0o644, 0o755) or not isinstance(device, str):
        raise BundleError(f"{path}: mode {mode!r:.20}")
    return File(path, text, mode, device)


def _belongs(path: str, pair: str) -> bool:
    """Return whether a file is where init puts those of this pair."""
    if posixpath.normpath(path) != path:
        return False
    if path == config_path(pair) or posixpath.dirname(path) == directory(pair):
        return True
    units = {f"{UNITS}/colo-qemu{which}@{pair}.service" for which in ("", "-incoming")}
    one = re.escape(f"colo-xdp.{pair}.")
    network = rf"{NETWORKD}/(30-{one}[^/]+\.(netdev|network)|[^/]+\.network\.d/50-{one}conf)"
    return path in units or bool(re.fullmatch(network, path))


def unpack(data: bytes) -> HostFiles:
    """Return what a bundle contains, after checking that it is whole and of one pair.

    Raises BundleError.
    """
    members = _members(data)
    m = _manifest(members)
    pair, role = m["pair"], m["role"]
    files = tuple(_file(entry, members) for entry in m["files"])
    extra = set(members) - {MANIFEST} - {f.path.lstrip("/") for f in files}
    if extra or len(files) + 1 != len(members):
        raise BundleError(
            f"{MANIFEST} does not list {', '.join(sorted(extra)) or 'each file once'}"
        )
    for f in files:
        if not _belongs(f.path, pair):
            raise BundleError(f"{f.path} is no file of the pair {pair}")
    named = {f.path: f for f in files}
    wanted = [config_path(pair), *(f"{directory(pair)}/{n}" for n in certificate_names(role))]
    for path in wanted:
        if path not in named:
            raise BundleError(f"{path} is not in it")
    try:
        config = parse(named[config_path(pair)].text, config_path(pair))
    except ConfigError as e:
        raise BundleError(str(e)) from e
    if (config.pair, config.role) != (pair, role):
        raise BundleError(
            f"{config_path(pair)} in it is that of {config.pair} ({config.role}), and the bundle "
            f"says {pair} ({role})"
        )
    for path in m["directories"]:
        if not path.startswith("/") or posixpath.normpath(path) != path:
            raise BundleError(f"{MANIFEST}: directory {path!r:.80}")
    return HostFiles(
        pair=pair, role=role, host=m["host"], owner=m["owner"], files=files,
        **{key: tuple(m[key]) for key in _LISTS},
    )  # fmt: skip
