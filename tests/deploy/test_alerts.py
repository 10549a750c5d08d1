# SPDX-License-Identifier: GPL-2.0-or-later
"""Test which alerts fire and clear, by promtool over metrics recorded during incidents.

The recordings (tests/deploy/incidents, made by `make incidents`) have one sample a second; here
each host is scraped every 5 s, as deploy/prometheus/scrape.yml says. What must not alarm keeps its
true durations, and is tested for all moments at which the scrapes of the two hosts can come. An
incident that somebody has to end lasted for half a minute in the laboratory: what was recorded
between two marks is repeated until it has lasted for HELD_S. After each incident what came last is
repeated for CALM_S: no alert may be left then.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from . import series
from .rules import ROOT, RULES, alerts, rule_metrics
from .series import Recording

HERE = Path(__file__).parent
SCRAPE_S = 5
HELD_S, CALM_S = 12 * 60, 7 * 60
HOSTS = ("host-a:9847", "host-b:9847")
#: s at which the two hosts are scraped first
PHASES = [(a, b) for a in range(SCRAPE_S) for b in range(SCRAPE_S)]
SOME_PHASES = [(0, 0), (3, 1), (1, 4)]
#: what the last recorded seconds are that are repeated
LAST_S = 10
#: metrics that were not there when the first incidents were recorded
NEWER = {"colo_xdp_lease_held"}


def promtool() -> str:
    """Return promtool: the one that `make setup` has unpacked, or an installed one."""
    here = ROOT / "build/prometheus/usr/bin/promtool"
    found = str(here) if here.exists() else shutil.which("promtool")
    if not found:
        if not os.environ.get("CI"):
            pytest.skip("promtool is not there (`make setup`, or package prometheus)")
        raise FileNotFoundError("promtool")
    return found


def run(*args: object) -> str:
    r = subprocess.run(
        [promtool(), *map(str, args)], capture_output=True, text=True, check=False, timeout=120
    )
    assert r.returncode == 0, r.stdout + r.stderr
    return r.stdout + r.stderr


@cache
def recorded(name: str) -> Recording:
    return series.load((HERE / f"incidents/{name}.yaml").read_text())


def followed_by_calm(r: Recording, seconds: int) -> Recording:
    n = r.seconds
    marked = Recording(r.title, r.origin, {**r.marks, "last": n - LAST_S, "end": n}, r.series)
    return marked.stretched("last", "end", seconds)


def held(r: Recording) -> Recording:
    """Repeat what lies between a mark that begins with "held" and the next one, for each such."""
    for start in [m for m in r.marks if m.startswith("held") and m != "held to"]:
        after = min((at, m) for m, at in r.marks.items() if at > r.marks[start])[1]
        r = r.stretched(start, after, HELD_S)
    return r


def as_it_was(r: Recording) -> Recording:
    return r


@dataclass(frozen=True)
class Case:
    """An incident, and all alerts that fire at some time of it."""

    incident: str
    fire: set[str]
    change: Callable[[Recording], Recording] = as_it_was
    calm_s: int = CALM_S
    #: a host whose series end without a mark
    unmarked: str = ""
    every: int = SCRAPE_S

    def __str__(self) -> str:
        return f"{self.incident}-{self.change.__name__}"


def firing(at: int, expr: str, names: Iterable[str]) -> str:
    """Return a test of promtool: exactly these alerts."""
    samples = "".join(
        f"\n          - labels: '{{alertname=\"{n}\"}}'\n            value: 1"
        for n in sorted(names)
    )
    return (
        f"      - expr: {expr}\n        eval_time: {at}s\n        exp_samples:{samples or ' []'}\n"
    )


NOW = 'max by (alertname) (ALERTS{alertstate="firing"})'
EVER = 'max by (alertname) (max_over_time(ALERTS{alertstate="firing"}[9h]))'


def text_of(case: Case, phase: tuple[int, int]) -> str:
    """Return a test of promtool: the alerts fire, no other does, and none is left at the end."""
    r = followed_by_calm(case.change(recorded(case.incident)), case.calm_s)
    seen = r.scraped(case.every, dict(zip(HOSTS, phase, strict=True)))
    end = (r.seconds // case.every - 2) * case.every
    block = seen.input_series(case.unmarked).replace("\n", "\n    ").rstrip()
    tests = firing(end, EVER, case.fire) + firing(end, NOW, set())
    return f"  - interval: {case.every}s\n    {block}\n    promql_expr_test:\n{tests}"


def check(case: Case, phases: Iterable[tuple[int, int]], where: Path, rules: Path = RULES) -> None:
    head = f"rule_files: [{rules}]\nevaluation_interval: {case.every}s\ntests:\n"
    (where / "test.yml").write_text(head + "".join(text_of(case, p) for p in phases))
    run("test", "rules", where / "test.yml")


# ---- true durations, whenever the scrapes come

#: what clients hardly notice and nobody has to do anything about
ROUTINE = ["role-change", "role-change-compiling", "controller-restart", "standby-reboot"]


@pytest.mark.parametrize("name", ROUTINE)
def test_nothing_fires_at(name: str, tmp_path: Path) -> None:
    check(Case(name, set(), calm_s=60), PHASES, tmp_path)


def twice(r: Recording) -> Recording:
    return r.repeated(2)


def thrice(r: Recording) -> Recording:
    return r.repeated(3)


def test_protection_that_is_lost_again_and_again_is_told(tmp_path: Path) -> None:
    """What is repaired each time within the patience of the other alerts does not go unnoticed."""
    check(Case("sick-svm", {"ColoProtectionUnstable"}, thrice, 31 * 60), PHASES[:1], tmp_path)
    check(Case("sick-svm", set(), twice), PHASES[:1], tmp_path)


# ---- incidents

#: incident -> the alerts as long as it really lasted, and when it lasts for HELD_S
INCIDENTS: dict[str, tuple[set[str], set[str]]] = {
    "standby-reboot": (set(), {"ColoGuestAlone", "ColoControllerDown"}),
    "standby-stopped": (
        {"ColoOutputWaits"}, {"ColoOutputWaits", "ColoNotProtected", "ColoControllerDown"},
    ),
    "primary-dies": (set(), {"ColoGuestAlone", "ColoControllerDown"}),
    "primary-dies-manual": (
        set(), {"ColoActiveGuestUnknown", "ColoNotProtected", "ColoControllerDown"},
    ),
    "peer-link-pulled": (
        {"ColoDataPathNotWhole"},
        {"ColoDataPathNotWhole", "ColoHeartbeatLinkLost", "ColoNotProtected"},
    ),
    "control-channel-cut": (set(), {"ColoPeerLost", "ColoNotProtected"}),
    "lease-store-gone": (
        set(),
        {"ColoLeaseNotHeld", "ColoActiveGuestUnknown", "ColoOutputWaits", "ColoNotProtected",
         "ColoControllerDown"},
    ),
    "sick-svm": (set(), {"ColoGuestAlone", "ColoQemuLost"}),
    "checkpoint-storm": (set(), {"ColoCheckpointStorm", "ColoMismatchRateHigh"}),
    "mirror-silent": (set(), {"ColoGuestAlone", "ColoQemuLost"}),
    "mirror-behind": (set(), set()),
    "mirror-given-up": (set(), {"ColoNotProtected"}),
    "qemu-lost": (set(), {"ColoGuestAlone", "ColoQemuLost"}),
}  # fmt: skip
#: hosts that an agent of their own scrapes, and that die
AGENTS = ["primary-dies", "standby-reboot"]


@pytest.mark.parametrize("name", INCIDENTS)
def test_exactly_these_fire_and_all_clear(name: str, tmp_path: Path) -> None:
    real, long = INCIDENTS[name]
    check(Case(name, real), SOME_PHASES, tmp_path)
    check(Case(name, long, held), PHASES[:1], tmp_path)


def for_hours(r: Recording) -> Recording:
    return r.stretched("held", "mended", 7 * 3600)


def test_a_copy_that_takes_for_hours_is_told(tmp_path: Path) -> None:
    check(Case("mirror-behind", {"ColoDiskCopySlow"}, for_hours, every=60), PHASES[:1], tmp_path)


@pytest.mark.parametrize("name", AGENTS)
def test_a_dead_agent_does_not_make_its_host_alive(name: str, tmp_path: Path) -> None:
    """The series of its host are not marked as stale; their last values stay for 5 minutes."""
    host = HOSTS[name == "standby-reboot"]
    real, long = INCIDENTS[name]
    check(Case(name, real, unmarked=host), SOME_PHASES, tmp_path)
    check(Case(name, long, held, unmarked=host), PHASES[:1], tmp_path)


#: what is left out of the rules, an incident, the alert that is false then
FAULTS = [
    (" and on (pair) pair:colo_xdp_hosts:count == 2", "role-change-compiling",
     "ColoNoGuestTransmits"),
    ("and on (pair, instance) min by (pair, instance) (min_over_time(colo_xdp_active[5m])) == 1",
     "role-change", "ColoAddressConflict"),
    ("        for: 2m\n", "controller-restart", "ColoFramesDropped"),
    (" and time() - timestamp(colo_xdp_active) < 15", "primary-dies", "ColoBothGuestsTransmit"),
    ("        for: 5m\n", "role-change", "ColoGuestAlone"),
]  # fmt: skip


@pytest.mark.parametrize(("clause", "name", "alert"), FAULTS, ids=lambda x: x[:20])
def test_a_false_alarm_would_be_seen(clause: str, name: str, alert: str, tmp_path: Path) -> None:
    text = RULES.read_text()
    assert clause in text
    wrong = tmp_path / "alerts.yml"
    wrong.write_text(text.replace(clause, ""))
    case = Case(name, set(), calm_s=60, unmarked=HOSTS[0] if name == "primary-dies" else "")
    with pytest.raises(AssertionError, match=f'alertname="{alert}"'):
        check(case, PHASES[::3], tmp_path, wrong)


def table() -> str:
    """Return the table of docs/operator/alerts.md."""

    def names(alerts: set[str]) -> str:
        return ", ".join(f"[{n}](#{n.lower()})" for n in order if n in alerts) or "nothing"

    order = [a.name for a in alerts()]
    lines = ["| incident | as recorded | held |", "|---|---|---|"]
    for name in ROUTINE:
        if name not in INCIDENTS:
            lines.append(f"| {recorded(name).title.rstrip('.')} | nothing | |")
    for name, (real, long) in INCIDENTS.items():
        lines.append(f"| {recorded(name).title.rstrip('.')} | {names(real)} | {names(long)} |")
    return "\n".join(lines) + "\n"


# ---- the rules and the recordings


def test_promtool_finds_nothing_wrong_with_the_rules() -> None:
    assert "SUCCESS" in run("check", "rules", RULES)


def test_the_scrape_configuration_is_the_one_of_the_tests() -> None:
    path = ROOT / "deploy/prometheus/scrape.yml"
    assert "SUCCESS" in run("check", "config", "--syntax-only", path)
    assert f"scrape_interval: {SCRAPE_S}s" in path.read_text()


def test_each_recording_is_used_and_has_what_the_rules_read() -> None:
    """Counters that stayed zero are left out; everything else is there."""
    lease = {series.metric(s) for s in recorded("lease-store-gone").series}
    assert lease >= NEWER
    files = {p.stem for p in (HERE / "incidents").glob("*.yaml")}
    assert files == {*INCIDENTS, *ROUTINE}
    gauges = {m for m in rule_metrics() if not m.endswith("_total")} - NEWER
    for name in files:
        r = recorded(name)
        assert gauges <= {series.metric(s) for s in r.series}, name
        assert {series.instance(s) for s in r.series} == {*HOSTS}, name
        assert len({len(v) for v in r.series.values()}) == 1, name


@pytest.mark.parametrize(
    "values",
    [
        [1, 1, 1, 0, 0, None, None, 1],
        [None, None, 0.5, 0.07, 0.07, 3, 4, 5],
        [-1, -1, -1, None],
        [1e6, 1e6 + 3, 1e6 + 6, 0.04],
    ],
)
def test_what_is_written_is_what_is_read(values: series.Values) -> None:
    assert series.samples(series.notation(values)) == values
    r = Recording("Title.", "Origin.", {"a": 1}, {'m{instance="x"}': values})
    again = series.load(series.dump(r))
    assert (again.title, again.origin, again.marks, again.series) == (
        r.title, r.origin, r.marks, r.series,
    )  # fmt: skip


def test_stretched_counters_go_on_and_gauges_repeat() -> None:
    r = Recording(
        "", "", {"a": 1, "b": 3},
        {'n_total{instance="x"}': [0, 2, 5, 8, 8], 'g{instance="x"}': [0, 1, None, 3, 4]},
    ).stretched("a", "b", 4)  # fmt: skip
    assert r.series['n_total{instance="x"}'] == [0, 2, 5, 8, 11, 14, 14]
    assert r.series['g{instance="x"}'] == [0, 1, None, 1, None, 3, 4]
    assert r.marks == {"a": 1, "b": 5}
