# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import struct

import pytest

from colo_xdp.abi import GSO_ECN, Gso
from colo_xdp.datapath.inject import Injector, vnet_header
from tests.netns.frames import tcp, udp


@pytest.mark.parametrize(
    ("frame", "gso", "partial", "want"),
    [
        (tcp(b"x"), 0, False, (0, 0, 0, 0, 0, 0)),
        (tcp(b"x", partial=True), 0, True, (1, 0, 0, 0, 34, 16)),
        (tcp(b"x" * 3000, partial=True), 1448, True, (1, 1, 66, 1448, 34, 16)),
        (tcp(b"x" * 3000, partial=True, flags=0x98), 1448, True, (1, 0x81, 66, 1448, 34, 16)),
        (tcp(b"x" * 3000, partial=True, v6=True), 1428, True, (1, 4, 86, 1428, 54, 16)),
        (tcp(b"x", partial=True, vlan=3), 0, True, (1, 0, 0, 0, 38, 16)),
        (udp(b"x", partial=True), 0, True, (1, 0, 0, 0, 34, 6)),
    ],
)
def test_header(frame: bytes, gso: int, partial: bool, want: tuple[int, ...]) -> None:
    assert struct.unpack("<BBHHHH", vnet_header(frame, gso, partial)) == want


@pytest.mark.parametrize("kind", [Gso.UDP, Gso.UDP_L4])
def test_one_datagram_or_several_is_what_the_guest_said(kind: Gso) -> None:
    head = vnet_header(udp(b"x" * 3000, partial=True), 1472, True, kind)
    assert struct.unpack("<BBHHHH", head) == (1, kind, 42, 1472, 34, 6)


@pytest.mark.parametrize("ecn", [0, GSO_ECN])
def test_what_becomes_of_cwr_is_what_the_guest_said(ecn: int) -> None:
    frame = tcp(b"x" * 3000, partial=True, flags=0x98)
    assert vnet_header(frame, 1448, True, Gso.TCPV4 | ecn)[1] == Gso.TCPV4 | ecn


def test_udp_of_which_nobody_knows_how_it_is_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="not known how"):
        vnet_header(udp(b"x" * 3000, partial=True), 1472, True)


def test_offload_on_something_else_is_refused() -> None:
    arp = b"\xff" * 6 + b"\x52" * 6 + b"\x08\x06" + bytes(46)
    with pytest.raises(ValueError, match="neither TCP nor UDP"):
        vnet_header(arp, 0, True)


def test_failures_are_counted_not_raised() -> None:
    i = Injector(-1)
    assert not i.send(tcp(b"x"))
    assert not i.send(b"\0" * 60, 0, True)
    assert i.sent == 0
    assert i.failed == {"Bad file descriptor": 1, "offload": 1}
    i.close()
