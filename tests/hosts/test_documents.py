# SPDX-License-Identifier: GPL-2.0-or-later
"""Do what docs/operator/quickstart.md says, from its top to its bottom, on two bare hosts.

Each command is run as it stands there, on the host that is named, and what is seen there has to be
seen. The tables below are everything that is done otherwise. From the moment at which the pair is
protected, a client has one connection through all of it.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from colo_xdp import __version__
from colo_xdp.lab import disk
from colo_xdp.lab.client import EchoStream
from colo_xdp.lab.net import LabError, sh, wait_for
from tests.deploy.test_sandbox import documented
from tests.docs.commands import CLONE, ByHand, Run, Step, steps, unseen

from . import root as roots
from .bare import Bare, etc
from .conftest import BUILD
from .host import CLIENT, Host
from .pair import CONTROLLER, PROTECT_S

PAGE = roots.ROOT / "docs/operator/quickstart.md"
STEPS = steps(PAGE.read_text())
COMMAND_S = 300.0
#: a person repeats these until they say what the page says
LOOKS = re.compile(r"colo-xdp (status|list)\b")
HOST_ENDS = re.compile(r"systemctl (reboot|poweroff)")
COPIES = re.compile(r"scp (\S+) host([ab]):")
GAP_S = 20.0  # without an answer, on a machine that may have other work to do
LONGEST_S = {"11. Upgrade the package": 2.0}  # no more than a lost frame costs
ECHO_S = 0.05
QEMU = "qemu-system-x86_64.*-qmp"
IMAGE_MIB = 64

# ---- what is not as the page says

#: a guest of this lab in place of an operator's: it has its kernel beside it, and a small disk
GUEST = (
    "--memory 128 --accel {accel} --cpu {cpu} --qemu-arg -kernel --qemu-arg /share/vmlinuz "
    "--qemu-arg -initrd --qemu-arg /share/initrd.gz "
    "--qemu-arg -append --qemu-arg 'console=ttyS0 quiet panic=1' "
    "--qemu-arg -chardev --qemu-arg file,id=s0,path=/run/colo-vm/{pair}/console "
    "--qemu-arg -serial --qemu-arg chardev:s0"
)
SUBSTITUTES = {
    "--memory 4G --cpus 2": GUEST.replace("{pair}", "web1"),
    "--memory 1G": GUEST.replace("{pair}", "web2"),
    "web1.qcow2 20G": f"web1.qcow2 {IMAGE_MIB}M",
    "web2.qcow2 10G": f"web2.qcow2 {IMAGE_MIB}M",
}
#: what a person's hands do
BY_HAND: dict[str, Callable[[Documents], None]] = {
    "Cut the power of hosta": lambda p: p.power_off(p.a),
    "Cut the power of hostb": lambda p: p.power_off(p.b),
    "Switch hosta on": lambda p: p.power_on(p.a),
    "Switch hostb on": lambda p: p.power_on(p.b),
}
#: Checks of this host that the lab cannot pass: it does not run Debian's kernel.
FAILS_HERE = "FAIL  kernel headers"


class Documents(Bare):
    """Two hosts as the page assumes them, and their clients."""

    def _install(self, h: Host) -> None:
        """Fetch what the package depends on: the booted hosts have no way to Debian's archive."""
        if h is self.a:
            roots.install_package(h.root, roots.package(), "--download-only")
            return
        for f in (h.root / "etc/dpkg/dpkg.cfg.d").glob("*mmdebstrap*"):
            f.unlink()
        for part in ("var/lib/apt/lists", "var/cache/apt/archives"):
            shutil.copytree(self.a.root / part, h.root / part, dirs_exist_ok=True)

    def _files(self, h: Host, other: str, keys: Path) -> None:
        super()._files(h, other, keys)
        # nobody is there to press y, and this machine has few resources
        h.write("/etc/apt/apt.conf.d/90lab",
                'APT::Get::Assume-Yes "true";\nAPT::Install-Recommends "false";\n')  # fmt: skip
        h.write("/etc/hosts", "127.0.0.1 localhost\n192.0.2.1 hosta\n192.0.2.2 hostb\n")
        key = self.dir / "ssh"
        if not key.exists():
            sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
        own = (h.root / "etc/ssh/ssh_host_ed25519_key.pub").read_text().split()
        public = key.with_suffix(".pub").read_text()
        for name, text in (
            ("id_ed25519", key.read_text()), ("authorized_keys", public),
            ("known_hosts", f"hosta,hostb {own[0]} {own[1]}\n"),
        ):  # fmt: skip
            h.write(f"/root/.ssh/{name}", text, 0o600)
        if h is self.a:
            for name in ("web1", "web2"):
                image = h.root / f"var/lib/vm/{name}.qcow2"
                image.parent.mkdir(parents=True, exist_ok=True)
                disk.make_filesystem(image, IMAGE_MIB)

    def host(self, name: str) -> Host:
        return self.a if name == "hosta" else self.b

    def copy_to(self, h: Host, file: Path) -> None:
        """Put a file into /root of a host: the clone is in none of its networks."""
        shutil.copy(file, h.inside("/root"))


