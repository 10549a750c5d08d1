# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the keys of [migration] on real pairs: TLS, further channels, and what keeps a pair from
entering."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path

import pytest

from colo_xdp.lab import vm as vms
from colo_xdp.lab.client import EchoStream
from colo_xdp.lab.net import wait_for
from colo_xdp.lab.pair import Lab
from tests.e2e.conftest import LabMaker
from tests.e2e.test_reprotect import protected

TLS = {"tls_creds": "out", "tls_creds_incoming": "in"}


def credentials(directory: Path) -> Sequence[str]:
    """Return QEMU's options for a key that both hosts share, one object for each direction."""
    (directory / "keys.psk").write_text(f"qemu:{secrets.token_hex(32)}\n")
    objects = (("out", "client"), ("in", "server"))
    made = [f"tls-creds-psk,id={n},dir={directory},endpoint={e}" for n, e in objects]
    return [x for m in made for x in ("-object", m)]


def parameters(lab: Lab, role: str) -> tuple[str, int, bool]:
    """Return the credentials, number of channels and multifd of a host's QEMU."""
    p = lab.vm[role].ask("query-migrate-parameters")
    caps = lab.vm[role].ask("query-migrate-capabilities")
    multifd = any(c["capability"] == "multifd" and c["state"] for c in caps)
    return str(p["tls-creds"]), int(p["multifd-channels"]), multifd


def digest(lab: Lab) -> str:
    """Return the MD5 sum of the guest's file."""
    return lab.client.run("md5sum < /tmp/x | cut -c 1-32").split()[-1]


def lives(lab: Lab) -> None:
    """Checkpoints, a takeover and a new secondary, with a connection open."""
    echo = EchoStream(lab.net.client)
    wait_for("echoes", lambda: len(echo.stats.answered_at) > 10, 10)
    # Each guest writes other bytes: what the secondary has afterwards came over the channel.
    lab.client.run("dd if=/dev/urandom of=/tmp/x bs=1M count=16")
    for _ in range(5):
        lab.client.run("dd if=/dev/urandom of=/tmp/x bs=1M count=3 seek=5 conv=notrunc")
        lab.ask("primary", "checkpoint")
    assert lab.client.uptime_page()[0]
    written = digest(lab)
    lab.ask("primary", "checkpoint")
    at = lab.vm["primary"].kill9()
    lab.wait_state("secondary", "promoted", 15)
    assert digest(lab) == written
    lab.start_vm("primary", incoming=True)
    protected(lab)
    lab.ask("secondary", "checkpoint")
    wait_for("echoes afterwards", lambda: echo.stats.dead or echo.stats.answered_after(at) > 30, 20)
    stats = echo.stop()
    assert (stats.dead, stats.wrong) == ("", 0)


def test_an_encrypted_channel(make_lab: LabMaker, tmp_path: Path) -> None:
    lab = make_lab(
        tcp=True,
        qemu_options=credentials(tmp_path),
        overrides={"migration": TLS | {"max_bandwidth": 500}},
    )
    lab.protect()
    assert parameters(lab, "primary")[0] == "out" and parameters(lab, "secondary")[0] == "in"
    assert lab.vm["primary"].ask("query-migrate-parameters")["max-bandwidth"] == 500 << 20
    lives(lab)
    assert parameters(lab, "primary")[0] == "in" and parameters(lab, "secondary")[0] == "out"


def test_further_channels(make_lab: LabMaker, tmp_path: Path) -> None:
    """With TLS on each of them."""
    if vms.qemu_version(vms.chosen_qemu()) < (11, 0, 0):
        pytest.skip("before QEMU 11 COLO has none (tests/e2e/test_qemu_11.py)")
    channels(make_lab, tmp_path)


def channels(make_lab: LabMaker, tmp_path: Path) -> None:
    lab = make_lab(
        tcp=True, qemu_options=credentials(tmp_path), overrides={"migration": TLS | {"multifd": 3}}
    )
    lab.protect()
    assert parameters(lab, "primary") == ("out", 3, True)
    assert parameters(lab, "secondary") == ("in", 3, True)
    lives(lab)


def test_what_a_qemu_cannot_do_is_said(make_lab: LabMaker) -> None:
    lab = make_lab(overrides={"migration": {"multifd": 2} | TLS})
    for role in ("secondary", "primary"):
        lab.start_controller(role)
    for role in ("secondary", "primary"):
        wait_for(
            "the reason",
            lambda r=role: "QEMU has no such object" in lab.status(r).get("reason", ""),  # type: ignore[misc]
            60,
        )
    assert lab.status("primary")["active"]["transmitting"]
    assert lab.client.http("index.html", timeout=5).ok
