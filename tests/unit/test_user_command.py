# SPDX-License-Identifier: GPL-2.0-or-later
"""The user's commands: in units of their own where systemd has started the controller."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from colo_xdp import user_command
from colo_xdp.failover.arbiter import FenceArbiter, Host
from colo_xdp.qemu.overlays import OverlayFiles, ReplicatedDisk
from colo_xdp.qemu.supervisor import QemuSupervisor

#: stands in for systemd-run: what it was asked for, and the command as systemd would start it
FAKE = """#!/usr/bin/python3
import os, pathlib, sys
pathlib.Path(__file__).with_name("asked").write_text("\\n".join(sys.argv[1:]) + "\\n")
argv = [a.replace("$$", "$") for a in sys.argv[sys.argv.index("--") + 1 :]]
os.execvp(argv[0], argv)
"""


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process is one that systemd has started."""
    monkeypatch.setattr(user_command, "BOOTED", tmp_path)
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/systemd/notify")
    monkeypatch.setenv("SYSTEMD_EXEC_PID", str(os.getpid()))
    monkeypatch.setenv("WATCHDOG_USEC", "3000000")
    monkeypatch.setenv("INVOCATION_ID", "0" * 32)
    monkeypatch.setenv("IPMI_PASSWORD", "of a drop-in")
    fake = tmp_path / "systemd-run"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def config(**keys: Any) -> Any:
    return SimpleNamespace(
        pair="web1",
        failover=SimpleNamespace(fence=keys.get("fence"), fence_timeout=30_000),
        qemu=SimpleNamespace(incoming=keys.get("incoming")),
    )


def asked(where: Path) -> list[str]:
    return (where / "asked").read_text().splitlines()


def fence(*argv: str) -> bool:
    host = cast(Host, SimpleNamespace(config=config(fence=argv)))
    return asyncio.run(FenceArbiter(host).fence())


def start_incoming(*argv: str) -> int | None:
    options = SimpleNamespace(pair="web1", incoming=argv)
    n = SimpleNamespace(options=options, _starting=None, _launching=False)
    asyncio.run(QemuSupervisor.start_incoming(cast(QemuSupervisor, n)))
    return cast(int, n._starting.returncode)


def test_a_fence_is_a_oneshot_unit_whose_result_counts(service: Path) -> None:
    assert fence("/bin/true")
    said = asked(service)
    assert "--property=Type=oneshot" in said and "--collect" in said
    assert "--property=TimeoutStartSec=30000ms" in said
    assert not fence("/bin/false")


def test_a_qemu_stays_in_a_unit_that_lives_on(service: Path) -> None:
    assert start_incoming("sh", "-c", "exit 3") == 3
    said = asked(service)
    assert "--property=Type=forking" in said and "--property=TimeoutStartSec=infinity" in said
    names = [x for x in said if x.startswith("--unit=colo-xdp-web1-incoming-")]
    assert len(names) == 1
    # or systemd would end the guest first when the host shuts down
    assert "--property=Before=colo-xdp-handover@web1.service" in said


def test_overlays_are_made_by_the_owner_of_their_directory(service: Path) -> None:
    (service / "o").mkdir()
    os.chown(service / "o", 12345, 12346)
    disk = ReplicatedDisk("d0", str(service / "o"), 1 << 20)
    files = OverlayFiles("web1", (disk,))
    active, hidden = asyncio.run(files.make(disk, 1 << 20))
    said = asked(service)
    assert "--property=User=12345" in said and "--property=Group=12346" in said
    assert "--property=Type=oneshot" in said and active.exists() and hidden.exists()
    asyncio.run(files.remove_all())
    assert not active.exists() and not hidden.exists()


def test_systemd_expands_nothing_in_the_command(service: Path) -> None:
    argv = user_command.fence("web1", ("sh", "-c", "echo $HOME $$"), 1000)
    assert argv[argv.index("--") + 1 :] == ["sh", "-c", "echo $$HOME $$$$"]


def test_the_units_own_variables_stay_with_the_controller(service: Path) -> None:
    out = service / "env"
    assert start_incoming("sh", "-c", f"env > {out}") == 0
    names = {line.split("=")[0] for line in out.read_text().splitlines()}
    assert not names & user_command.PRIVATE and "IPMI_PASSWORD" in names
    said = asked(service)
    assert "--setenv=IPMI_PASSWORD" in said and "--setenv=NOTIFY_SOCKET" not in said


@pytest.mark.parametrize("why", ["no systemd", "no notify", "of a process above"])
def test_else_they_are_started_directly(
    service: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    if why == "no systemd":
        monkeypatch.setattr(user_command, "BOOTED", service / "absent")
    elif why == "no notify":
        monkeypatch.delenv("NOTIFY_SOCKET")
    else:
        monkeypatch.setenv("SYSTEMD_EXEC_PID", "1")
    assert fence("/bin/true") and start_incoming("/bin/true") == 0
    assert not (service / "asked").exists()


def test_every_child_of_the_controller_is_started_by_way_of_it() -> None:
    """A command that is run in another way would be in the controller's sandbox again."""
    root = Path(user_command.__file__).parent
    r = subprocess.run(
        ["grep", "-lE", r"create_subprocess|subprocess\.|os\.(system|spawn|exec|posix_spawn)",
         *map(str, sorted(root.rglob("*.py")))],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    users = {str(Path(x).relative_to(root)) for x in r.stdout.split()} - {
        "tools/unit_facts.py",  # systemctl, for `doctor`
        "service/shutdown.py",  # systemctl, for `colo-xdp handover`: no controller
        "setup/running.py",  # virsh, for `colo-xdp init`: no controller
        "datapath/compiler.py",  # ours, and the sandbox is right for it
    }
    users = {x for x in users if not x.startswith("lab/")}
    assert users == {
        "qemu/supervisor.py", "qemu/overlays.py", "failover/arbiter.py", "service/examine.py",
    }  # fmt: skip
    for name in users:
        text = (root / name).read_text()
        assert text.count("create_subprocess_exec(") == text.count("env=user_command.environment()")
