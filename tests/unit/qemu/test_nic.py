# SPDX-License-Identifier: GPL-2.0-or-later
"""Which card is at the tap: answers of QEMU 7.2 to `info network`."""

from __future__ import annotations

import pytest

from colo_xdp.qemu.nic import NicError, at_tap, parse, refusal

ONE = """\
virtio-net-pci.0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:00:00:01
 \\ n0: index=0,type=tap,ifname=tapA,script=no,downscript=no
"""
MANY = (
    "u: index=0,type=user,net=10.0.2.0,restrict=off\n"
    + ONE
    + """\
eth1: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:00:00:02
 \\ n1: index=0,type=tap,ifname=tapB,script=no,downscript=no
e1000.0: index=0,type=nic,model=e1000,macaddr=52:54:00:00:00:03
 \\ n2: index=0,type=tap,ifname=tapC,script=no,downscript=no
e1000.1: index=0,type=nic,model=e1000,macaddr=52:54:00:12:34:56
eth4: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:57
 \\ n4: index=0,type=tap,fd=9
"""
)
LIBVIRT = """\
net0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:00:00:05
 \\ hostnet0: index=0,type=tap,fd=32
"""


def test_the_card_at_the_tap() -> None:
    found = {t: (c.name, c.mac) for t in ("tapA", "tapB", "tapC") for c in [at_tap(parse(MANY), t)]}
    assert found == {
        "tapA": ("virtio-net-pci.0", "52:54:00:00:00:01"),
        "tapB": ("eth1", "52:54:00:00:00:02"),
        "tapC": ("e1000.0", "52:54:00:00:00:03"),
    }
    assert at_tap(parse(LIBVIRT), "vnet3").mac == "52:54:00:00:00:05", "there is no other"


QUEUES = """\
virtio-net-pci.0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:00:00:01
 \\ n0: index=0,type=tap,ifname=tapA,script=no,downscript=no
virtio-net-pci.1: index=1,type=nic,
 \\ n0: index=1,type=tap,ifname=tapA,script=no,downscript=no
virtio-net-pci.2: index=2,type=nic,
 \\ n0: index=2,type=tap,ifname=tapA,script=no,downscript=no
"""


def test_a_card_with_several_queues_is_one_card() -> None:
    other = MANY.replace("virtio-net-pci.0", "eth9").replace("tapA", "tapD")
    found = at_tap(parse(QUEUES + other), "tapA")
    assert (found.mac, found.queues) == ("52:54:00:00:00:01", 3)
    assert at_tap(parse(other + QUEUES), "tapC").queues == 1
    by_fd = LIBVIRT + "net0.1: index=1,type=nic,\n \\ hostnet0: index=1,type=tap,fd=33\n"
    assert at_tap(parse(by_fd), "vnet3").queues == 2


@pytest.mark.parametrize(
    ("text", "tap"),
    [
        (MANY, "vnet3"),  # e1000.1, eth4
        (ONE, "tapB"),  # that one is elsewhere
        ("", "tapA"),
        (LIBVIRT + LIBVIRT.replace("net0", "net1"), "vnet3"),
        ("n0: index=0,type=tap,ifname=tapA\n", "tapA"),
    ],
)
def test_what_cannot_be_told_is_refused(text: str, tap: str) -> None:
    with pytest.raises(
        NicError, match=rf"cannot determine.*attached to {tap} .*set \[network\] guest_mac"
    ):
        at_tap(parse(text), tap)


TAPS = {"tapA": "", "tapB": "", "tapC": ""}


def test_a_card_at_no_configured_tap_is_refused_by_name() -> None:
    three = "\n".join(line for line in MANY.splitlines() if "eth4" not in line and "n4" not in line)
    assert refusal(parse(three), TAPS) == "", "e1000.1 is at nothing, and sends nothing"
    assert "e1000.0 52:54:00:00:00:03 at tapC" in refusal(parse(three), {"tapA": "", "tapB": ""})
    assert "eth4 52:54:00:12:34:57 at an unnamed tap device" in refusal(parse(MANY), TAPS)
    named = TAPS | {"vnet9": "52:54:00:12:34:57"}
    assert refusal(parse(MANY), named) == "", "QEMU names no tap, the configuration its address"
    user = (
        ONE
        + """\
e1000.0: index=0,type=nic,model=e1000,macaddr=52:54:00:00:00:03
 \\ u: index=0,type=user,net=10.0.2.0,restrict=off
"""
    )
    assert "e1000.0 52:54:00:00:00:03 at an unnamed user device" in refusal(
        parse(user), {"tapA": ""}
    )


def test_the_only_card_of_a_guest_needs_no_name() -> None:
    assert refusal(parse(LIBVIRT), {"vnet3": ""}) == ""
    two = LIBVIRT + LIBVIRT.replace("net0", "net1").replace("00:05", "00:06")
    assert "net0" in refusal(parse(two), {"vnet3": ""})
    assert refusal(parse(two), {"vnet3": "52:54:00:00:00:05", "vnet4": "52:54:00:00:00:06"}) == ""
    assert refusal([], {"vnet3": ""}) == ""


def test_a_card_at_a_hub_is_one_too() -> None:
    """They are listed below their hub, with its port in front of the name."""
    hub = (
        ONE
        + """\
hub 0
 \\ hub0port1: e1000.0: index=0,type=nic,model=e1000,macaddr=52:54:00:00:00:09
 \\ hub0port0: tap.0: index=0,type=tap,ifname=tap9,script=no,downscript=no
"""
    )
    assert [c.name for c in parse(hub)] == ["virtio-net-pci.0", "e1000.0"]
    assert "e1000.0 52:54:00:00:00:09 at an unnamed hubport device" in refusal(
        parse(hub), {"tapA": ""}
    )
    bare = "lan9118.0: index=0,type=nic\n \\ n0: index=0,type=user,net=10.0.2.0\n"
    assert refusal(parse(bare), {"tapA": ""}) != "", "a model that tells no address"


def test_a_configured_nic_without_a_card_is_named() -> None:
    assert "at tapB, which [network] names" in refusal(parse(ONE), {"tapA": "", "tapB": ""})
    assert refusal(parse(ONE), {"tapA": "", "tapB": "52:54:00:00:00:01"}) == ""