@dataclass
class Visit:
    """What is known from one step to the next."""

    pair: Documents
    echo: EchoStream | None = None
    broken: str = ""  # the step that failed
    rows: list[str] = field(default_factory=list)
    before: dict[str, dict[str, str]] = field(default_factory=dict)  # files of the hosts
    qemus: dict[str, list[int]] = field(default_factory=dict)

    # ---- doing

    def do(self, step: Step) -> None:
        p, began = self.pair, time.time()
        p.forget_fences()
        PREPARE.get(step.title, lambda v: None)(self)
        for doing in step.doings:
            if isinstance(doing, ByHand):
                BY_HAND[doing.what](p)
                continue
            if len(doing.where) == 1:  # not in a thread: a host that boots there would end with it
                self._run(doing, doing.where[0])
            else:
                with ThreadPoolExecutor() as pool:
                    list(pool.map(partial(self._run, doing), doing.where))
        took = time.time() - began
        cuts = [d.what[-1] for d in step.doings if isinstance(d, ByHand) and "Cut" in d.what]
        fences = list(dict.fromkeys(p.fences))  # one that came too early is repeated
        assert fences == [f"host{'b' if host == 'a' else 'a'}" for host in cuts]
        CHECKS.get(step.title, lambda v: None)(self)
        self._listen(step, began, took)

    def _run(self, run: Run, where: str) -> None:
        said = ""
        for command in run.commands:
            if where == CLONE:
                self._in_clone(command)
                continue
            h = self.pair.host(where)
            if m := HOST_ENDS.fullmatch(command):
                self._end(h, m[1])
            elif LOOKS.match(command):
                said = self._look(h, command, run.seen)
            else:
                said += self._command(h, command)
        missing = unseen(run.seen, said)
        assert not missing, f"line {run.line}, on {where}: no {missing[0]!r} in\n{said}"

    def _in_clone(self, command: str) -> None:
        if command == "make deb":
            roots.package()
        elif m := COPIES.fullmatch(command):
            self.pair.copy_to(self.pair.host(f"host{m[2]}"), roots.ROOT / m[1])
        else:
            pytest.fail(f"who runs {command!r} in a clone?")

    def _end(self, h: Host, how: str) -> None:
        h.shut_down(how)
        if how == "reboot":
            h.boot()
            h.booted()
        else:
            (self.pair.exchange / f"off-{h.name}").touch()

    def _command(self, h: Host, command: str) -> str:
        code, said = h.shell(self.here(command), COMMAND_S)
        wrong = [x for x in said.splitlines() if x.startswith("FAIL")]
        if code and wrong and command.startswith("colo-xdp doctor"):
            assert all(x.startswith(FAILS_HERE) for x in wrong), said
            return said
        assert not code, f"host{h.name}: {command}: exit status {code}\n{said}"
        return said

    def _look(self, h: Host, command: str, wanted: list[str]) -> str:
        said = ""

        def seen() -> bool:
            nonlocal said
            _, said = h.shell(command, COMMAND_S)
            return not unseen(wanted, said)

        try:
            wait_for("what the page says", seen, PROTECT_S, poll=0.2)
        except LabError as e:
            raise LabError(f"{e}: {command} on host{h.name} says\n{said}") from e
        return said

    def here(self, command: str) -> str:
        """Return a command as the lab runs it."""
        cpu = "max" if self.pair.accel == "tcg" else "host"
        for old, new in SUBSTITUTES.items():
            command = command.replace(old, new.format(accel=self.pair.accel, cpu=cpu))
        return command

    # ---- looking

    def _listen(self, step: Step, began: float, took: float) -> None:
        """Check the connection since then, and note what the step has cost it."""
        row = f"{step.title:<40} {step.minutes:>3} min {took:>6.1f} s"
        if self.echo is not None:
            st = self.echo.stats
            seen = len(st.answered_at)
            wait_for("answers", lambda: len(st.answered_at) > seen + 10 or st.dead, GAP_S * 2)
            assert not st.dead and not st.wrong, (st.dead, st.wrong, st.odd)
            since = [t for t in st.answered_at if t >= began - 1]
            gap = max((b - a for a, b in pairwise(since)), default=0.0)
            row += f" {gap * 1e3:>7.0f} ms {st.received:>9} bytes"
            assert gap < LONGEST_S.get(step.title, GAP_S), row
        self.rows.append(row)

    def connect(self) -> None:
        """Open the connection that lives from now on."""
        self.pair.wait_guest("/run/colo-vm/web1/console")
        self.echo = EchoStream(CLIENT, period=ECHO_S)


