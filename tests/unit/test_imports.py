# SPDX-License-Identifier: GPL-2.0-or-later
"""Pure core, thin edges: who may import what."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "colo_xdp"
PURE = (
    "_seq", "abi", "announce", "beacon", "btf", "checkpoint_queue", "checks", "claims", "compare",
    "compared", "comparer", "config", "config_keys", "corpus/__init__", "corpus/craft",
    "corpus/play", "counters", "datagram", "disks", "explain", "failover", "fastgram", "fastpath",
    "flow", "flows", "fragments", "giving", "guest_event", "held_queue", "hexdump", "history",
    "journal", "ledger", "limits", "marked", "marks", "nic", "offload_port", "offloaded",
    "openings", "outbox", "pacing", "packet", "pair_view", "policy", "qmp_event", "reasons",
    "record", "released", "replay", "rewrite", "segment", "states", "status", "stream", "suggest",
    "tcp_state", "fast_path", "timers", "twin", "uncompared", "window", "wire",
)  # fmt: skip
NAMES = {part for name in PURE for part in name.split("/")}
EDGES = {
    "bcc": "loader",
    "pyroute2": "attach",
    "qemu": "qmp",
    "prometheus_client": "metrics",
    "typer": "cli",
    "scapy": "pcap",
    "cryptography": "pki",
    "etcd3gw": "lease",
}
IMPURE_STDLIB = {"socket", "asyncio", "subprocess", "time", "threading", "os", "ctypes", "select"}


def imports(path: Path) -> tuple[set[str], set[str]]:
    """Top-level names of absolute imports, and names of modules of ours."""
    absolute: set[str] = set()
    ours: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            absolute |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                absolute.add((node.module or "").split(".")[0])
            elif node.module:
                ours.add(node.module.split(".")[0])
            else:
                ours |= {a.name for a in node.names}
    return absolute, ours


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_import_the_standard_library_and_each_other(name: str) -> None:
    absolute, ours = imports(PACKAGE / f"{name}.py")
    assert absolute <= set(sys.stdlib_module_names)
    assert not absolute & IMPURE_STDLIB
    assert ours <= NAMES, ours - NAMES


@pytest.mark.parametrize(("library", "module"), EDGES.items())
def test_each_library_has_one_importer(library: str, module: str) -> None:
    found = {p.stem for p in PACKAGE.rglob("*.py") if library in imports(p)[0]}
    assert found == {module}


def test_the_product_does_not_import_the_lab() -> None:
    for p in PACKAGE.glob("*.py"):
        if p.stem != "cli":  # its demo command, lazily
            assert "lab" not in imports(p)[1], p
