# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands that show something, against a control socket that answers as a controller does."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from colo_xdp.cli import DEGRADED, FAILED, NOT_RUNNING, OK, USAGE, app, target, views
from colo_xdp.status.document import empty

EXAMPLE = Path(__file__).parents[3] / "deploy/examples/primary.toml"
run = CliRunner().invoke


class Served:
    """Answers each request by the handler of its command."""

    def __init__(self, path: Path) -> None:
        self.doc = empty("web1", "primary").to_json()
        self.doc.update(state="protected", reason="both guests are equal")
        self.doc["active"]["transmitting"] = True
        self.doc["peer"]["connected"] = True
        self.doc["if_peer_died"]["outcome"] = "goes_solo"
        self.handlers: dict[str, Callable[[dict[str, Any]], Any]] = {
            "status": lambda args: self.doc
        }
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self._s = socket.socket(socket.AF_UNIX)
        self._s.bind(str(path))
        self._s.listen(8)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                c, _ = self._s.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(c,), daemon=True).start()

    def _answer(self, c: socket.socket) -> None:
        with c, c.makefile("rwb") as f:
            request = json.loads(f.readline())
            name, args = request["command"], request["args"]
            self.asked.append((name, args))
            try:
                answer: Any = {"ok": True, "result": self.handlers[name](args)}
            except ValueError as e:
                answer = {"ok": False, "error": str(e)}
            f.write(json.dumps(answer).encode() + b"\n")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._s.shutdown(socket.SHUT_RDWR)  # accept() would keep it open
        self._s.close()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with one configured pair, whose sockets and events are not in the default places."""
    etc = tmp_path / "etc"
    etc.mkdir()
    (tmp_path / "run").mkdir()
    (etc / "web1.toml").write_text(
        f'{EXAMPLE.read_text()}\n[datapath]\nrun_dir = "{tmp_path}/run"\n'
        f'state_dir = "{tmp_path}/state"\n'
    )
    monkeypatch.setattr(target, "CONFIG_DIR", str(etc))
    monkeypatch.setattr(views, "BETWEEN_S", 0.01)
    monkeypatch.setattr(views, "FOLLOW_S", 0.01)
    return tmp_path


@pytest.fixture
def served(here: Path) -> Iterator[Served]:
    s = Served(here / "run/web1.primary.sock")
    yield s
    s.close()


def test_a_pairs_name_leads_to_its_configuration(served: Served, here: Path) -> None:
    r = run(app, ["status", "web1", "--run-dir", str(here / "elsewhere")])
    assert r.exit_code == OK and "web1 primary: protected" in r.output, r.output
    assert [name for name, _ in served.asked] == ["status", "status"], "two looks, for the rates"
    r = run(app, ["status", "web1", "--json", "--run-dir", str(here / "elsewhere")])
    assert json.loads(r.output)["if_peer_died"]["sentence"] and len(served.asked) == 3
    served.doc["state"] = "degraded"
    assert run(app, ["status", "web1", "--run-dir", str(here / "run")]).exit_code == DEGRADED
    assert run(app, ["status", "web9", "--run-dir", str(here / "run")]).exit_code == NOT_RUNNING


def test_watch_goes_on_while_the_controller_is_away(
    served: Served, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    naps = 0

    def sleep(s: float) -> None:
        nonlocal naps
        naps += 1
        if naps == 2:
            served.close()
            (here / "run/web1.primary.sock").unlink()
        if naps == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(views.time, "sleep", sleep)
    r = run(app, ["status", "web1", "--watch"])
    assert r.exit_code == OK and r.output.count("web1 primary: protected") == 2, r.output
    assert r.output.count("no controller answers") == 2


def test_list(served: Served, here: Path) -> None:
    r = run(app, ["list", "--run-dir", str(here / "run")])
    assert r.exit_code == OK and "protected: either host may fail" in r.output
    doc = json.loads(run(app, ["list", "--json", "--run-dir", str(here / "run")]).output)
    assert [(x["pair"], x["status"]["state"]) for x in doc] == [("web1", "protected")]
    served.close()
    r = run(app, ["list", "--run-dir", str(here / "run")])
    assert "no controller runs; configured in" in r.output


def test_nothing_to_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "CONFIG_DIR", str(tmp_path))
    r = run(app, ["list", "--run-dir", str(tmp_path)])
    assert r.exit_code == OK and "no pair" in r.output


def told(here: Path, name: str, *times: float) -> None:
    path = here / name / "web1.primary.events.jsonl"
    path.parent.mkdir(exist_ok=True)
    lines = [{"t": t, "kind": "state", "role": "primary", "state": "solo", "why": f"at {t:.0f}"}
             for t in times]  # fmt: skip
    with path.open("a") as f:
        f.writelines(json.dumps(x) + "\n" for x in lines)


def test_events_need_no_controller(here: Path) -> None:
    now = time.time()
    told(here, "state", now - 9000, now - 5)
    told(here, "run", now - 100)  # of a time when the state directory could not be written
    r = run(app, ["events"])
    assert r.exit_code == OK, r.output
    lines = r.output.splitlines()
    assert len(lines) == 3 and f"at {now - 100:.0f}" in lines[1]
    assert "the primary guest goes on alone: at" in lines[0]
    for where in (["web1"], [str(here / "etc/web1.toml")]):
        assert run(app, ["events", *where]).output == r.output
    assert len(run(app, ["events", "--since", "2h"]).output.splitlines()) == 2
    doc = [json.loads(x) for x in run(app, ["events", "--json"]).output.splitlines()]
    assert [x["t"] for x in doc] == sorted(x["t"] for x in doc) and len(doc) == 3
    assert run(app, ["events", "--since", "soon"]).exit_code == USAGE


def test_events_follow(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told(here, "state", 1.0)
    naps = 0

    def sleep(s: float) -> None:
        nonlocal naps
        naps += 1
        if naps == 3:
            raise KeyboardInterrupt
        told(here, "state", 1.0 + naps)

    monkeypatch.setattr("time.sleep", sleep)
    from colo_xdp.service import event_log

    monkeypatch.setattr(event_log.follow, "__defaults__", (sleep,))
    r = run(app, ["events", "--follow"])
    assert r.exit_code == OK
    assert [x.rpartition(" ")[2] for x in r.output.splitlines()] == ["1", "2", "3"]


def test_events_of_a_pair_without_a_file_here(served: Served, here: Path) -> None:
    """Its controller says where they are."""
    (here / "etc/web1.toml").unlink()
    told(here, "state", 7.0)
    served.doc["event_log"]["path"] = str(here / "state/web1.primary.events.jsonl")
    r = run(app, ["events", "web1", "--run-dir", str(here / "run")])
    assert r.exit_code == OK and "at 7" in r.output
    assert run(app, ["events", "--run-dir", str(here / "none")]).exit_code == NOT_RUNNING


def test_events_that_cannot_be_read(here: Path) -> None:
    (here / "state/web1.primary.events.jsonl").mkdir(parents=True)
    r = run(app, ["events"])
    assert r.exit_code == FAILED and "web1.primary.events.jsonl" in r.output


def test_flows(served: Served) -> None:
    doc = {"flows": [], "matched": 0, "seen": 4, "whole": True}
    served.handlers["flows"] = lambda args: doc
    args = ["--sort", "wait", "--proto", "tcp", "--port", "80", "--peer", "::1", "--limit", "7"]
    r = run(app, ["flows", "web1", *args])
    assert r.exit_code == OK and "waits ms" in r.output
    assert served.asked == [
        ("flows", {"sort": "wait", "proto": "tcp", "port": 80, "peer": "::1", "limit": 7})
    ]
    assert json.loads(run(app, ["flows", "web1", "--json"]).output) == doc
    assert run(app, ["flows", "web1", "--limit", "0"]).exit_code == USAGE
    assert run(app, ["flows", "web1", "--sort", "name"]).exit_code == USAGE


@pytest.mark.parametrize(
    "command",
    [["failover", "web1", "--yes"], ["switchover", "web1"], ["checkpoint", "web1"],
     ["demote", "web1", "--yes"], ["mode", "paused", "--config", "web1"]],
)  # fmt: skip
def test_progress_goes_to_stderr_if_it_is_wanted(
    served: Served, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    from colo_xdp.service import progress

    monkeypatch.setattr(progress.watched, "__kwdefaults__", {"after_s": 0.05, "every_s": 0.05})

    def slow(args: dict[str, Any]) -> dict[str, Any]:
        if args.get("dry_run"):
            return {"steps": ["fence"], "done": False}
        if progress_wanted:  # until its second look: the first one is said by then
            before, end = len(served.asked), time.monotonic() + 10
            while len(served.asked) < before + 2 and time.monotonic() < end:
                time.sleep(0.01)
        else:
            time.sleep(0.2)
        return {"steps": [], "done": True, "state": "solo", "reason": "alone", "epoch": 8,
                "pause_ms": 5.0, "total_ms": 9.0, "mode": "paused"}  # fmt: skip

    served.handlers[command[0]] = slow
    said = re.compile(rf"{command[0]}, \d+ s: protected: both guests are equal")
    progress_wanted = True
    r = run(app, [*command, "--progress"])
    assert r.exit_code == OK and said.search(r.stderr) and not said.search(r.stdout)
    progress_wanted = False
    for quiet in ([], ["--no-progress"]):
        r = run(app, [*command, *quiet])
        assert r.exit_code == OK and not said.search(r.output), "stderr is no terminal here"