# ---- beside what the page says


def _sandboxed(h: Host, guest: str) -> None:
    """The units' sandboxes are no wider than documented, as systemd has them in force."""
    for unit, name in ((CONTROLLER, "colo-xdp"), (guest, "colo-qemu")):
        most = documented(f"`{name}@.service`")
        # fails if it is above
        h.run("systemd-analyze", "security", "--no-pager", f"--threshold={most}", unit)
    pid = h.show(CONTROLLER, "MainPID")["MainPID"]
    seen = h.run("nsenter", "-t", pid, "-m", "--", "ls", "/dev", "/dev/net").split()
    assert "tun" in seen and not {"kvm", "mem", "kmsg", "fuse"} & {*seen}
    with pytest.raises(LabError, match="Read-only file system"):
        h.run("nsenter", "-t", pid, "-m", "--", "touch", "/etc/colo-xdp/written")


def _protected(v: Visit) -> None:
    """The pair as `init` has made it, on hosts on which nothing else has gone wrong."""
    p = v.pair
    assert "master br0" in p.a.run("ip", "link", "show", "tap-web1")
    assert "master" not in p.b.run("ip", "link", "show", "tap-web1")
    for h in p.hosts:
        assert h.run("systemctl", "is-system-running").strip() == "running"
        # each controller lets systemd run the doctor of its host, outside its own sandbox
        said = h.run("colo-xdp", "doctor", "--peer", "--json", "/etc/colo-xdp/web1.toml",
                     check=False, timeout=90)  # fmt: skip
        doc = json.loads(said)
        assert doc["peer"] is not None, doc["both"]
        assert {doc["role"], doc["peer"]["role"]} == {"primary", "secondary"}
        for report in (doc, doc["peer"]):
            found = {c["key"]: c for c in report["checks"]}
            wrong = [c for c in report["checks"] if c["level"] == "fail"]
            assert all(c["key"] == "kernel headers" for c in wrong), wrong
            for key in ("unit", "QEMU", "other host", "heartbeats", "data path", "migration"):
                assert found[key]["level"] == "ok", found[key]
    _sandboxed(p.a, "colo-qemu@web1.service")
    _sandboxed(p.b, "colo-qemu-incoming@web1.service")
    assert not p.fences
    v.connect()


def _roles_as_before(v: Visit) -> None:
    """`incoming` of init has started both guests, and ended those that were there before."""
    for h in v.pair.hosts:
        (qemu,) = h.pids(QEMU)
        assert h.unit_of(qemu) == "colo-qemu-incoming@web1.service"
    assert v.pair.a.show("colo-qemu@web1", "ActiveState") == {"ActiveState": "inactive"}
    assert v.pair.status(v.pair.a)["role"] == "primary"


def _next_version(v: Visit) -> None:
    """Make the version to which the page upgrades, with another program."""
    program = "usr/lib/colo-xdp/colo_xdp/_bpf_src/primary.bpf.c"

    def change(tree: Path) -> None:
        (tree / program).write_text((tree / program).read_text() + "\n/* the next version */\n")

    name = f"colo-xdp_{__version__}-2_all.deb"
    deb = roots.repack(roots.package(), v.pair.exchange / name, f"{__version__}-2", change)
    for h in v.pair.hosts:
        v.pair.copy_to(h, deb)
        v.qemus[h.name] = h.pids(QEMU)


