# SPDX-License-Identifier: GPL-2.0-or-later
"""Metrics from the status document, over real HTTP."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from colo_xdp import abi
from colo_xdp.compare.causes import Cause
from colo_xdp.engine.waits import WAIT_BUCKETS
from colo_xdp.failover.states import Role, State
from colo_xdp.peer.heartbeat_datagram import REFUSALS
from colo_xdp.status import metrics
from tests.unit.status.serving import Source, get, serving

DEPLOY = Path(__file__).parents[3] / "deploy"


@pytest.fixture
def served() -> Iterator[tuple[Source, str]]:
    with serving() as found:
        yield found


def value(text: str, line: str) -> float:
    found = [x for x in text.splitlines() if x.startswith(line + " ")]
    assert len(found) == 1, line
    return float(found[0].split()[-1])


def test_everything_is_there_from_the_first_scrape(served: tuple[Source, str]) -> None:
    _, url = served
    code, text = get(url + "/metrics")
    assert code == 200
    base = 'pair="web1",role="primary"'
    for prog in abi.PROGRAMS:
        for reason in abi.REASONS:
            labels = f'pair="web1",program="{prog}",reason="{reason}",role="primary"'
            assert value(text, f"colo_xdp_packets_total{{{labels}}}") == 0
    for cause in Cause:
        assert value(text, f'colo_xdp_checkpoints_total{{cause="{cause}",{base}}}') == 0
        assert value(text, f'colo_xdp_mismatches_total{{cause="{cause}",{base}}}') == 0
    for state in State:
        want = float(state is State.STARTING)
        assert value(text, f'colo_xdp_state{{{base},state="{state}"}}') == want
    for name, (kind, _, _) in metrics.METRICS.items():
        assert f"# TYPE colo_xdp_{name}" in text, (name, kind)


def test_numbers_are_the_documents(served: tuple[Source, str]) -> None:
    source, url = served
    source.doc["held"] = {"packets": 3, "bytes": 4000, "limit": 1024}
    source.doc["checkpoints"]["by_cause"]["operator"] = 7
    source.doc["wait"]["buckets"][0] = 5
    source.doc["wait"]["buckets"][-1] = 2
    source.doc["wait"]["sum"] = 42.5
    source.doc["peer"]["silent_ms"] = 250.0
    refused = dict.fromkeys(REFUSALS, 0) | {"forged": 4}
    source.doc["heartbeat_links"] = [
        {"name": "peer link", "silent_ms": 80.0, "echo_age_ms": None, "rtt_us": 500.0, "sent": 9,
         "received": 8, "refused": refused, "trouble": ""},
    ]  # fmt: skip
    text = get(url + "/metrics")[1]
    base = 'pair="web1",role="primary"'
    way = 'link="peer link",pair="web1",role="primary"'
    assert value(text, f"colo_xdp_heartbeat_link_silent_seconds{{{way}}}") == 0.08
    assert value(text, f"colo_xdp_heartbeat_link_echo_age_seconds{{{way}}}") == -1
    assert value(text, f"colo_xdp_heartbeat_link_round_trip_seconds{{{way}}}") == 0.0005
    assert value(text, f"colo_xdp_heartbeat_link_received_total{{{way}}}") == 8
    forged = 'link="peer link",pair="web1",reason="forged",role="primary"'
    assert value(text, f"colo_xdp_heartbeat_link_refused_total{{{forged}}}") == 4
    assert value(text, f"colo_xdp_held_packets{{{base}}}") == 3
    assert value(text, f'colo_xdp_checkpoints_total{{cause="operator",{base}}}') == 7
    first = f"{WAIT_BUCKETS[0]:g}"
    assert value(text, f'colo_xdp_wait_seconds_bucket{{le="{first}",{base}}}') == 5
    assert value(text, f'colo_xdp_wait_seconds_bucket{{le="+Inf",{base}}}') == 7
    assert value(text, f"colo_xdp_wait_seconds_sum{{{base}}}") == 42.5
    assert value(text, f"colo_xdp_peer_silent_seconds{{{base}}}") == 0.25


@pytest.mark.parametrize(("right", "held"), [("", -1), ("held", 1), ("promised", 0), ("none", 0)])
def test_whether_the_lease_is_held(served: tuple[Source, str], right: str, held: int) -> None:
    source, url = served
    source.doc["active"]["lease"] = right
    text = get(url + "/metrics")[1]
    assert value(text, 'colo_xdp_lease_held{pair="web1",role="primary"}') == held


def test_a_controller_that_does_not_answer_is_counted(served: tuple[Source, str]) -> None:
    source, url = served
    source.broken = True
    code, text = get(url + "/metrics")
    assert code == 200 and "colo_xdp_scrape_errors_total" in text
    assert re.search(r"colo_xdp_scrape_errors_total\{.*\} 1.0", text)
    assert get(url + "/readyz")[0] == 503


SHIPPED = ("deploy/grafana/colo-xdp.json", "deploy/prometheus/alerts.yml")
QUERIES = (*SHIPPED, "docs/reference/metrics.md", "docs/reference/reasons.md")
SUFFIX = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
#: metric, as it is scraped -> its labels
SCRAPED = {
    f"colo_xdp_{n}{s}": {"pair", "role", *labels, *(("le",) if kind == "histogram" else ())}
    for n, (kind, _, labels) in metrics.METRICS.items()
    for s in SUFFIX[kind]
}
#: not level:metric:operation, which a rule records; all of those have the label `pair`
METRIC = r"(?<![:\w])colo_xdp_\w+"
#: what Prometheus adds
TARGET = {"instance"}
#: label -> its values
VALUES = {
    "reason": {*abi.REASONS, *REFUSALS},
    "program": {*abi.PROGRAMS},
    "state": {*map(str, State)},
    "cause": {*map(str, Cause)},
    "role": {*map(str, Role)},
}


def text_of(path: str) -> str:
    text = (DEPLOY.parent / path).read_text()
    return text.replace('\\"', '"') if path.endswith(".json") else text


def alternatives(pattern: str) -> list[str]:
    """A regular expression with groups of one level, as the expressions that it offers."""
    m = re.search(r"\(([^()]*)\)", pattern)
    if m:
        parts = [pattern[: m.start()] + x + pattern[m.end() :] for x in m[1].split("|")]
        return [y for x in parts for y in alternatives(x)]
    return pattern.split("|")


@pytest.mark.parametrize("path", QUERIES)
def test_queries_name_only_metrics_and_labels_that_exist(path: str) -> None:
    text = text_of(path)
    used = set(re.findall(METRIC, text)) - {"colo_xdp_rule_"}
    documented = {f"colo_xdp_{n}" for n in metrics.METRICS} if path.endswith(".md") else set()
    assert len(used) > 1 and used <= {*SCRAPED} | documented, used - {*SCRAPED}
    for metric, matchers in re.findall(r"(colo_xdp_\w+)\{([^{}]*[=~][^{}]*)\}", text):
        for label, op, value in re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"', matchers):
            assert label in SCRAPED[metric], f"{metric}{{{label}}}"
            if label not in VALUES or value.startswith("$"):
                continue
            for one in alternatives(value) if "~" in op else [re.escape(value)]:
                assert any(re.fullmatch(one, v) for v in VALUES[label]), f"{label}{op}{value!r}"


@pytest.mark.parametrize("path", SHIPPED)
def test_what_is_shipped_shows_only_labels_that_the_query_has(path: str) -> None:
    text = text_of(path)
    split = r'"refId"' if path.endswith(".json") else r"- alert:"
    for part in re.split(split, text)[1:]:
        shown = set(re.findall(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}", part))
        by = re.search(r"(?:sum|max|min) by \(([^)]*)\)", part)
        if by:
            has = {x.strip() for x in by[1].split(",")}
        else:
            has = set().union({"pair"}, *(SCRAPED[m] for m in re.findall(METRIC, part)))
        assert shown <= has | TARGET, (shown - has, part[:200])


def test_the_dashboard_and_the_alerts_sum_by_prefix() -> None:
    for path in SHIPPED:
        for prefix in ("drop_", "offload_", "punt_", "note_"):
            assert re.search(rf'reason=~"{prefix}', text_of(path)), (path, prefix)


def test_a_wrong_reason_would_be_seen() -> None:
    assert alternatives("a_(b|c)_d|e") == ["a_b_d", "e", "a_c_d", "e"]
    assert not any(re.fullmatch("dropped_.*", v) for v in VALUES["reason"])
