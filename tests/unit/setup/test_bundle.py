# SPDX-License-Identifier: GPL-2.0-or-later
"""A bundle is whole, of one pair and of this version, or it is refused by name."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from colo_xdp.setup import bundle
from colo_xdp.setup.bundle import BundleError, pack, unpack
from colo_xdp.setup.files import File, HostFiles, host_files

from .pairs import made

HOST = host_files(made(), "primary", {})
DATA = pack(HOST)


def contents(data: bytes = DATA) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {i.name: tar.extractfile(i).read() for i in tar}  # type: ignore[union-attr]


def archive(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def changed(change: Callable[[dict[str, Any]], Any]) -> bytes:
    members = contents()
    manifest = json.loads(members[bundle.MANIFEST])
    change(manifest)
    return archive({**members, bundle.MANIFEST: json.dumps(manifest).encode()})


def refusal(data: bytes) -> str:
    with pytest.raises(BundleError) as e:
        unpack(data)
    return str(e.value)


def test_what_is_packed_is_unpacked_and_always_the_same() -> None:
    assert unpack(DATA) == HOST and pack(HOST) == DATA


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "it is no bundle, or was cut short"),
        (b"not a tar" * 1000, "it is no bundle, or was cut short"),
        (DATA[:700], "it is no bundle, or was cut short"),
        (b"x" * (bundle.MAX_BYTES + 1), "and a bundle 4194304 at most"),
        (archive({"a": b"b"}), "no manifest.json in it"),
        (archive({bundle.MANIFEST: b"[1]"}), "has no format"),
        (archive({bundle.MANIFEST: b"\xff"}), "no manifest.json in it"),
        (changed(lambda m: m.update(version="9.9.9")), "was made by colo-xdp 9.9.9 (format 1)"),
        (changed(lambda m: m.update(format=2)), "(format 2), and this is"),
        (changed(lambda m: m.update(role="third")), "role 'third'"),
        (changed(lambda m: m.pop("host")), "host is missing or no str"),
        (changed(lambda m: m.update(notes=[1])), "notes is no list of strings"),
        (changed(lambda m: m["files"].pop()), "manifest.json does not list etc/systemd/network/"),
        (changed(lambda m: m["files"].append(3)), "do not belong together"),
        (changed(lambda m: m["files"].append(m["files"][0])), "each file once"),
        (changed(lambda m: m["files"][0].update(sha256="0")), "copy the bundle again"),
        (changed(lambda m: m["files"][0].update(mode=0o4755)), "mode 2541"),
        (changed(lambda m: m["files"][0].update(path="/etc/passwd")), "do not belong together"),
        (changed(lambda m: m.update(directories=["/a/../b"])), "directory '/a/../b'"),
        (changed(lambda m: m.update(pair="web2")), "is no file of the pair web2"),
        (changed(lambda m: m.update(role="secondary")), "/etc/colo-xdp/web1/secondary.crt is not"),
    ],
)  # fmt: skip
def test_it_is_refused_by_name(data: bytes, said: str) -> None:
    assert said in refusal(data)


@pytest.mark.parametrize("at", range(0, len(DATA), 997))
def test_one_that_was_cut_short_is_no_bundle(at: int) -> None:
    """A tar ends with zeros, so the last part of it may be missing."""
    try:
        assert unpack(DATA[:at]) == HOST
    except BundleError:
        return
    assert not DATA[at:].strip(b"\0")


def test_a_file_of_somebody_else_is_not_installed() -> None:
    for path in (
        "/etc/shadow",
        "/etc/colo-xdp/web2.toml",
        "/etc/colo-xdp/web1/../../shadow",
        "/etc/systemd/system/ssh.service",
        "/etc/systemd/network/10-eth0.network",
        "/etc/colo-xdp/web1/a/b",
        "/etc/systemd/network/30-colo-xdp.web10.x.network",
    ):
        bad = replace(HOST, files=(*HOST.files, File(path, "x")))
        assert "is no file of the pair web1" in refusal(pack(bad)), path  # fmt: skip


def test_its_configuration_has_to_be_that_of_the_bundle() -> None:
    def with_config(text: str) -> HostFiles:
        files = [replace(f, text=text) if f.path.endswith("web1.toml") else f for f in HOST.files]
        return replace(HOST, files=tuple(files))

    other = host_files(made(pair="web2"), "primary", {}).files[0].text
    assert "is that of web2 (primary), and the bundle says web1" in refusal(
        pack(with_config(other))
    )
    assert "unknown key 'colour'" in refusal(pack(with_config("colour = 1\n")))
