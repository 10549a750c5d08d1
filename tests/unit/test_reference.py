# SPDX-License-Identifier: GPL-2.0-or-later
"""docs/reference agrees with the code, and its words are the current ones."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from colo_xdp import abi, validate
from colo_xdp.cli import EXIT_CODES
from colo_xdp.compare.causes import Cause
from colo_xdp.failover import states
from colo_xdp.failover.states import State
from colo_xdp.peer.heartbeat_datagram import REFUSALS
from colo_xdp.peer.messages import MESSAGES
from colo_xdp.status.document import FIELDS, Status, empty
from colo_xdp.status.fields import StatusError
from colo_xdp.status.metrics import METRICS
from colo_xdp.tools.explain import ADVICE
from tests.docs import generate
from tests.docs.generate import BLOCKS, MARK, PAGES, ROOT, SUFFIX, TABLES

ALL = {p.stem: p.read_text() for p in sorted(PAGES.glob("*.md"))}


def rows(page: str) -> list[list[str]]:
    """The cells of all tables of a page."""
    return [
        [c.strip() for c in line.strip("|").split("|")]
        for line in ALL[page].splitlines()
        if line.startswith("| ")
    ]


@pytest.mark.parametrize("page", ALL)
def test_the_page_is_what_the_code_gives(page: str) -> None:
    assert ALL[page] == generate.render(ALL[page]), "run `make docs`"


def test_every_table_is_in_a_page_once() -> None:
    used = [m[1] for text in ALL.values() for m in MARK.finditer(text)]
    assert sorted(used) == sorted(BLOCKS)
    assert sum(text.count("<!-- generated: ") for text in ALL.values()) == len(used), "a mark's end"


def test_every_key_of_the_config() -> None:
    sections = re.split(r"^## ", ALL["config"], flags=re.M)
    for name, cls in TABLES.items():
        (body,) = (s for s in sections if re.match(rf"\[+{name}\]+\n", s))
        for key, f in validate.keys(cls).items():
            line = re.search(rf"^\| `{key}` \|(?:[^|\n]*\|){{5}}$", body, re.M)
            assert line and f.metadata["help"][1:].replace("|", "&#124;") in line[0], (
                f"{name}.{key}"
            )
            assert f.metadata["unit"] in line[0]


def test_every_command_and_exit_code() -> None:
    for path, _ in generate.commands():
        assert f"\n### {path.removeprefix('colo-xdp ')}\n\n    {path}" in ALL["cli"], path
    for option in ("--json", "--dry-run", "--write PATH", "--role primary", "COLO_XDP_RUN_DIR"):
        assert option in ALL["cli"], option
    assert sorted(EXIT_CODES) == list(range(6))
    assert "--as-json" not in ALL["cli"], "the option's own name"


def test_every_metric_reason_cause_state_and_message() -> None:
    text = "\n".join(ALL.values())
    names = [f"colo_xdp_{n}{SUFFIX[kind]}" for n, (kind, _, _) in METRICS.items()]
    for name in [*names, *abi.REASONS, *abi.PROGRAMS, *Cause, *State, *MESSAGES, *REFUSALS]:
        assert f"| `{name}` |" in text or f".{name}` |" in text, name
    assert set(ADVICE) == set(Cause) and set(states.MEANINGS) == set(State)


def test_nothing_is_without_a_meaning() -> None:
    for page in ("config", "cli", "metrics", "status", "reasons", "messages"):
        for row in rows(page):
            if row[0] not in ("offset",) and not row[0].isdigit():
                assert row[-1] or row == [""], row


def test_every_field_of_a_heartbeat_has_its_line() -> None:
    said = {r[0].strip("`") for r in rows("messages")}
    assert set(MESSAGES["heartbeat"]) <= said


def test_every_key_of_the_status_is_checked() -> None:
    """What the page calls a key of the document is one that readers can rely on."""
    whole = empty("web1", "primary").to_json()
    assert set(whole) == set(FIELDS)
    for key, f in FIELDS.items():
        with pytest.raises(StatusError, match=key):
            Status.from_json({k: v for k, v in whole.items() if k != key})
        if f.keys and whole[key]:
            for inner in f.keys:
                less = {k: v for k, v in whole[key].items() if k != inner}
                with pytest.raises(StatusError, match=rf"{key}\.{inner}: missing"):
                    Status.from_json(whole | {key: less})


@pytest.mark.parametrize("page", ALL)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]*(?:#[^)]*)?)\)", ALL[page]):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        text = (PAGES / path).read_text() if path else ALL[page]
        heads = {
            re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-")
            for h in re.findall(r"^#+ (.*)$", text, re.M)
        }
        assert not anchor or anchor in heads, target


# ---- the glossary

ENTRY = re.compile(r"^\*\*(.+?)\*\*: (.+?)\nCode: (.+?)$", re.M | re.S)
PLACE = re.compile(r"`([\w/.]+?)(?::(\w+))?`")


def names(path: Path) -> set[str]:
    """What a module defines at its top, or all words of a C file."""
    text = path.read_text()
    if path.suffix != ".py":
        return set(re.findall(r"\w+", text))
    found: set[str] = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        found |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    return found


def test_every_term_names_a_place_that_exists() -> None:
    entries = ENTRY.findall(ALL["glossary"])
    assert len(entries) >= 30 and len(entries) == ALL["glossary"].count("\nCode: ")
    for term, text, code in entries:
        places = PLACE.findall(code)
        assert places and ", ".join(f"`{p}{':' + n if n else ''}`" for p, n in places) == code, term
        assert len(re.findall(r"[.:](?=\s|$)", text)) <= 4, f"{term}: one or two sentences"
        for path, name in places:
            assert (ROOT / path).is_file(), f"{term}: {path}"
            assert not name or name in names(ROOT / path), f"{term}: {path}:{name}"


# ---- words

#: words of earlier versions, and the ones in force
RETIRED = {
    r"tiers?|tier K|tier U": "fast path, slow path",
    r"giv(?:e|en|ing) (?:to|back to) (?:K|the kernel|the fast path)|gifts?": "offload",
    r"recall(?:s|ed)?|seiz(?:e|es|ed)": "reclaim",
    r"stash(?:es|ed)?": "buffer",
    r"brakes?|under_backpressure": "backpressure",
    r"twins?": "counterpart",
    r"beacons?": "heartbeat, heartbeat datagram",
    r"speakers?": "leadership, arbiter",
    r"speaks?|spoken|speaking": "transmits",
    r"bonds?": "sync state",
    r"stand(?:s|ing)? down|stand-down|stood down": "demote",
    r"taken-over": "promoted",
    r"advert?ised to|told to clients": "advertised",
    r"somebody'?s? word|your word|person's word": "operator request",
}  # fmt: skip
#: what users read
TEXTS = [
    *(ROOT / f"{name}.md" for name in ("README", "ARCHITECTURE", "CONTRIBUTING")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / "colo_xdp" / p for p in (
        "config/schema.py", "config/network.py", "config/qemu.py",
        "status/metrics.py", "status/document.py", "status/fields.py", "status/text.py",
        "status/events.py", "status/glance.py", "status/health.py", "failover/prospect.py",
        "compare/causes.py", "compare/policy.py", "engine/counters.py", "tools/explain.py",
    )),
    *sorted((ROOT / "colo_xdp/cli").glob("*.py")),
    *sorted(p for p in (ROOT / "deploy").rglob("*") if p.is_file()),
]  # fmt: skip


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_retired_word(path: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", path.read_text())  # names in code are not words
    for pattern, now in RETIRED.items():
        m = re.search(rf"\b(?:{pattern})\b", text, re.I)
        assert m is None, f"{m[0]!r} in {path.name}: say {now}"


#: parts of names that none has any more, in code and in tests
RETIRED_PARTS = {
    "tier", "tiers", "gift", "gifts", "twin", "twins", "beacon", "beacons", "speak", "speaks",
    "spoke", "speaker", "speakers", "bond", "bonds", "stash", "stashes", "brake", "brakes",
    "braking", "seize", "seized",
}  # fmt: skip
CODE = [
    p for d in ("colo_xdp", "bpf", "tests") for p in sorted((ROOT / d).rglob("*"))
    if p.suffix in (".py", ".c", ".h", ".toml") and p != Path(__file__)
]  # fmt: skip


def parts(name: str) -> set[str]:
    """Of snake_case and CamelCase."""
    return {x.lower() for x in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


def test_no_name_has_a_retired_word() -> None:
    found = {
        f"{name} ({path.relative_to(ROOT)})"
        for path in CODE
        for name in set(re.findall(r"[A-Za-z_]\w*", path.read_text()))
        if not RETIRED_PARTS.isdisjoint(parts(name))
    }
    assert not found
    assert parts("TierU") == {"tier", "u"} and "twin" in parts("test_rst_needs_its_twin")