def _upgraded(v: Visit) -> None:
    """The controllers are new, have not compiled, and nothing else was restarted."""
    for h in v.pair.hosts:
        assert h.pids(QEMU) == v.qemus[h.name]
        assert h.show(CONTROLLER, "NRestarts", "ActiveState") == {
            "NRestarts": "0", "ActiveState": "active"
        }  # fmt: skip
        own = h.journal(CONTROLLER)
        assert not re.search(r"compiled \S+ in ", own[own.rindex("Deactivated successfully") :])
    assert "the peer's controller stops on purpose" in v.pair.a.journal(CONTROLLER)


def _before_the_second_pair(v: Visit) -> None:
    v.before = {h.name: traces(h) for h in v.pair.hosts}


def _second_pair(v: Visit) -> None:
    """Nothing of the first one has changed."""
    for h in v.pair.hosts:
        now = traces(h)
        assert {k: now.get(k) for k in v.before[h.name]} == v.before[h.name]
        assert all("web2" in k for k in now if k not in v.before[h.name])
        assert len(h.pids(QEMU)) == 2


def _second_pair_is_gone(v: Visit) -> None:
    """Everything is as it was before it came, and no guest of it runs."""
    for h in v.pair.hosts:
        assert traces(h) == v.before[h.name]
        assert len(h.pids(QEMU)) == 1
        assert "quickack 1" in h.run("ip", "route", "get", f"192.0.2.{3 - h.number}")


def traces(h: Host) -> dict[str, str]:
    """Return what there is of pairs on a host: files, units that are enabled, devices, pins."""
    links = h.run("ip", "-brief", "link").splitlines()
    devices = {x.split()[0].partition("@")[0]: "device" for x in links}
    pins = h.run("find", "/sys/fs/bpf", "-maxdepth", "2", "-mindepth", "2").split()
    wants = h.run("find", "/etc/systemd/system", "-type", "l").split()
    return {**etc(h), **devices, **dict.fromkeys(pins, "pin"), **dict.fromkeys(wants, "link")}


PREPARE: dict[str, Callable[[Visit], None]] = {
    "11. Upgrade the package": _next_version,
    "13. Add a second pair": _before_the_second_pair,
}
CHECKS: dict[str, Callable[[Visit], None]] = {
    "5. Look": _protected,
    "6. Change the roles, there and back": _roles_as_before,
    "11. Upgrade the package": _upgraded,
    "13. Add a second pair": _second_pair,
    "14. Remove a pair": _second_pair_is_gone,
}


# ---- the tests


@pytest.fixture(scope="module")
def pair() -> Iterator[Documents]:
    p = Documents(BUILD)
    try:
        p.up()
        yield p
    finally:
        p.down()


@pytest.fixture(scope="module")
def visit(pair: Documents, request: pytest.FixtureRequest) -> Iterator[Visit]:
    """Provide the hosts for all steps, and print in the end what each has cost."""
    v = Visit(pair)
    try:
        yield v
    finally:
        if v.echo is not None:
            v.echo.stop()
        head = f"{'step':<40}  person  machine  longest gap, bytes so far"
        capture = request.config.pluginmanager.get_plugin("capturemanager")
        with capture.global_and_fixture_disabled():
            print("", head, *v.rows, sep="\n")


def test_nothing_is_done_otherwise_for_no_reason() -> None:
    """Each entry of the tables above is about something that the page has."""
    doings = [d for s in STEPS for d in s.doings]
    commands = "\n".join(c for d in doings if isinstance(d, Run) for c in d.commands)
    for old in SUBSTITUTES:
        assert commands.count(old) == 1, old
    assert {d.what for d in doings if isinstance(d, ByHand)} == set(BY_HAND)
    assert {s.title for s in STEPS} >= {*PREPARE, *CHECKS, *LONGEST_S}
    assert f"colo-xdp_{__version__}-1_all.deb" in commands


@pytest.mark.parametrize("step", STEPS, ids=lambda s: s.title)
def test_a_step_of_the_page(visit: Visit, pair: Documents, step: Step) -> None:
    if visit.broken:
        pytest.skip(f"{visit.broken} has failed")
    visit.broken = step.title
    visit.do(step)
    visit.broken = ""
