# SPDX-License-Identifier: GPL-2.0-or-later
"""bpf/lib/abi.h and colo_xdp/abi.py say the same."""

from __future__ import annotations

import re
from pathlib import Path

from colo_xdp import abi

HEADER = (Path(__file__).parents[2] / "bpf/lib/abi.h").read_text()
SIZES = {"__u64": 8, "__u32": 4, "__be32": 4, "__u16": 2, "__be16": 2, "__u8": 1}


def enum(name: str) -> dict[str, int]:
    body = re.search(rf"enum {name} {{(.*?)}};", HEADER, re.S)
    assert body, name
    text = re.sub(r"/\*.*?\*/", "", body[1], flags=re.S)
    return {m[1]: int(m[2], 0) for m in re.finditer(r"(\w+)\s*=\s*(\w+)", text)}


def define(name: str) -> int:
    m = re.search(rf"#define {name}\s+(\w+?)u?\b", HEADER)
    assert m, name
    return int(m[1].rstrip("uUL"), 0)


def struct_size(name: str) -> int:
    body = re.search(rf"struct {name} {{(.*?)\n}};", HEADER, re.S)
    assert body, name
    text = re.sub(r"/\*.*?\*/", "", body[1], flags=re.S)
    total = 0
    for typ, count in re.findall(r"(__\w+)\s+\w+(?:\[(\d+)\])?;", text):
        total += SIZES[typ] * int(count or 1)
    return total


def test_enums() -> None:
    pairs = (
        ("colo_mode", abi.Mode, "MODE_"),
        ("colo_cfg", abi.Cfg, "CFG_"),
        ("colo_prog", abi.Prog, "PROG_"),
        ("colo_reason", abi.Reason, "R_"),
        ("colo_source", abi.Source, "SRC_"),
        ("colo_role", abi.HostRole, "ROLE_"),
        ("colo_loss_policy", abi.LossPolicy, "LOSS_"),
    )
    for c_name, py, prefix in pairs:
        assert enum(c_name) == {prefix + m.name: int(m) for m in py}, c_name


def test_numbers() -> None:
    assert define("COLO_ABI") == abi.ABI
    assert define("COLO_MARK") == abi.MARK
    assert define("COLO_TPID") == abi.TPID
    assert define("COLO_EPOCH_MASK") == abi.EPOCH_MASK
    assert define("COLO_KIND_SHIFT") == abi.KIND_SHIFT
    assert define("COLO_KIND_MIRROR") == abi.KIND_MIRROR
    assert define("COLO_KIND_SVM") == abi.KIND_SVM
    assert define("COLO_KIND_SYN") == abi.KIND_SYN
    assert define("COLO_EPOCH_BASE") == abi.EPOCH_BASE
    assert define("COLO_KEY_UDP") == abi.KEY_UDP
    assert define("DGRAM_ALIGN") == abi.DGRAM_ALIGN == abi.DGRAM.size
    assert struct_size("colo_dgram") == abi.DGRAM.size
    assert define("EV_PARTIAL") == abi.EV_PARTIAL
    assert define("EV_VLAN") == abi.EV_VLAN
    assert define("MAC_KNOWN") == abi.MAC_KNOWN
    assert define("MAC_ALL") == abi.MAC_ALL
    assert define("CLAIM_SAYS_ROUTER") == abi.CLAIM_SAYS_ROUTER
    assert define("CLAIM_ROUTER") == abi.CLAIM_ROUTER
    assert define("EV_UNSUMMED") == abi.EV_UNSUMMED


def test_virtio_numbers() -> None:
    text = (Path(__file__).parents[2] / "bpf/lib/gso.h").read_text()
    said = {m[1]: int(m[2], 0) for m in re.finditer(r"#define VNET_(\w+)\s+(\w+)", text)}
    ours = {g.name: int(g) for g in abi.Gso if g is not abi.Gso.NONE}
    assert said == ours | {"ECN": abi.GSO_ECN}


def test_shapes() -> None:
    assert struct_size("colo_event") == abi.EVENT.size
    assert struct_size("colo_count") == abi.COUNT.size
    assert struct_size("colo_flow_key") == abi.FLOW_KEY.size
    assert struct_size("colo_flow") == abi.FLOW.size
    assert struct_size("colo_conn") == abi.CONN.size
    assert struct_size("colo_client") == abi.CLIENT.size
    assert struct_size("colo_address") == abi.ADDRESS.size
    assert struct_size("colo_claim") == abi.CLAIM.size


def test_kind_and_epoch_fit_the_tag() -> None:
    assert abi.KIND_SYN << abi.KIND_SHIFT | abi.EPOCH_MASK < 1 << 16
