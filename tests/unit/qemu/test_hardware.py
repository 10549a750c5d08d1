# SPDX-License-Identifier: GPL-2.0-or-later
"""Two machines that differ: each difference is named, and nothing else."""

from __future__ import annotations

import base64
import zlib

import pytest

from colo_xdp.qemu.hardware import decode, differences, encode, parse_qtree, refusal, tap_queues

TREE = """\
bus: main-system-bus
  type System
  dev: hpet, id ""
    gpio-out "" 1
    timers = 3 (0x3)
  dev: i440FX-pcihost, id ""
    pci-hole64-size = 2147483648 (2 GiB)
    bus: pci.0
      type PCI
      dev: virtio-blk-pci, id "vd0"
        ioeventfd = true
        addr = 03.0
        romfile = ""
        x-pcie-pm-init = true
        class SCSI controller, addr 00:03.0, pci id 1af4:1001 (sub 1af4:0002)
        bar 0: i/o at 0xffffffffffffffff [0x7e]
        bus: virtio-bus
          type virtio-pci-bus
          dev: virtio-blk-device, id ""
            drive = "#block120"
            num-queues = 1 (0x1)
      dev: virtio-net-pci, id ""
        addr = 02.0
        class Ethernet controller, addr 00:02.0, pci id 1af4:1000 (sub 1af4:0001)
        bus: virtio-bus
          type virtio-pci-bus
          dev: virtio-net-device, id ""
            mac = "52:54:00:12:34:56"
            netdev = "n0"
            mq = false
"""


def test_what_is_read() -> None:
    seen = parse_qtree(TREE)
    assert seen["virtio-net-pci at 00:02.0 / virtio-net-device, mac"] == '"52:54:00:12:34:56"'
    assert not any("netdev" in k or "drive" in k or "romfile" in k or ", x-" in k for k in seen)
    assert decode(encode(seen)) == seen


@pytest.mark.parametrize(
    ("a", "b", "says"),
    [
        ("mq = false", "mq = true", "virtio-net-device, mq: false here, true there"),
        ("12:34:56", "12:34:57", 'mac: "52:54:00:12:34:56" here'),
        ("num-queues = 1 (0x1)", "num-queues = 2 (0x2)", "num-queues: 1 (0x1) here, 2 (0x2) there"),
        ("addr 00:02.0", "addr 00:04.0", "virtio-net-pci at 00:02.0 only here"),
        ("dev: hpet", "dev: hpot", "hpet only here"),
    ],
)
def test_a_difference_is_named(a: str, b: str, says: str) -> None:
    found = differences(parse_qtree(TREE), parse_qtree(TREE.replace(a, b)))
    assert any(says in f for f in found), found
    assert len(found) <= 2, "a device that is missing is named once, without its properties"
    assert says in refusal(parse_qtree(TREE), parse_qtree(TREE.replace(a, b)))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("#block120", "colo-d0"),
        ('netdev = "n0"', 'netdev = "hostnet7"'),
        ('romfile = ""', 'romfile = "pxe.rom"'),
        ("0xffffffffffffffff", "0x000000000000c000"),
        ("x-pcie-pm-init = true", "x-pcie-pm-init = false"),
    ],
)
def test_what_belongs_to_the_host_may_differ(a: str, b: str) -> None:
    assert not differences(parse_qtree(TREE), parse_qtree(TREE.replace(a, b)))


def test_queues_are_compared_where_both_hosts_know_them() -> None:
    mac = "52:54:00:12:34:56"
    four, one = tap_queues(mac, 4), tap_queues(mac, 1)
    assert differences(four, one) == [f"network card {mac}, queues of its tap: 4 here, 1 there"]
    assert not differences(four, four)
    assert not differences(four, {})
    assert not differences({}, four)
    assert tap_queues(mac, 0) == {}, "[network] guest_mac: nobody has asked"


def test_many_differences_are_cut() -> None:
    found = refusal({str(i): "a" for i in range(20)}, {str(i): "b" for i in range(20)})
    assert "and 14 more" in found
    assert not refusal({"QEMU": "7.2"}, {"QEMU": "7.2"})


@pytest.mark.parametrize(
    "text",
    [
        "", "%", "AAAA", base64.b64encode(zlib.compress(b"[1]")).decode(),
        base64.b64encode(zlib.compress(b'{"a": 1}')).decode(),
        base64.b64encode(zlib.compress(b" " * (2 << 20))).decode(),
        base64.b64encode(zlib.compress(b'{"a": "b"}')[:-6]).decode(),
        base64.b64encode(zlib.compress(b"\xff")).decode(),
    ],
)  # fmt: skip
def test_a_report_that_is_none(text: str) -> None:
    with pytest.raises(ValueError):
        decode(text)
