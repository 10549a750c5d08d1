# SPDX-License-Identifier: GPL-2.0-or-later
"""The documents: their links lead somewhere, and what they repeat from elsewhere is still true."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *(p for n in ("README", "ARCHITECTURE", "CONTRIBUTING") if (p := ROOT / f"{n}.md").exists()),
    *sorted((ROOT / "docs").rglob("*.md")),
]
OPERATOR = ROOT / "docs/operator"


def prose(text: str) -> str:
    """Without code blocks and code in lines, where brackets and # are something else."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    text = re.sub(r"^    .*$", "", text, flags=re.M)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(page: Path) -> set[str]:
    """Those that a forge makes of headings, and those that are written out."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    seen: Counter[str] = Counter()
    out = set(re.findall(r'<a (?:id|name)="([^"]+)"', text))
    for title in re.findall(r"^#{1,6} +(.+?)[ #]*$", text, flags=re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        out.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return out


def dead_links(page: Path) -> list[str]:
    """Relative links of a page that lead to no file, or to no heading of it."""
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert dead_links(page) == []


def test_a_dead_link_would_be_seen(tmp_path: Path) -> None:
    page = "# One: `two`, three\n\n```\n# not a heading\n```\n# One\n# One\n"
    (tmp_path / "b.md").write_text(page)
    links = tmp_path / "a.md"
    links.write_text(
        "[1](b.md#one-two-three) [2](b.md) [3](b.md#one-1) [4](https://example.org) `[5](no)`\n"
        "[6](c.md) [7](b.md#not-a-heading) [8](#here)\n"
    )
    assert dead_links(links) == ["c.md", "b.md#not-a-heading", "#here"]


def test_the_operators_pages_are_all_in_readme() -> None:
    text = (ROOT / "README.md").read_text()
    pages = [*OPERATOR.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    assert len(pages) >= 12
    for page in pages:
        assert f"]({page.relative_to(ROOT)})" in text, page


@pytest.mark.parametrize(("name", "most"), [("README", 8192), ("ARCHITECTURE", 10_240)])
def test_what_everybody_reads_is_short(name: str, most: int) -> None:
    assert len((ROOT / f"{name}.md").read_bytes()) <= most


# ---- figures

#: rows of README's table "How fast", and the goals of the published report that they are
HEADLINES = {
    "CPU of plain forwarding to that of the fast path: MTU frames, 64 connections":
        "fast path to the floor, MTU frames, 64 connections, the worst case",
    "the same, 64 KB frames, 64 connections":
        "fast path to the floor, 64 KB frames, 64 connections, the worst case",
    "the same, guests that cut their segments differently, 64 connections":
        "fast path to the floor, different boundaries, 64 connections, the worst case",
    "TCP goodput to plain forwarding's, offloads on": "goodput to plain, offloads on",
    "real guests: bulk throughput to that of QEMU's own proxy":
        "real guests, ours to QEMU's proxy: bulk throughput",
    "real guests: p99 of small requests to QEMU's own proxy":
        "real guests, ours to QEMU's proxy: p99 of small requests",
}  # fmt: skip


def goals(text: str) -> dict[str, tuple[str, ...]]:
    """Goal -> what was wanted, what was reached, and whether that was enough."""
    rows = [[c.strip() for c in x.strip("|").split("|")] for x in text.splitlines() if x[:1] == "|"]
    return {r[0]: tuple(r[1:]) for r in rows if len(r) == 4 and r[1][:1] in "≥≤"}


def published() -> dict[str, tuple[str, ...]]:
    return goals((ROOT / "tests/bench/report/bench-report.md").read_text())


def test_readmes_figures_are_those_of_the_published_report() -> None:
    text = (ROOT / "README.md").read_text()
    report = published()
    assert goals(text) == {row: report[goal] for row, goal in HEADLINES.items()}
    met = sum(r[2] == "met" for r in report.values())
    assert f"{met} of {len(report)} goals were met" in text


def test_the_page_has_the_figures_of_the_published_report() -> None:
    page = goals((ROOT / "docs/benchmarks.md").read_text())
    assert list(page.values()) == list(published().values())


# ---- troubleshooting


#: quoted, and not found in the code as they are: of systemd, of the kernel, with a name put in
ELSEWHERE = {
    "status=203/EXEC", "status=2", "Connection refused",
    "waiting for the lease", "[qemu] incoming", "where it does not hear this side's",
}  # fmt: skip


@pytest.mark.parametrize(
    ("page", "section"),
    [("troubleshooting", "When it does not work"), ("failover", "Heartbeats")],
)
def test_messages_to_look_up_are_those_of_the_program(page: str, section: str) -> None:
    code = "".join(p.read_text() for p in sorted((ROOT / "colo_xdp").rglob("*.py")))
    code = re.sub(r'"\s*\n\s*[rf]*"', "", code)  # what is written in several lines
    text = (OPERATOR / f"{page}.md").read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    first = [x.split("|")[1] for x in text.splitlines() if x.startswith("| ")]
    quoted = [q for cell in first for q in re.findall(r"`([^`]+)`", cell)]
    assert len(quoted) > 5
    pieces = [p.strip(" :") for q in quoted for p in q.split("...")]
    assert [p for p in pieces if p and p not in ELSEWHERE and p not in code] == []


def test_the_tests_that_a_page_names_exist() -> None:
    """What shows a claim is named in a comment of the page: <!-- tests: test_a test_b -->."""
    code = "".join(p.read_text() for p in (ROOT / "tests").rglob("test_*.py"))
    named = 0
    for page in PAGES:
        for comment in re.findall(r"<!-- tests: (.*?) -->", page.read_text(), flags=re.S):
            for name in comment.split():
                named += 1
                assert f"def {name}(" in code, f"{page.name}: {name}"
    assert named > 40
