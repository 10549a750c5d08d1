# SPDX-License-Identifier: GPL-2.0-or-later
"""Which card is at the tap: answers of QEMU 7.2 to `info network`."""

from __future__ import annotations

import pytest

from colo_xdp.qemu.nic import NicError, at_tap

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
    found = {t: (c.name, c.mac) for t in ("tapA", "tapB", "tapC") for c in [at_tap(MANY, t)]}
    assert found == {
        "tapA": ("virtio-net-pci.0", "52:54:00:00:00:01"),
        "tapB": ("eth1", "52:54:00:00:00:02"),
        "tapC": ("e1000.0", "52:54:00:00:00:03"),
    }
    assert at_tap(LIBVIRT, "vnet3").mac == "52:54:00:00:00:05", "there is no other"


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
    found = at_tap(QUEUES + other, "tapA")
    assert (found.mac, found.queues) == ("52:54:00:00:00:01", 3)
    assert at_tap(other + QUEUES, "tapC").queues == 1
    by_fd = LIBVIRT + "net0.1: index=1,type=nic,\n \\ hostnet0: index=1,type=tap,fd=33\n"
    assert at_tap(by_fd, "vnet3").queues == 2


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
        at_tap(text, tap)
