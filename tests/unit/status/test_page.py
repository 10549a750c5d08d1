# SPDX-License-Identifier: GPL-2.0-or-later
"""The status page as it is served. tests/page runs it in a browser."""

from __future__ import annotations

import base64
import hashlib
import re
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

import pytest

from colo_xdp.failover.states import State
from colo_xdp.status import page
from colo_xdp.status.history import COLUMNS
from tests.unit.status.serving import serving

TEXT = page.HTML.decode()
VOID = {"meta", "link", "br", "img", "input", "hr"}
IMAGES = Path(__file__).parents[3] / "docs/images"


class Outline(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag


@pytest.fixture(scope="module")
def outline() -> Outline:
    o = Outline()
    o.feed(TEXT)
    o.close()
    return o


def test_it_is_well_formed_and_small(outline: Outline) -> None:
    assert outline.open == [] and TEXT.startswith("<!DOCTYPE html>")
    assert "/* page.css */" not in TEXT and "/* page.js */" not in TEXT
    assert len(page.HTML) < 40_000


def test_it_is_served_as_html() -> None:
    with serving() as (_, url), urllib.request.urlopen(url + "/", timeout=10) as r:
        assert r.headers["Content-Type"] == "text/html; charset=utf-8"
        assert r.headers["Content-Security-Policy"] == page.CONTENT_SECURITY_POLICY
        assert r.read() == page.HTML


def test_the_policy_allows_this_script_and_this_style_only() -> None:
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        (inner,) = re.findall(rf"<{tag}>(.*?)</{tag}>", TEXT, re.S)
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'; " in page.CONTENT_SECURITY_POLICY
    assert "unsafe" not in page.CONTENT_SECURITY_POLICY
    assert page.CONTENT_SECURITY_POLICY.startswith("default-src 'none'; ")


def test_it_needs_nothing_from_elsewhere(outline: Outline) -> None:
    urls = set(re.findall(r"\b[a-z]+://[^\s\"'`]+", TEXT))
    assert urls == {"http://www.w3.org/2000/svg"}, "the name of a namespace, which nothing fetches"
    links = [a[k] for _, a in outline.tags for k in ("src", "href") if k in a]
    assert links == ["data:,", "/status.json"]
    assert not re.search(r"@import|url\(", TEXT)


def test_no_text_becomes_markup(outline: Outline) -> None:
    banned = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|srcdoc"
    assert not re.search(banned, TEXT)
    for tag, attributes in outline.tags:
        assert not [k for k in attributes if k.startswith("on") or k == "style"], tag


def test_it_can_be_used_without_seeing_it(outline: Outline) -> None:
    tags = [t for t, _ in outline.tags]
    assert tags.count("h1") == 1 and tags.count("main") == 1
    ids = {a["id"] for _, a in outline.tags if "id" in a}
    assert all(a["aria-labelledby"] in ids for t, a in outline.tags if t == "section")
    assert dict(outline.tags)["html"]["lang"] == "en"
    assert {"status", "alert"} <= {a.get("role") for _, a in outline.tags}


def test_it_reads_columns_that_there_are() -> None:
    script = page._source("js")
    used = {*re.findall(r'key: "(\w+)"', script), *re.findall(r"\br\.([a-z_0-9]+)\b", script)}
    own = {"fast_percent", "headers", "ok", "status", "text", "json", "map"}
    rules = {"name", "action", "flows", "uncompared", "differences"}
    assert used - own - rules <= set(COLUMNS), used
    named = set(re.findall(r"(\w+): \"(?:good|warn|bad)\"", script))
    assert named < set(State), named - set(State)


@pytest.mark.parametrize("name", ["page-dark.png", "page-light.png"])
def test_the_pictures_of_the_documents_are_small(name: str) -> None:
    data = (IMAGES / name).read_bytes()
    assert data.startswith(b"\x89PNG\r\n") and len(data) < 150_000
