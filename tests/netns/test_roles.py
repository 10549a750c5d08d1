# SPDX-License-Identifier: GPL-2.0-or-later
"""Test a host whose guest has taken over: it becomes the primary, and later the secondary again."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import pytest

from colo_xdp import abi
from colo_xdp.abi import Mode
from colo_xdp.datapath import devices
from colo_xdp.datapath.conntrack_map import ConntrackMap
from colo_xdp.datapath.datapath import DataPath
from colo_xdp.datapath.ring import CapturedFrame
from colo_xdp.lab.net import wait_for
from colo_xdp.net.packet import parse
from tests.netns.conftest import Sniffer, Tap, inside, own, sh
from tests.netns.frames import GUEST_MAC, tcp
from tests.netns.test_secondary_path import (
    CLIENT_ISN,
    ISN_P,
    ISN_S,
    OFFSET,
    TS_P,
    TS_S,
    Host,
    config,
    right,
    ts,
)


@pytest.fixture(params=[True, False], ids=["tc", "xdp"])
def survivor(request: pytest.FixtureRequest, tmp_path: Path) -> Host:
    h = Host(own("cxs3"), tmp_path, request.param)
    request.addfinalizer(h.close)
    h.dp.mode, h.dp.epoch = Mode.RUN, 5
    h.handshake()
    h.dp.mode = Mode.TAKEOVER
    with inside(h.net.host):
        h.dp.open_network()
    return h


def next_controller(h: Host) -> None:
    h.dp.close()
    with inside(h.net.host):
        h.dp = DataPath(config(h.tmp))


def said(body: bytes) -> bytes:
    return tcp(body, seq=(ISN_S + 1) % 2**32, ack=CLIENT_ISN + 1, options=ts(TS_S, 2))


def from_client(h: Host, body: bytes) -> None:
    with inside(h.net.client), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:
        s.bind(("c0", 0))
        s.send(tcp(body, seq=CLIENT_ISN + 1, ack=ISN_P + 6, reverse=True, options=ts(4, TS_P)))


def events(dp: DataPath, n: int, timeout: float = 2) -> list[CapturedFrame]:
    got: list[CapturedFrame] = []
    end = time.monotonic() + timeout
    while len(got) < n and time.monotonic() < end:
        dp.drain(got.append)
    return got


class Talk(threading.Thread):
    """Keep the guest talking on its old connection."""

    def __init__(self, guest: Tap) -> None:
        super().__init__(daemon=True)
        self.guest, self.stop, self.sent = guest, threading.Event(), 0
        self.start()

    def run(self) -> None:
        while not self.stop.wait(0.0005):
            self.guest.send(said(b"all the time"))
            self.sent += 1


def test_at_no_moment_are_numbers_wrong(survivor: Host) -> None:
    h = survivor
    client = Sniffer(h.net.client, "c0")
    talk = Talk(h.guest)
    assert client.wait(lambda f: b"all the time" in f)
    h.dp.change_role()
    next_controller(h)
    assert h.dp.role == "primary" and h.dp.mode is Mode.BYPASS
    assert (h.dp.promoted_epoch, h.dp.epoch) == (5, 6)
    time.sleep(0.05)
    talk.stop.set()
    talk.join(5)
    h.guest.send(said(b"the last"))
    seqs = []
    for _, f in client.frames(3):
        if b"all the time" in f or b"the last" in f:
            assert right(f)
            seqs.append(parse(f).seq)
        if b"the last" in f:
            break
    assert set(seqs) == {ISN_P + 1}, "as the client knows them, before, while and after"
    assert len(seqs) > talk.sent / 4
    client.close()


def test_the_comparison_sees_the_clients_numbers(survivor: Host) -> None:
    h = survivor
    h.dp.change_role()
    next_controller(h)
    from_client(h, b"bypass")
    seen = h.guest.recv(lambda f: b"bypass" in f)
    assert seen is not None and parse(seen).ack == (ISN_S + 6) % 2**32 and right(seen)
    h.dp.epoch, h.dp.mode = 7, Mode.RUN
    from_client(h, b"mirrored")
    mirrored = h.peer.wait(lambda f: b"mirrored" in f)
    assert mirrored is not None
    assert parse(mirrored[1][:12] + mirrored[1][16:]).ack == ISN_P + 6
    seen = h.guest.recv(lambda f: b"mirrored" in f)
    assert seen is not None and parse(seen).ack == (ISN_S + 6) % 2**32 and right(seen)
    client = Sniffer(h.net.client, "c0")
    h.guest.send(said(b"compare me"))
    (event,) = events(h.dp, 1)
    assert event.source == abi.Source.PVM and parse(event.frame).seq == ISN_P + 1
    assert client.wait(lambda f: b"compare" in f, 0.2) is None
    h.dp.injectors["release"].send(event.frame, event.gso_size, event.partial, event.gso_type)
    out = client.wait(lambda f: b"compare" in f)
    assert out is not None and parse(out[1]).seq == ISN_P + 1 and right(out[1])
    client.close()


def test_a_tap_that_lost_its_programs_sends_in_the_clients_numbers_again(
    survivor: Host,
) -> None:
    h = survivor
    h.dp.change_role()
    next_controller(h)
    client = Sniffer(h.net.client, "c0")
    with inside(h.net.host):
        sh("tc", "qdisc", "del", "dev", "tap0", "clsact")
        back = h.dp.look()
        assert back.restored[:3] == [
            "promoted_out on tap0",
            "promoted_in on tap0",
            "pvm_out on tap0",
        ]
        assert back.unseen and not h.dp.look().restored
    h.guest.send(said(b"put back"))
    out = client.wait(lambda f: b"put back" in f)
    assert out is not None and parse(out[1]).seq == ISN_P + 1 and right(out[1])
    from_client(h, b"and back")
    seen = h.guest.recv(lambda f: b"and back" in f)
    assert seen is not None and parse(seen).ack == (ISN_S + 6) % 2**32 and right(seen)
    with inside(h.net.host):
        h.dp.drop_guest()
        assert not h.dp.look().restored, "they are not wanted any more"
    client.close()


def test_what_is_handed_to_the_new_secondary(survivor: Host) -> None:
    h = survivor
    h.dp.change_role()
    next_controller(h)
    table = h.dp.flows()
    assert table is not None
    own = ConntrackMap(*table)
    (entry,) = own.export(h.dp.promoted_epoch)
    assert int.from_bytes(entry[40 + 12 : 40 + 16], "little") == OFFSET
    own.sweep(h.dp.promoted_epoch)
    assert own.wanted == 1
    with inside(h.net.host):
        h.dp.drop_guest()
    client = Sniffer(h.net.client, "c0")
    h.guest.send(said(b"untouched"))
    out = client.wait(lambda f: b"untouched" in f)
    assert out is not None and parse(out[1]).seq == (ISN_S + 1) % 2**32
    client.close()


def programs(h: Host) -> dict[str, int]:
    return {name: p.id for name, p in h.dp.objects.programs.items()}


def test_and_back_to_the_secondary(survivor: Host) -> None:
    h = survivor
    first = programs(h)
    h.dp.mode = Mode.CHECKPOINT
    h.guest.send(tcp(b"long ago"))
    wait_for("a captured frame", lambda: h.dp.counters()["svm_out"]["punt"][0] > 0, 5)
    h.dp.mode = Mode.TAKEOVER
    h.dp.change_role()
    next_controller(h)
    second = programs(h)
    h.dp.mode = Mode.DROP  # its guest has died, the other one is active
    h.dp.change_role()
    next_controller(h)
    assert h.dp.role == "secondary" and h.dp.mode is Mode.DROP
    assert programs(h) == first, "nothing was compiled"
    assert not events(h.dp, 1, 0.1), "of another time"
    with inside(h.net.host):
        assert devices.link_info("tap0").master == 0
        h.dp.mode = Mode.RUN
        up = Sniffer(h.net.client, "c0")
        h.guest.send(tcp(b"shut in"))
        assert h.peer.wait(lambda f: b"shut in" in f) is not None
        assert up.wait(lambda f: f[6:12] == GUEST_MAC, 0.2) is None
        up.close()
    h.dp.mode = Mode.DROP
    h.dp.change_role()
    next_controller(h)
    assert programs(h) == second


def test_an_offset_for_good_outlives_checkpoints(survivor: Host) -> None:
    """On the new secondary, whose guest is a copy of the one with numbers of its own."""
    h = survivor
    table = h.dp.flows()
    assert table is not None
    flows = ConntrackMap(*table)
    flows.adopt(b"".join(flows.export(5)), first=True)
    for epoch in (6, 7):
        h.dp.epoch, h.dp.mode = epoch, Mode.RUN
        _, out = h.says(said(b"translated"))
        assert parse(out).seq == ISN_P + 1 and right(out)
    next_controller(h)
    _, out = h.says(said(b"translated"))
    assert parse(out).seq == ISN_P + 1
    h.dp.mode = Mode.DROP


def test_the_next_controller_need_not_compile(survivor: Host) -> None:
    h = survivor
    first = programs(h)
    h.dp.mode = Mode.CHECKPOINT
    h.dp.close()
    h.guest.send(tcp(b"nobody is there"))
    with inside(h.net.host):
        began = time.monotonic()
        h.dp = DataPath(config(h.tmp))
        print(f"{(time.monotonic() - began) * 1e3:.0f} ms")
    assert h.dp.objects.warm and programs(h) == first
    (event,) = events(h.dp, 1)
    assert b"nobody is there" in event.frame, "it waited in the ring"
