# SPDX-License-Identifier: GPL-2.0-or-later
"""The status page in a real browser: `make test-page`, which installs Chromium."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from colo_xdp.status.document import empty
from colo_xdp.status.history import History
from tests.page import png, story
from tests.page.chromium import PROGRAM, Browser, browser
from tests.unit.status.serving import Source, serving

pytestmark = pytest.mark.skipif(not PROGRAM, reason="no chromium: `make test-page` installs it")

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / ("docs/images" if os.environ.get("PUBLISH") else "build/page")
FIGURES = 8
HOSTILE = (
    '<script>document.title="owned"</script><img src=x onerror="document.title=1">"\'&lt;\u202e'
)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as b:
        yield b


@pytest.fixture(scope="module")
def hours() -> History:
    return story.hours(time.time())


@pytest.fixture
def page(chromium: Browser, hours: History) -> Iterator[tuple[Browser, Source, str]]:
    now = time.time()
    with serving(history=hours) as (source, url):
        source.doc = story.document(now)
        chromium.events.clear()
        yield chromium, source, url
        chromium.go("about:blank")
        chromium.run(0.2)


def shown(b: Browser, url: str, state: str = "protected") -> None:
    b.look("light", 900, 1200)
    b.go(url + "/")
    b.wait(f"document.getElementById('state')?.textContent === {state!r}")
    b.wait(f"document.querySelectorAll('#plots svg').length === {FIGURES}")


def body(b: Browser) -> str:
    text: str = b.eval("document.body.innerText")
    return text


def figure(b: Browser, i: int) -> dict[str, float]:
    """Where the plot is."""
    box: dict[str, float] = b.eval(
        f"(() => {{ const r = document.querySelectorAll('#plots svg')[{i}].getBoundingClientRect();"
        " return {x: r.x, y: r.y + scrollY, width: r.width, height: r.height}; })()"
    )
    return box


def test_it_shows_what_the_status_says(page: tuple[Browser, Source, str]) -> None:
    b, source, url = page
    source.doc["if_peer_died"] = {"sentence": "this guest would serve alone"}
    shown(b, url)
    text = body(b)
    for part in (
        "web1 primary", "both guests run in step", "transmits (the lease is held, 4.2 s left)",
        "connected 7.2.22 kvm", "3 of 1024 packets", "412 of 65536", "peer link", "management",
        "52:54:00:12:34:56", "each write goes to both hosts", "compare_timeout", "pause 18.4 ms",
        "1291 completed, 1 failed", "the secondary is fenced: this guest serves alone",
        "patience", "35 ms (checkpoint)", "this guest would serve alone",
        "10.0.0.5:443 to 10.0.0.90:51812",
    ):  # fmt: skip
        assert part in text, part
    assert b.eval("document.title") == "protected: web1 primary"
    source.doc = copy.deepcopy(source.doc) | {"state": "solo", "reason": "the secondary is gone"}
    b.wait("document.getElementById('state').textContent === 'solo'")
    assert "the secondary is gone" in body(b) and b.complaints() == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_plots_are_there_in_both_themes(page: tuple[Browser, Source, str], theme: str) -> None:
    b, _, url = page
    shown(b, url)
    b.look(theme, 900, 1200)
    b.eval("document.querySelector('#range button:last-child').click()")
    b.run(0.3)
    background = b.eval("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 26)"}[theme]
    for i in range(FIGURES):
        drawn = png.read(b.picture(figure(b, i)))
        (ground, most), *others = drawn.colours().most_common()
        far = (n for c, n in others if max(abs(x - y) for x, y in zip(c, ground, strict=True)) > 60)
        ink = sum(far)
        assert ink > 300 and most > ink / 4, (i, ink, most)
    labels = b.eval("[...document.querySelectorAll('#plots svg')].map(x => x.ariaLabel)")
    assert all(labels), "what they show is there as text"
    assert "protected 5 h" in labels[0] and "solo 16 min" in labels[0]
    assert "compare_timeout" in labels[1] and b.complaints() == []
    height = int(b.eval("document.documentElement.scrollHeight"))
    top = min(height, 1080)
    picture = png.write(png.read(b.picture({"x": 0, "y": 0, "width": 900, "height": top})))
    assert len(picture) < 150_000
    IMAGES.mkdir(parents=True, exist_ok=True)
    (IMAGES / f"page-{theme}.png").write_bytes(picture)


def test_it_asks_nobody_else(page: tuple[Browser, Source, str]) -> None:
    b, _, url = page
    shown(b, url)
    b.run(3)
    asked = b.requests()
    assert {u.partition("?")[0] for u in asked if not u.startswith("data:")} == {
        url + "/", url + "/status.json", url + "/history.json",
    }  # fmt: skip
    assert sum(u.startswith(url + "/history.json") for u in asked) == 1, "each 10 s"
    assert b.complaints() == []


def test_hostile_text_stays_text(page: tuple[Browser, Source, str]) -> None:
    """Names and reasons come from files, from the peer and from the network."""
    b, source, url = page
    doc = source.doc
    evil: dict[str, Any] = copy.deepcopy(doc) | {"reason": HOSTILE, "pair": HOSTILE}
    evil["failures"] = [HOSTILE]
    evil["history"][-1]["reason"] = HOSTILE
    evil["nics"][0] |= {"name": HOSTILE, "trouble": HOSTILE}
    evil["heartbeat_links"][0]["name"] = evil["disks"]["names"][0] = HOSTILE
    evil["divergences"][0]["flow"] = evil["rules"][0]["name"] = HOSTILE
    evil["checkpoints"]["last"]["detail"] = evil["data_path"]["trouble"] = HOSTILE
    evil["checkpoints"]["by_cause"] = {HOSTILE: 3, "__proto__": 4}
    source.doc = evil
    shown(b, url)
    b.run(1)
    assert b.eval("document.querySelectorAll('script').length") == 1
    assert b.eval("document.querySelectorAll('img, iframe, [onerror]').length") == 0
    assert b.eval("document.getElementById('reason').textContent") == HOSTILE
    assert "owned" in b.eval("document.title") and b.eval("document.title") != "owned"
    assert b.complaints() == []


def test_the_policy_stops_a_script_that_got_in_all_the_same(
    page: tuple[Browser, Source, str],
) -> None:
    b, _, url = page
    shown(b, url)
    b.eval(
        "(() => { const s = document.createElement('script'); s.textContent = 'window.owned = 1';"
        " document.body.append(s); const i = new Image(); i.src = 'http://127.0.0.1:9/x.png'; })()"
    )
    b.run(0.5)
    assert b.eval("window.owned") is None
    assert len([c for c in b.complaints() if "Content Security Policy" in str(c)]) >= 2


def test_it_says_when_the_controller_does_not_answer(page: tuple[Browser, Source, str]) -> None:
    """And what it shows is marked as old; when the controller is back, so is the page."""
    b, source, url = page
    shown(b, url)
    assert b.eval("document.getElementById('silent').hidden") is True
    source.broken = True
    b.wait("!document.getElementById('silent').hidden")
    b.wait(
        "document.getElementById('silent').textContent.includes('503: the loop does not answer')"
    )
    assert b.eval("document.body.classList.contains('old')") is True
    assert "protected" in body(b)
    b.wait("/as of ([3-9]|\\d\\d) s ago/.test(document.getElementById('age').textContent)")
    source.broken = False
    b.wait("document.getElementById('silent').hidden")
    assert b.eval("document.body.classList.contains('old')") is False


def test_it_says_when_nobody_listens_any_more(chromium: Browser) -> None:
    with serving() as (_, url):
        shown(chromium, url, "starting")
    chromium.wait("!document.getElementById('silent').hidden")
    assert "does not answer" in body(chromium)


def test_what_a_controller_says_first_can_be_shown(chromium: Browser) -> None:
    """No QEMU, no peer, no history: as at a start, and while it waits for a device."""
    for role in ("primary", "secondary"):
        with serving(history=History(time.time())) as (source, url):
            chromium.events.clear()
            source.doc = empty("web1", role).to_json() | {"reason": "waiting for a device"}
            shown(chromium, url, "starting")
            text = body(chromium)
            assert "NOT connected" in text and "is silent" in text and "NaN" not in text
            assert "undefined" not in text and "null" not in text
            assert chromium.complaints() == []


def test_a_new_controller_begins_a_new_history(page: tuple[Browser, Source, str]) -> None:
    """The numbers of its rows begin again, and none is mixed up with a former one's."""
    b, _, url = page
    shown(b, url)
    rows = b.eval("history.rows.length")
    assert rows > 2000
    # what the page has is now another controller's, and has more rows than this one
    b.eval("history.began = 1; history.last = 99999; historyAt = 0")
    b.wait("history.began !== 1")
    assert b.eval("history.rows.length") == rows and b.eval("history.last") == rows
    b.eval("historyAt = 0")
    b.wait("historyAt > 0")
    assert b.eval("history.rows.length") == rows, "none twice"


def test_it_can_be_read_as_a_table_and_by_keyboard(page: tuple[Browser, Source, str]) -> None:
    b, _, url = page
    shown(b, url)
    b.eval("document.querySelector('#rows summary').focus()")
    for kind in ("keyDown", "keyUp"):
        b.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r",
               windowsVirtualKeyCode=13)  # fmt: skip
    b.wait("document.querySelectorAll('#rows tbody tr').length === 60")
    pressed = "[...document.querySelectorAll('#range button')].map(x => x.ariaPressed).join()"
    assert b.eval(pressed) == "false,true,false"
    b.eval("document.querySelector('#range button').click()")
    assert b.eval(pressed) == "true,false,false"
    levels = b.eval("[...document.querySelectorAll('h1, h2, h3')].map(x => +x.tagName[1])")
    assert levels[0] == 1 and all(y - x <= 1 for x, y in zip(levels, levels[1:], strict=False))
    assert b.eval("document.querySelectorAll('th:not([scope])').length") == 0


def test_it_fits_a_telephone(page: tuple[Browser, Source, str]) -> None:
    b, _, url = page
    shown(b, url)
    b.look("dark", 380, 800)
    b.run(0.5)
    assert b.eval("document.documentElement.scrollWidth") <= 380
