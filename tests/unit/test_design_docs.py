# SPDX-License-Identifier: GPL-2.0-or-later
"""What the documents for developers name exists: files, methods, and the steps of the life lines.

Their links are checked with those of all other pages.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "ARCHITECTURE.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "docs/testing.md",
    *sorted((ROOT / "docs/design").glob("*.md")),
]
NAMES = [str(p.relative_to(ROOT)) for p in DOCUMENTS]
A_FILE = re.compile(r"[\w.*/-]+\.(?:py|c|h|toml|md|sh|yml|json)")
A_PLACE = re.compile(r"(?:bpf|tests|docs|deploy|colo_xdp|tools)/[\w.*/-]+")


def test_there_are_documents() -> None:
    assert len(DOCUMENTS) > 12 and all(p.exists() for p in DOCUMENTS)


@pytest.mark.parametrize("name", NAMES)
def test_files_that_a_document_names_exist(name: str) -> None:
    """Below the root, or below colo_xdp. Of a command the first word counts."""
    text = (ROOT / name).read_text()
    named = {x.split()[0].split("#")[0] for x in re.findall(r"`([^`\n]+)`", text) if x.strip()}
    named |= set(re.findall(r"  \[([^\]]+)\]$", text, flags=re.M))  # in a life line
    paths = {x for x in named if "/" in x and (A_FILE.fullmatch(x) or A_PLACE.fullmatch(x))}
    missing = {
        x
        for x in paths
        if not (list(ROOT.glob(x.rstrip("/"))) or list((ROOT / "colo_xdp").glob(x.rstrip("/"))))
    }
    assert not missing


def _classes() -> tuple[dict[str, set[str]], dict[str, list[str]], dict[str, set[str]]]:
    """Of all classes, by name: what is defined in them, their bases, their files."""
    members: dict[str, set[str]] = defaultdict(set)
    bases: dict[str, list[str]] = defaultdict(list)
    files: dict[str, set[str]] = defaultdict(set)
    for path in (ROOT / "colo_xdp").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ClassDef):
                continue
            files[node.name].add(str(path.relative_to(ROOT / "colo_xdp")))
            bases[node.name] += [ast.unparse(b).split("[")[0] for b in node.bases]
            for x in ast.walk(node):
                if isinstance(x, ast.FunctionDef | ast.AsyncFunctionDef):
                    members[node.name].add(x.name)
                elif isinstance(x, ast.Attribute) and ast.unparse(x.value) == "self":
                    members[node.name].add(x.attr)
                elif isinstance(x, ast.AnnAssign) and isinstance(x.target, ast.Name):
                    members[node.name].add(x.target.id)
    return members, bases, files


MEMBERS, BASES, FILES = _classes()


def _has(cls: str, member: str) -> bool:
    return member in MEMBERS[cls] or any(_has(b, member) for b in list(BASES[cls]) if b in FILES)


@pytest.mark.parametrize("name", NAMES)
def test_methods_that_a_document_names_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    named = re.findall(r"`([A-Z]\w+)\.(\w+)(?:\(\))?`", text)
    assert [f"{c}.{m}" for c, m in named if c in FILES and not _has(c, m)] == []
    assert [f"{c}.{m}" for c, m in named if c not in FILES] == []


LIFE = re.compile(r"```text\n(.*?)```", re.S)
STEP = re.compile(r"(\S+(?:, \S+)*?) {2,}(\S.*?)(?: {2}\[([\w./]+)\])?")


def test_life_lines_name_what_the_code_has() -> None:
    """Each step is a method in the file that is named, or a function of a program."""
    blocks = LIFE.findall((ROOT / "ARCHITECTURE.md").read_text())
    assert len(blocks) == 4
    steps = 0
    for block in blocks:
        where: dict[str, str] = {}
        for line in block.splitlines():
            m = STEP.fullmatch(line)
            assert m, line
            for name in m[1].split(", "):
                owner, _, method = name.partition(".")
                file = where.setdefault(owner, m[3]) if m[3] else where[owner]
                steps += 1
                if method:
                    assert file in FILES[owner], line
                    assert method in MEMBERS[owner], f"{line}: it is not {owner}'s own"
                elif file.endswith(".py"):
                    assert f"def {name}(" in (ROOT / "colo_xdp" / file).read_text(), line
                else:
                    assert re.search(rf"^[\w ]+ {name}\(", (ROOT / file).read_text(), re.M), line
    assert steps > 40
