# SPDX-License-Identifier: GPL-2.0-or-later
"""Who may import what: packages as floors, a pure core, one importer per library, no circles.

`python -m tests.unit.test_layers` (`make layers`) prints the floors with what each imports.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "colo_xdp"
#: package or module -> what it may import, besides itself. An arrow goes to a lower line only.
LAYERS: dict[str, set[str]] = {
    "abi": set(),
    "clock": set(),
    "user_command": set(),
    "validate": set(),
    "colo_proxy": set(),
    "net": {"abi"},
    "conntrack": {"abi"},
    "failover": {"abi", "user_command"},
    "compare": {"net", "validate"},
    "peer": {"failover", "validate"},
    "offload": {"abi", "compare", "net"},
    "engine": {"compare", "net", "offload"},
    "config": {"compare", "peer", "validate"},
    "qemu": {"clock", "user_command", "validate"},
    "datapath": {"abi", "config", "conntrack", "failover", "net", "offload", "user_command"},
    "controller": {
        "abi", "clock", "compare", "config", "datapath", "engine", "failover", "net", "peer",
        "qemu",
    },
    "status": {"abi", "compare", "controller", "engine", "failover", "net", "peer"},
    "tools": {
        "abi", "colo_proxy", "compare", "config", "conntrack", "datapath", "engine", "failover",
        "net", "peer", "qemu", "user_command", "validate",
    },
    "service": {
        "config", "controller", "datapath", "failover", "peer", "qemu", "status", "tools",
        "user_command",
    },
    "setup": {"config", "qemu", "tools", "validate"},
    "lab": {"service", "tools"},
    "cli": {"config", "controller", "lab", "service", "setup", "status", "tools", "validate"},
}  # fmt: skip
#: packages, or modules of others, that import the standard library and each other only, and of the
#: standard library nothing that reaches out
PURE = (
    "abi", "clock", "validate", "colo_proxy", "net", "conntrack", "compare", "offload", "engine",
    "config", "failover.decision", "failover.facts", "failover.mark", "failover.prospect",
    "failover.states",
    "peer.messages",
    "peer.heartbeat_datagram",
    "qemu.events", "qemu.disks", "qemu.migration", "qemu.nic", "datapath.btf",
    "datapath.image",
    "status.document", "status.events", "status.fields", "status.glance", "status.health",
    "status.history",
    "status.text", "status.work",
    "controller.command", "controller.copy_health", "controller.pacing", "controller.pair_view",
    "controller.story",
    "tools.explain", "tools.findings", "tools.host_checks", "tools.unit_checks",
    "tools.price",
    "tools.suggest", "tools.replay",
    "tools.corpus",
    "setup.answers", "setup.bundle", "setup.config_text", "setup.files", "setup.flags",
    "setup.guest", "setup.libvirt_domain", "setup.networkd", "setup.ports",
    "setup.qemu_arguments", "setup.qemu_unit", "setup.reader", "setup.record",
)  # fmt: skip
#: readers of a file that is theirs, which is all that they do outside
FILES = {"config.file": {"os"}, "tools.corpus.play": set[str]()}
#: the module, or package, that a library stops at
EDGES = {
    "bcc": "datapath.compiler",
    "pyroute2": "datapath.netlink",
    "qemu": "qemu.qmp",
    "prometheus_client": "status.metrics",
    "typer": "cli",
    "rich": "status.live",
    "scapy": "tools.pcap",
    "cryptography": "tools.pki",
    "etcd3gw": "failover.etcd",
}
IMPURE_STDLIB = {"socket", "asyncio", "subprocess", "time", "threading", "os", "ctypes", "select"}
MODULES = {
    ".".join(p.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): p
    for p in PACKAGE.rglob("*.py")
}


def _of_types(tree: ast.AST) -> set[int]:
    """Nodes below `if TYPE_CHECKING`: annotations, which nothing runs."""
    return {
        id(x)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for x in ast.walk(node)
    }


@cache
def imports(name: str) -> tuple[set[str], set[str]]:
    """Top-level names of absolute imports, and our modules, of what is there when it runs."""
    path = MODULES[name]
    tree = ast.parse(path.read_text())
    types = _of_types(tree)
    absolute: set[str] = set()
    ours: set[str] = set()
    here = name.split(".")[: None if path.name == "__init__.py" else -1]
    for node in ast.walk(tree):
        if id(node) in types:
            continue
        if isinstance(node, ast.Import):
            absolute |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                absolute.add((node.module or "").split(".")[0])
                continue
            base = here[: len(here) - (node.level - 1)]
            target = ".".join([*base, *([node.module] if node.module else [])])
            ours |= {
                full if (full := f"{target}.{a.name}".lstrip(".")) in MODULES else target
                for a in node.names
            }
    return absolute, ours - {"", "__init__"}


def room(name: str) -> str:
    return name.split(".")[0]


def test_every_room_has_its_floor() -> None:
    assert {room(m) for m in MODULES} - {"__init__"} == set(LAYERS)
    below: set[str] = set()
    for name, allowed in LAYERS.items():
        assert allowed <= below, f"{name} is above {allowed - below}"
        below.add(name)
    for name, path in MODULES.items():
        if path.name == "__init__.py" and name != "__init__":
            assert ast.get_docstring(ast.parse(path.read_text())), f"{name} has no charter"


def test_unit_tests_mirror_the_packages() -> None:
    tests = {p.parent.name for p in Path(__file__).parent.glob("*/__init__.py")}
    assert tests == {p.parent.name for p in PACKAGE.glob("*/__init__.py")}


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"__init__"}))
def test_arrows_run_downward(name: str) -> None:
    rooms = {room(m) for m in imports(name)[1]} - {room(name)}
    assert rooms <= LAYERS[room(name)], rooms - LAYERS[room(name)]


def test_no_arrow_is_allowed_that_nobody_needs() -> None:
    used: dict[str, set[str]] = {}
    for name in MODULES:
        used.setdefault(room(name), set()).update(room(m) for m in imports(name)[1])
    assert {r: used[r] - {r} for r in LAYERS} == LAYERS


def _circle(name: str, way: tuple[str, ...], done: set[str]) -> Iterator[tuple[str, ...]]:
    if name in way:
        yield way[way.index(name) :]
    elif name not in done:
        for m in sorted(imports(name)[1] & set(MODULES)):
            yield from _circle(m, (*way, name), done)
        done.add(name)


def test_there_is_no_circle() -> None:
    done: set[str] = set()
    assert [c for name in sorted(MODULES) for c in _circle(name, (), done)] == []


PURE_MODULES = sorted(m for m in MODULES for p in PURE if m == p or m.startswith(f"{p}."))


@pytest.mark.parametrize("name", PURE_MODULES)
def test_pure_modules_import_the_standard_library_and_each_other(name: str) -> None:
    absolute, ours = imports(name)
    assert absolute <= set(sys.stdlib_module_names)
    assert not absolute & IMPURE_STDLIB - FILES.get(name, set())
    assert ours <= set(PURE_MODULES), ours - set(PURE_MODULES)


@pytest.mark.parametrize(("library", "module"), EDGES.items())
def test_each_library_has_one_importer(library: str, module: str) -> None:
    importers = {name for name in MODULES if library in imports(name)[0]}
    assert importers and all(n == module or n.startswith(f"{module}.") for n in importers)


def drawing() -> str:
    """One line per floor, the highest first: its modules, lines of code, charter and arrows."""
    lines = []
    for name, below in reversed(LAYERS.items()):
        paths = [p for m, p in MODULES.items() if room(m) == name]
        size = sum(p.read_text().count("\n") for p in paths)
        charter = ast.get_docstring(ast.parse(MODULES[name].read_text())) or ""
        lines.append(f"{name:13}{len(paths):3} modules {size:6} lines  {charter.splitlines()[0]}")
        lines.append(f"{'':13}-> {', '.join(sorted(below)) or 'nothing'}")
    return "\n".join(lines)


def test_the_drawing_has_every_floor() -> None:
    assert [x.split()[0] for x in drawing().splitlines()[::2]] == list(reversed(LAYERS))


if __name__ == "__main__":
    print(drawing())
