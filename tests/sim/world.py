# SPDX-License-Identifier: GPL-2.0-or-later
"""Simulate a pair, its client and its network in virtual time, and check invariants from outside.

Both controllers are the product's own, on a loop whose time jumps from event to event. `Scene`
holds everything that chance decides for a run; the same scene gives the same run.

Checked are: at each frame of the PVM that reaches the network, that the SVM of this moment has sent
the same (I1, I2, I3, and the windows); that no more than one guest transmits, and the SVM only
after a takeover (I6); checksums; at the end, that what the client received and had acknowledged is
what the survivor believes (I8), that all clients got their answers (I4), that nothing is held and
every queue is within its limits (I10).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from colo_xdp.abi import Mode
from colo_xdp.config.file import Config, load
from colo_xdp.config.qemu import Disk, Nbd
from colo_xdp.controller import (
    checkpoint_coordinator,
    colo_entry,
    commands,
    device_watch,
    guest_lifecycle,
    handover,
    heartbeats,
    mirror_watch,
    primary,
    pvm_output,
    replacement,
    secondary,
    secondary_disks,
    secondary_entry,
    shadow,
    switchover,
    takeover,
    ticker,
)
from colo_xdp.controller import controller as controller_module
from colo_xdp.datapath import conntrack_map, offload_maps
from colo_xdp.failover import arbiter, states
from colo_xdp.failover import lease as lease_module
from colo_xdp.failover.states import State
from colo_xdp.offload import scheduler
from colo_xdp.qemu import mirrors, overlays, replica, supervisor
from colo_xdp.qemu.disks import DiskError
from colo_xdp.qemu.qmp import QmpTimeout

from .channel import SimHeartbeatLinks, SimPeer
from .clock import FakeTime, VirtualLoop
from .datapath import SimDataPath
from .guest import Client, Guest, Plan
from .host import Side
from .mark import SimMarkFile
from .offload_model import Bpf
from .process import Killed, Process
from .qemu import SimQmp
from .store import SimStore, Witness
from .tcp import FIN, RST, SYN, BadChecksum, Tcp, diff, read

EXAMPLES = Path(__file__).parents[2] / "deploy/examples"
SETTLE_MS = 15_000
TICK_MS = 20
MAX_FRAMES = 20_000
PATIENCE_MS = 30_000  # until a pair must be protected again
ENTER_STOP_MS = 800
WRITE_SLACK_MS = 500  # beside nbd.write_timeout: looks, and a QMP command that waits
PATIENCE_TICKS = 8  # until something that waits for too long must have been noticed
TS_SLACK = 1000  # ms by which the clock in a held frame may lag behind the guest's


def _holds_nothing(side: Side) -> bool:
    """Its controller is a primary's, in shadow mode."""
    c = side.controller
    return isinstance(c, primary.Primary) and c.output.nics[0].engine.shadow


class _Excused(Exception):
    """What follows is a known limitation: the run ends."""


class Violation(AssertionError):
    """An invariant was broken, or the product failed by itself."""


@dataclass(frozen=True)
class Fault:
    """At `at` ms something breaks; what can heal does so after `span` ms."""

    at: int
    kind: str
    span: int = 0
    #: its time counts from when the pair was protected again after the faults of the previous round
    round: int = 0


#: faults that leave the pair intact once they have healed
HEALING = (
    "kill_p_controller", "kill_s_controller", "cut_channel", "cut_link", "lose_events",
    "checkpoint", "hang_p_qemu", "shadow", "reload", "flip_p", "flip_s",
)  # fmt: skip
#: cuts of the three-node graph: both hosts and the lease's store
#: "_out": only what that host sends is lost, "_in": only what it gets
CUTS = (
    "cut_ps", "cut_pe", "cut_pe_out", "cut_pe_in", "cut_se", "cut_se_out", "cut_se_in",
    "cut_p", "cut_s", "cut_e", "cut_channel", "cut_link",
)  # fmt: skip
#: faults that end the pair: one guest has to run standalone
ENDING = (
    "kill_p_qemu", "kill_s_qemu", "kill_p_host", "kill_s_host", "power_p", "power_s", "failover",
    "kill_p_in_checkpoint", "kill_p_qemu_in_checkpoint", "cut_colo",
)  # fmt: skip


#: "pvm", "svm": whichever guest that is by then. One of these ends a pair, and a new one is created
ROUNDS = (
    "kill_pvm_qemu", "kill_pvm_qemu", "kill_pvm_host", "power_pvm", "kill_pvm_in_checkpoint",
    "kill_svm_qemu", "kill_svm_host", "power_svm", "failover_pvm", "failover_svm", "switchover",
    "switchover", "cut_colo", "demote_pvm", "demote_svm",
)  # fmt: skip
#: what goes wrong while it is being created
HINDRANCES = (
    "kill_p_controller", "kill_s_controller", "kill_p_controller", "kill_s_controller",
    "cut_channel", "cut_link", "lose_events", "checkpoint", "kill_waiting_qemu", "cut_colo",
    "hang_pvm_qemu", "flip_pvm", "flip_svm", "trap", "trap",
)  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """All parameters of one run."""

    seed: int
    conns: int = 4
    loss: float = 0.01  # client's network, in either direction
    dup: float = 0.01
    jitter: float = 1.0  # ms
    link_loss: float = 0.005
    link_jitter: float = 0.3
    odd: float = 0.0  # share of requests that the guests answer differently
    odd_udp: bool = False
    udp: int = 0  # datagrams of the client; 0: some
    ring: int = 4000
    queue: int = 1024
    compare_timeout: int = 150
    faults: tuple[Fault, ...] = ()
    lease: bool = False  # the arbiter; else a fence
    fast: bool = True  # the fast path decides, too
    buffers: int = 16
    eager: bool = False  # connections are offloaded as soon as allowed
    manual: bool = False  # the operator is the arbiter
    # a standalone guest gets a new secondary, in whichever role its host started
    roles: bool = False
    datagrams: bool = True  # heartbeats on the peer link, too
    disk: bool = False  # the guest has a disk, and confirms what it has written
    mark_ms: int = 0  # how long the mark takes to be on the disk
    rude: bool = False  # servers close while their clients still send
    wait: int = 0  # the wait is adaptive, with this floor (ms); 0: it is fixed

    def calm(self) -> bool:
        """Return whether nothing in the scene is a reason for an unrequested checkpoint."""
        kinds = {f.kind for f in self.faults}
        lossless = not self.loss and not self.link_loss
        lossless &= not self.odd and not self.odd_udp and not self.rude
        roomy = self.ring > 1000 and self.queue > 1000 and self.compare_timeout >= 400
        roomy &= self.link_jitter < 10  # ms that a datagram without a match may wait
        return lossless and roomy and kinds <= {"checkpoint", "reload"}

    def to_json(self) -> str:
        """Return one line; `from_json` parses it."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Scene:
        raw = json.loads(text)
        raw["faults"] = tuple(Fault(**f) for f in raw["faults"])
        return cls(**raw)


def scene(seed: int) -> Scene:
    """Return a random scene; in one of eight, a guest or a person also does something to QEMU."""
    rnd, s = random.Random(seed * 86_028_121 + 7), _network_scene(seed)
    if rnd.random() > 0.125 or s.calm():
        return s
    kind = rnd.choice(("poweroff", "reset_p", "reset_s", "stop_p", "stop_s", "entry_completed",
                       "entry_stuck"))  # fmt: skip
    at = 0 if kind.startswith("entry") else rnd.randrange(60, 1000)
    return replace(s, faults=tuple(sorted([*s.faults, Fault(at, kind)], key=lambda f: f.at)))


def adaptive(s: Scene) -> Scene:
    """Return the scene, with an adaptive wait in one of four.

    It draws from numbers of its own, so that the other scenes stay as they are.
    """
    rnd = random.Random(s.seed * 49_979_687 + 9)
    if rnd.random() >= 0.25:
        return s
    # a floor below the lag of a calm scene would make checkpoints there
    return replace(s, wait=50 if s.calm() else rnd.choice((5, 20, 50)))


def _network_scene(seed: int) -> Scene:
    """Choose the network; in three of four scenes the fast path decides, with few buffers or
    many."""
    rnd = random.Random(seed * 104_729 + 2)
    fast, buffers, eager = rnd.random() < 0.75, rnd.choice((1, 4, 16)), rnd.random() < 0.5
    s = replace(_scene(seed), fast=fast, buffers=buffers, eager=eager)
    s = _stopped(replace(s, datagrams=rnd.random() < 0.7))
    if not s.datagrams or s.calm() or rnd.random() < 0.7:
        return s
    # only the control channel is cut, for long, and perhaps one side receives no heartbeats either
    faults = [Fault(rnd.randrange(60, 900), "cut_channel", rnd.choice((600, 1500, 4000)))]
    if rnd.random() < 0.4:
        kind = rnd.choice(("deafen_p", "deafen_s"))
        faults.append(Fault(rnd.randrange(60, 1500), kind, rnd.choice((100, 600, 3000))))
    return replace(s, faults=tuple(sorted([*s.faults, *faults], key=lambda f: f.at)))


def _stopped(s: Scene) -> Scene:
    """Stop a controller in one of eight scenes, for a while or for longer than dead_after."""
    rnd = random.Random(s.seed * 86_028_121 + 8)
    if s.calm() or rnd.random() >= 0.125:
        return s
    kind = rnd.choice(("stop_p_controller", "stop_s_controller"))
    stop = Fault(rnd.randrange(100, 900), kind, rnd.choice((5, 300, 1500, 4000)))
    return replace(s, faults=tuple(sorted([*s.faults, stop], key=lambda f: f.at)))


def _scene(seed: int) -> Scene:
    rnd = random.Random(seed * 7919 + 1)
    faults = [
        Fault(rnd.randrange(60, 900), rnd.choice(HEALING), rnd.choice((5, 60, 250, 700)))
        for _ in range(rnd.choice((0, 0, 1, 1, 2, 3)))
    ]
    if rnd.random() < 0.5:
        faults.append(Fault(rnd.randrange(100, 1100), rnd.choice(ENDING)))
    if rnd.random() < 0.15:  # honest guests, a good network: see Scene.calm
        kinds = ("checkpoint", "checkpoint", "reload")
        faults = [Fault(rnd.randrange(60, 900), rnd.choice(kinds)) for _ in range(rnd.randrange(3))]
        return Scene(
            seed, conns=rnd.choice((1, 3, 6)), loss=0, dup=0, jitter=rnd.choice((0.0, 1.0)),
            link_loss=0, link_jitter=rnd.choice((0.0, 0.3, 3.0)), compare_timeout=600,
            faults=tuple(sorted(faults, key=lambda f: f.at)),
        )  # fmt: skip
    return Scene(
        seed,
        conns=rnd.choice((1, 2, 5)),
        loss=rnd.choice((0, 0, 0.01, 0.05)),
        dup=rnd.choice((0, 0, 0.02)),
        jitter=rnd.choice((0.0, 0.5, 4.0)),
        link_loss=rnd.choice((0, 0, 0, 0.01)),
        link_jitter=rnd.choice((0.0, 0.3, 3.0, 15.0)),
        odd=rnd.choice((0, 0, 0.1, 0.4)),
        odd_udp=rnd.random() < 0.2,
        ring=rnd.choice((4000, 4000, 4000, 30)),
        queue=rnd.choice((1024, 1024, 64, 8)),
        compare_timeout=rnd.choice((40, 150, 400)),
        faults=tuple(sorted(faults, key=lambda f: f.at)),
    )


def lease_scene(seed: int) -> Scene:
    """Return a random scene with a lease as the arbiter: the same, with cuts that may flap."""
    rnd = random.Random(seed * 104729 + 3)
    s = scene(seed)
    if s.calm():
        return replace(s, lease=True)
    faults = list(s.faults)
    for _ in range(rnd.choice((1, 1, 2, 4))):
        at, kind = rnd.randrange(60, 1500), rnd.choice(CUTS)
        for _ in range(rnd.choice((1, 1, 1, 6))):  # flapping
            span = rnd.choice((40, 300, 1300, 3000))
            if kind == "cut_e" and rnd.random() < 0.5:
                kind = "revoke"
            faults.append(Fault(at, kind, span))
            at += span + rnd.choice((20, 100, 600))
    return replace(s, lease=True, faults=tuple(sorted(faults, key=lambda f: f.at)))


def roles_scene(seed: int) -> Scene:
    """Return a random scene of several failovers, with pairs created again, and faults."""
    rnd = random.Random(seed * 15_485_863 + 4)
    s = replace(scene(seed), roles=True, conns=rnd.choice((2, 3, 6)))
    if rnd.random() < 0.7:  # offsets, which each checkpoint ends, live longer
        s = replace(s, odd=0, odd_udp=False, link_loss=0, compare_timeout=400)
    faults = []
    for n in range(rnd.choice((1, 2, 3, 4))):
        at, trouble = rnd.randrange(20, 900), rnd.choice((0, 0, 1, 2))
        faults.append(Fault(at, rnd.choice(ROUNDS), rnd.choice((50, 400, 1500)), n))
        for _ in range(trouble):
            when, span = at + rnd.randrange(0, 1500), rnd.choice((5, 60, 250, 700))
            faults.append(Fault(when, rnd.choice(HINDRANCES), span, n))
        if rnd.random() < 0.3:
            faults.append(Fault(rnd.randrange(0, at), rnd.choice(("checkpoint", "flip_pvm")), 0, n))
    order = sorted(faults, key=lambda f: (f.round, f.at))
    return replace(s, faults=tuple(order), ring=max(s.ring, 1000), queue=max(s.queue, 64))


def shutdown_scene(seed: int) -> Scene:
    """Return a random scene in which hosts shut down in order and boot again, one after the other.

    In every other one something goes wrong around that time.
    """
    rnd = random.Random(seed * 122_949_823 + 9)
    s, faults = roles_scene(seed), []
    for n in range(rnd.choice((1, 2, 3, 4))):
        at = rnd.randrange(20, 900)
        faults.append(Fault(at, rnd.choice(("shutdown_pvm", "shutdown_svm")), 0, n))
        if seed % 2:
            when = max(0, at + rnd.randrange(-300, 300))
            faults.append(Fault(when, rnd.choice(HINDRANCES), rnd.choice((5, 60, 250, 700)), n))
    order = sorted(faults, key=lambda f: (f.round, f.at))
    return replace(s, faults=tuple(order))


def disk_scene(seed: int) -> Scene:
    """Return a random scene of a guest with a disk, whose mirror is lost now and then."""
    rnd = random.Random(seed * 32_452_843 + 5)
    s = replace((roles_scene if seed % 2 else scene)(seed), disk=True, manual=False)
    if s.calm():
        return s
    faults = list(s.faults)
    for _ in range(rnd.choice((0, 1, 1, 2))):
        kind = rnd.choice(("lose_disk", "cut_disk", "cut_disk", "kill_p_in_checkpoint"))
        if s.roles and kind.startswith("kill"):
            kind = "lose_disk"
        last = max((f.round for f in faults), default=0)
        span = rnd.choice((5, 60, 700, 2500))
        faults.append(Fault(rnd.randrange(60, 1200), kind, span, rnd.randrange(last + 1)))
    order = sorted(faults, key=lambda f: (f.round, f.at))
    return replace(s, faults=tuple(order))


@cache
def _config(role: str) -> Config:
    return load(EXAMPLES / f"{role}.toml")


def config(role: str, s: Scene) -> Config:
    """Return the example's configuration, with deadlines that suit a short run."""
    c = _config(role)
    if s.roles:
        c = replace(c, qemu=replace(c.qemu, incoming=("qemu",)))
    if s.disk:
        c = replace(
            c,
            disks=(Disk(name="d0", overlays="/"),),
            nbd=Nbd(local="10.0.0.1:10809", remote="10.0.0.2:10809", write_timeout=400),
            qemu=replace(c.qemu, qmp_oob=f"{role} oob"),
        )
    return replace(
        c,
        peer=replace(c.peer, heartbeat_interval=50, heartbeat_timeout=300, dead_after=900),
        compare=replace(
            c.compare,
            compare_timeout=s.compare_timeout,
            max_queue_size=s.queue,
            wait="adaptive" if s.wait else "fixed",
            min_wait=s.wait or c.compare.min_wait,
        ),
        checkpoint=replace(c.checkpoint, deadline=600, share=25 if s.wait else 50),
        qemu=replace(
            c.qemu, qmp=role, enter_timeout=3000, enter_stop=ENTER_STOP_MS, qmp_timeout=1000
        ),
        failover=replace(c.failover, arbiter="manual", fence=(), automatic=False)
        if s.manual
        else c.failover
        if not s.lease
        else replace(c.failover, arbiter="lease", fence=(), lease_ttl=1000, lease_margin=200),
    )


class World:
    """One run."""

    def __init__(self, s: Scene, *, trace: bool = False) -> None:
        self.scene = s
        self.rnd = random.Random(s.seed)
        self.rnd_datagrams = random.Random(s.seed + 1)
        self.rnd_person = random.Random(s.seed + 2)
        self.rnd_disk = random.Random(s.seed + 3)
        self._overdue = 0  # ticks in a row in which something had waited for too long
        self.disk_cut = False  # the NBD connection is silent
        self._writes: dict[str, tuple[int, int]] = {}  # side -> writes that have ended, since when
        self.unproven = False  # a guest could not take over: its disks may not be whole
        self.sessions = 0
        self.stops = 0  # number of controllers stopped on purpose
        self.shutdowns = self.handovers = 0  # of hosts in order; of which the other one served then
        self.handed: set[str] = set()  # hosts that have handed over, until they boot
        self.deaf: set[str] = set()  # sides that receive no heartbeats
        self.loop = VirtualLoop()
        self.start = self.loop.now_ns
        self.trace: deque[str] = deque(maxlen=200000)
        self._tracing = trace
        self.witness = Witness(self)
        self.store_cut_out: Counter[str] = Counter()  # sides whose requests are lost
        self.store_cut_in: Counter[str] = Counter()
        self.ps_cut = 0
        self.entry_trap = ""  # how the next entry goes wrong
        self.off = False  # the guest has shut itself down
        self._still_ms: dict[str, int] = {}  # since when a guest that should run is stopped
        self.trap = 0  # ms without a controller, as soon as a new SVM has received its state
        self.mute: Counter[str] = Counter()  # sides from which the other one receives nothing
        self.channel_cut = self.colo_cut = self.ring_broken = False
        self.was_solo = False
        #: the secondary's controller died during a checkpoint, and QMP does not repeat its events:
        #: until the next checkpoint nobody knows which guest runs. After a takeover in that time
        #: its connections may end (`given_up`), but no client gets a wrong byte.
        self.epoch_uncertain = self.given_up = self.excused = False
        self.flipped: set[int] = set()  # connections that a guest has damaged
        self.protected = self.shadow = False  # once; the primary holds nothing
        self.entropy_s = random.Random(self.rnd.random())
        guest = Guest(random.Random(self.rnd.random()), self.rnd.randrange(1 << 32))
        self.p, self.s = Side(self, True, guest), Side(self, False, None)
        self.where = self.p
        self.transmitted: set[str] = set()
        self.udp_out: Counter[bytes] = Counter()
        self._pieces: dict[tuple[bool, int], dict[int, tuple[bytes, bool]]] = {}
        self.ordered = False  # a failover, by the operator
        self.clones = self.pairs = 0  # checkpoints; how often the pair was protected again
        self.round, self.round_at = 0, 0  # faults of this round count from then, ms
        self.lost = False  # the last guest that knew everything has died
        #: what has left of each connection that a client opened: bytes by position, highest ack
        self.said: dict[tuple[bool, int, int], bytearray] = {}
        self.acked: dict[tuple[bool, int, int], int] = {}
        self.newest: dict[tuple[bool, int, int], int] = {}  # TSval
        # ms: from then on the network has received the other host's guest
        self.turns: list[int] = []
        self.heard = "P"
        self.frames = 0
        # frames that the fast path decided, and of these without a controller
        self.fast = self.fast_alone = 0
        self.fast_udp = 0  # of these, datagrams
        self.broken: BaseException | None = None
        plans = [self._plan() for _ in range(s.conns)]
        if s.roles:
            plans += [self._long_plan(at) for at in (0, 100, 300, self.rnd.randrange(3000))]
        self.client = Client(self.rnd, plans, 3 if s.roles else self.rnd.choice((1, 3)))
        self.client.udp_nondeterministic = s.odd_udp
        self.client.udp_left = s.udp or self.client.udp_left
        self.deaths: set[str] = set()

    def _plan(self) -> Plan:
        rnd, steps = self.rnd, []
        for _ in range(rnd.choice((1, 2, 5))):
            kind = b"N" if rnd.random() < self.scene.odd else rnd.choice((b"G", b"G", b"U"))
            kind = b"W" if self.scene.disk and kind == b"G" else kind
            steps.append((kind, rnd.choice((1, 50, 400, 3000))))
        if rnd.random() < 0.25:
            moods = (b"Q", b"A", b"a") if self.scene.odd else (b"Q",)
            steps.append((rnd.choice(moods), 30))
        if self.scene.rude:
            steps += [(b"C", 30), (b"G", 30)]
        return Plan(steps, rnd.choice((0, 20, 100)), rnd.random() < 0.2)

    def _long_plan(self, opened: int) -> Plan:
        """Return a connection that lives as long as faults happen."""
        rnd = self.rnd
        steps = [(rnd.choice((b"G", b"U")), rnd.choice((1, 50, 400))) for _ in range(400)]
        if self.scene.disk:
            steps = [(b"W" if kind == b"G" else kind, size) for kind, size in steps]
        return Plan(
            steps, rnd.choice((40, 150)), rnd.random() < 0.2, until_told=True, not_before=opened
        )

    # -- time

    def ns(self) -> int:
        return self.loop.now_ns

    def ms(self) -> int:
        return (self.loop.now_ns - self.start) // 1_000_000

    def ms_exact(self) -> float:
        return (self.loop.now_ns - self.start) / 1e6

    def later(self, ms: float, what: Callable[[], None]) -> None:
        """Call something after some ms; an exception in it ends the run."""
        self.loop.call_later(ms / 1000, self._guarded, what)

    def _guarded(self, what: Callable[[], None]) -> None:
        if self.broken is not None:
            return
        try:
            what()
        except Exception as e:
            self.broken = e

    def spawn(self, coro: Coroutine[Any, Any, Any]) -> None:
        task = self.loop.create_task(coro)
        self._tasks.add(task)
        task.add_done_callback(self._over)

    _tasks: set[asyncio.Task[Any]]

    def _over(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        e = None if task.cancelled() else task.exception()
        if e is not None and not isinstance(e, Killed) and self.broken is None:
            self.broken = e

    def note(self, text: str, *args: Any) -> None:
        """Add a line to the trace."""
        if self._tracing:
            shown = [_frame(a) if isinstance(a, bytes) else a for a in args]
            self.trace.append(f"{self.ms_exact():10.3f} ms  {text % tuple(shown)}")

    # -- networks

    def _carry(self, loss: float, jitter: float, what: Callable[[], None]) -> None:
        rnd = self.rnd
        for _ in range(2 if rnd.random() < self.scene.dup else 1):
            if rnd.random() >= loss:
                self.later(0.05 + rnd.random() * jitter, what)

    def link(self, sender: Side, kind: int, epoch: int, frame: bytes, gso: int) -> None:
        """Send over the peer link, which neither duplicates nor keeps the order."""
        if self.link_cut or sender.off or self.rnd.random() < self.scene.link_loss:
            self.note("lost on the link from %s: %s", sender.name, frame)
            return
        tag, other = epoch & 0xFFF, sender.other
        self.later(
            0.02 + self.rnd.random() * self.scene.link_jitter,
            lambda: other.link_in(kind, tag, frame, gso),
        )

    link_cut = False

    def from_client(self, frame: bytes) -> None:
        self._carry(self.scene.loss, self.scene.jitter, lambda: self.where.network_in(frame))

    def to_network(self, side: Side, frame: bytes) -> None:
        """Let a guest's frame leave its host."""
        if not side.primary and not side.in_bridge and side.mode is not Mode.TAKEOVER:
            raise Violation(f"I6: a frame of the SVM: {_frame(frame)}")
        if side.off:
            return
        if side.primary and not side.in_bridge:
            self.note("%s: its tap is in no bridge: %s", side.name, frame)
            return
        if frame[12:14] == b"\x80\x35":  # the announcement
            self.where = side
            return
        self.note("%s to the network: %s", side.name, frame)
        self.frames += 1
        self.shadow |= _holds_nothing(side)
        if self.shadow and not side.primary:
            if not self.ordered:
                raise Violation("S has taken over from shadow mode, and nobody has asked for it")
            self.excused = True  # an operator took over from shadow mode, despite the warning
            raise _Excused
        self.given_up |= self.epoch_uncertain and not side.primary
        if self.frames > MAX_FRAMES:
            raise Violation(f"{MAX_FRAMES} frames: guest and client do not understand each other")
        self.transmitted.add(side.name)
        if side.name != self.heard:
            self.heard = side.name
            self.turns.append(self.ms())
        if side.stale:
            raise Violation(
                f"two guests transmit: {_frame(frame)} of {side.name} after the other one"
            )
        self._check_disk(side)
        if not side.primary:
            self.where = side
            side.other.stale = True
        else:
            if self._held(side):
                self._judge(side, frame)
            elif self._alone(side):
                side.other.stale = True
            # entering, or the end of shadow mode: what was sent before STOP
            elif not side.other.stale:
                try:
                    self._judge(side, frame)
                except Violation:
                    side.other.stale = True
            c = side.controller
            self.was_solo |= self.protected and c is not None and c.view.guest.standalone
        self._account(side, frame)
        now = self.client
        self._carry(self.scene.loss, self.scene.jitter, lambda: self._to_client(now, frame))

    def _check_disk(self, side: Side) -> None:
        """Check I11: the disk of a guest that is heard has what it wrote, and nothing else."""
        if not self.scene.disk or side.guest is None or self.ordered:
            return
        has, wrote = side.qemu.block.view(), side.guest.written
        if has != wrote:
            raise Violation(
                f"I11: the disk of {side.name} lacks {sorted(wrote - has)[:5]} and has "
                f"{sorted(has - wrote)[:5]} besides"
            )

    def _to_client(self, client: Client, frame: bytes) -> None:
        for out in client.receive(frame, self.ms()):
            self.from_client(out)

    # -- the judgement from outside

    def _held(self, side: Side) -> bool:
        c = side.controller
        alone = c is not None and (c.view.guest.standalone or self._ended(side))
        return side.protected and not self.shadow and not alone and side.mode is not Mode.BYPASS

    def _ended(self, side: Side) -> bool:
        """Excuse a guest that has shut itself down while its copy is silent for good.

        What it sent last may leave. If the copy transmits after that, it is the second guest.
        """
        c, other = side.controller, side.other
        silent = other.guest is None or other.mode is Mode.DROP
        return self.off and c is not None and bool(c.view.guest.over) and silent

    def _alone(self, side: Side) -> bool:
        return (
            side.mode is Mode.BYPASS
            or (side.protected and not self.shadow)
            or side.other.guest is None
        )

    def _judge(self, side: Side, frame: bytes) -> None:
        """Check I1 to I3 for a frame of the PVM that leaves while the pair holds together."""
        guest, copy = side.guest, side.other.guest
        assert guest is not None
        if copy is None:
            raise Violation(f"I1: {_frame(frame)}, and there is no SVM")
        s = read(frame)  # raises if the checksum is wrong
        if s is None:
            self._judge_datagram(copy, frame)
            return
        mine = self._incarnation(guest, s.v6, s.dport, s.seq, s.flags)
        if mine is None:
            return  # a RST that answers nothing
        c = copy.find(s.v6, s.dport, mine.irs)
        what = _frame(frame)
        if s.flags & RST:
            if c is not None and c.state not in ("closed", "reset"):
                raise Violation(f"I3: {what}, but the SVM's connection is {c.state}")
            return
        if c is None:
            raise Violation(f"I3: {what}, but the SVM does not know this connection")
        ack = diff(s.ack, (mine.irs + 1) & 0xFFFFFFFF)
        have = len(c.inn) + (c.peer_fin == len(c.inn))
        if ack > have:
            raise Violation(f"I2: {what} acks {ack}, the SVM has {have}")
        if s.flags & SYN:
            return
        if ack + s.window > c.adv + 8 and s.window:
            raise Violation(f"window: {what} promises {ack + s.window}, the SVM {c.adv}")
        pos = diff(s.seq, (self._isn(mine) + 1) & 0xFFFFFFFF)
        if not s.data and not s.flags & FIN:
            return
        if bytes(c.out[pos : pos + len(s.data)]) != s.data:
            raise Violation(f"I1: {what} at {pos}: the SVM has not said that")
        if pos + len(s.data) > c.sent_max:
            raise Violation(f"I1: {what} at {pos}: the SVM has sent {c.sent_max} only")
        at = pos + len(s.data)
        # docs/design/compare-rules.md: "FIN and RST of the PVM, RST of the SVM"
        alike = mine.state == "reset" == c.state and c.abort_at == at and c.fin_at is None
        if s.flags & FIN and c.fin_at != at and not alike:
            raise Violation(f"I3: {what}: the SVM's FIN is at {c.fin_at}")

    def _isn(self, c: Tcp) -> int:
        """Return the guest's ISN of this connection as its client knows it."""
        k = self.client.opened.get((c.v6, c.port, c.irs))
        return k.irs if k is not None and k.acked else c.iss

    def _incarnation(self, g: Guest, v6: bool, port: int, seq: int, flags: int) -> Tcp | None:
        c = g.conns.get((v6, port))
        found = [c] if c is not None else []
        found += [c for (six, p, _), c in reversed(g.archive.items()) if (six, p) == (v6, port)]
        for c in found:
            if flags & SYN and seq in (c.iss, self._isn(c)):
                return c
            first = (self._isn(c) + 1) & 0xFFFFFFFF
            if not flags & SYN and -1 <= diff(seq, first) <= len(c.out) + 1:
                return c
        return None

    def _account(self, side: Side, frame: bytes) -> None:
        """Check I8 at once: a transmitting guest knows everything sent before, and contradicts
        none of it."""
        s = read(frame)
        if s is None or s.flags & (RST | SYN):
            return
        assert side.guest is not None
        c = self._incarnation(side.guest, s.v6, s.dport, s.seq, s.flags)
        if c is None or c.irs in self.flipped or not c.acked:
            return
        key, what = (s.v6, s.dport, c.irs), _frame(frame)
        have = len(c.inn) + (c.peer_fin is not None)
        told = self.acked.get(key, 0)
        if told > have:
            raise Violation(f"I8: {what}: {told} bytes were acked, {side.name} has {have}")
        ack = diff(s.ack, (c.irs + 1) & 0xFFFFFFFF)
        self.acked[key] = max(told, ack)
        newest = self.newest.setdefault(key, s.tsval)
        if diff(s.tsval, newest) < -TS_SLACK:
            raise Violation(f"I8: {what}: the time went back from {newest}")
        if diff(s.tsval, newest) > 0:
            self.newest[key] = s.tsval
        said = self.said.setdefault(key, bytearray())
        pos = diff(s.seq, (self._isn(c) + 1) & 0xFFFFFFFF)
        if not s.data or not 0 <= pos <= len(said):
            return
        n = min(len(s.data), len(said) - pos)
        if said[pos : pos + n] != s.data[:n]:
            raise Violation(f"I8: {what} at {pos}: something else was said there before")
        said += s.data[n:]

    def _judge_datagram(self, copy: Guest, frame: bytes) -> None:
        whole = self._assemble(frame)
        if whole is None:
            return
        head, body = whole[:8], whole[8:]
        if (head[:2], int.from_bytes(head[4:6], "big")) != (b"\0\x35", len(whole)):
            raise Violation(f"a datagram under a header that is not its own: {head.hex()}")
        self.udp_out[body] += 1
        if self.udp_out[body] > copy.udp[body]:
            raise Violation(f"I1: a datagram that the SVM has not sent: {body[:20].hex()}")

    def _assemble(self, frame: bytes) -> bytes | None:
        """Return the UDP packet that a frame completes."""
        v6 = frame[12:14] == b"\x86\xdd"
        if v6:
            if frame[20] == 17:
                return frame[54:]
            at, ident = int.from_bytes(frame[56:58], "big"), int.from_bytes(frame[58:62], "big")
            more, at, body = bool(at & 1), at & 0xFFF8, frame[62:]
        else:
            word, ident = int.from_bytes(frame[20:22], "big"), int.from_bytes(frame[18:20], "big")
            more, at, body = bool(word & 0x2000), (word & 0x1FFF) * 8, frame[34:]
            if not word & 0x3FFF:
                return body
        pieces = self._pieces.setdefault((v6, ident), {})
        pieces[at] = (body, more)
        end = 0
        for start in sorted(pieces):
            if start != end:
                return None
            end = start + len(pieces[start][0])
        if pieces[max(pieces)][1]:
            return None
        del self._pieces[(v6, ident)]
        return b"".join(pieces[a][0] for a in sorted(pieces))

    def cloned(self, to: Side, *, first: bool) -> None:
        """Note that a checkpoint has copied the PVM: what it had sent counts as the SVM's."""
        self.clones += 1
        # A restarted controller may not know of a shadow mode: this ends it.
        self.shadow &= _holds_nothing(to.other)
        to.tap.clear()
        if first and self.trap:
            side, span = self.rnd.choice((to, to.other)), self.trap
            self.trap = 0
            self.later(self.rnd.uniform(0, 16), lambda: self._restart(side, span))

    async def _stop(self, side: Side, span: int) -> None:
        """Send SIGTERM, and start the controller `span` ms later."""
        c = side.controller
        if c is None or side.name in self.deaths:
            return
        await side.process.run(c.stop("stopped by a signal"))
        await asyncio.sleep(0.003)  # the last message arrives before the end of the channel
        if side.controller is c:
            side.kill_controller()
            self.stops += 1
            self.later(span, lambda: None if side.name in self.deaths else self.boot(side))

    async def _shut_down(self, side: Side) -> None:
        """Shut the host down as systemd does: it stops the handover's unit, QEMU's and the
        controller's, in this order, and then everything else."""
        c = side.controller
        self.shutdowns += 1
        self.deaths.add(side.name)
        if c is not None:
            with contextlib.suppress(ValueError):
                answer = await side.process.run(c.commands.run("handover", {"shutdown": True}))
                if answer["done"]:
                    self.handovers += 1
                    self.handed.add(side.name)
                    self.note("%s has handed over", side.name)
        if side.off:
            return
        if side.name not in self.handed:
            self._doom(side)
        side.kill_qemu()
        await asyncio.sleep(self.rnd.choice((0, 0.001, 0.02)))
        if (c := side.controller) is not None:
            with contextlib.suppress(Killed):
                await side.process.run(c.stop("stopped by a signal"))
            await asyncio.sleep(0.003)  # the last message arrives before the end of the channel
        self._power_off(side)

    def _discountable(self, side: Side) -> None:
        """Check that a fence does not follow from stopping a controller on purpose, nor from a
        shutdown in order."""
        c = side.controller
        if side.other.name in self.handed:
            raise Violation(f"{side.name} fences a host that has handed over to it")
        known = side.peer_stopped > self.ns() and side.other.controller is None
        if (
            known
            and c is not None
            and not (c.view.operator or c.view.guest.colo_exit or c.view.guest.copy_lost)
            and not c.view.pair.checkpoint_overdue
        ):
            raise Violation(f"{side.name} fences a host whose controller was stopped on purpose")

    def _restart(self, side: Side, span: int) -> None:
        if side.name not in self.deaths:
            side.kill_controller()
            self.later(span, lambda: None if side.name in self.deaths else self.boot(side))

    def gates_moved(self) -> None:
        """Check the gates: a data path has changed its mode."""

    def went_solo(self) -> None:
        """Note that what the PVM sends passes uncompared from now on.

        The SVM is informed of that, not of whether anything was sent, so it must not take over.
        """
        self.was_solo |= self.protected

    # -- controllers

    def boot(self, side: Side, *, turned: bool = False) -> None:
        """Start this host's controller."""
        if side.controller is not None or self.broken is not None or side.off:
            return
        if side.loaded and SimDataPath.wanted(side) is not side.primary and not turned:
            # the other role's programs are loaded and replace the current ones
            self.later(self.rnd.uniform(0.5, 60), lambda: self.boot(side, turned=True))
            return
        self.note("%s controller starts", side.name)
        self.handed.discard(side.name)
        side.process = process = Process()
        side.dp = SimDataPath(side)
        kind = primary.Primary if side.primary else secondary.Secondary
        c = kind(config("primary" if side.name == "P" else "secondary", self.scene), side.dp)  # type: ignore[arg-type]
        c.arbiter.fence = lambda: self._fence(side)  # type: ignore[method-assign]
        c.qemu.start_incoming = lambda: self._start_qemu(side)  # type: ignore[method-assign]
        c.spawn = process.spawning(c.spawn)  # type: ignore[method-assign,assignment]
        mark = SimMarkFile(side)
        c.use_mark(mark.found(), mark.want, "the mark", mark.boot)
        side.controller = c
        self.spawn(process.run(c.start()))
        self.spawn(self._watch(side, c))

    async def _watch(self, side: Side, c: Any) -> None:
        await c.finished()
        if self.excused:
            raise _Excused
        if not c.role_changed:
            raise Violation(f"the {c.role.value} controller failed: {c.failures}")
        if side.controller is c:
            side.kill_controller()
            self.boot(side)

    async def _start_qemu(self, side: Side) -> None:
        """Run [qemu] incoming, which may fail once; the next attempt is seconds later."""
        await asyncio.sleep(self.rnd.uniform(5, 80) / 1000)
        side.failed_start = self.rnd.random() < 0.1 and not side.failed_start
        if not side.failed_start and not side.off:
            self.note("%s QEMU -incoming", side.name)
            side.new_qemu()

    async def _fence(self, side: Side) -> bool:
        """Power the other host off, for certain."""
        self._discountable(side)
        await asyncio.sleep(self.rnd.uniform(0.2, self.rnd.choice((2, 30))) / 1000)
        if self.rnd.random() < 0.1:
            return False
        self.note("%s fences %s", side.name, side.other.name)
        self._power_off(side.other)
        return True

    def _power_off(self, side: Side) -> None:
        side.kill_qemu()
        side.kill_controller()
        side.mode = Mode.DROP
        side.in_bridge = False
        side.off = True
        self.deaths.add(side.name)
        if self.scene.roles:
            self.later(self.rnd.choice((30, 300, 1500)), lambda: self._power_on(side))

    def _power_on(self, side: Side) -> None:
        if not side.off:
            return
        other = side.other
        alone = other.mode is (Mode.BYPASS if other.primary else Mode.TAKEOVER)
        if not self.lost and other.qemu.alive and not alone:
            # A host that is back before the other one has made sure of its death needs an operator.
            self.later(200, lambda: self._power_on(side))
        else:
            self.note("%s boots", side.name)
            side.power_on()
            self.deaths.discard(side.name)
            self.boot(side)

    def _make_qmp(
        self, path: str, name: str, timeout: float, on_event: Any, on_close: Any
    ) -> SimQmp:
        side = self.p if path.startswith("primary") else self.s
        return SimQmp(side, name, on_event, on_close, oob=path.endswith("oob"))

    async def _probe(self, disks: Any, timeout: float = 1.0) -> None:
        """Stand in for Mirrors.probe()."""
        mine = next(
            x for x in (self.p, self.s)
            if x.controller is not None and x.controller.qemu.disks.mirrors is disks
        )  # fmt: skip
        q = mine.other.qemu
        await asyncio.sleep(self.rnd_disk.uniform(0.1, 2) / 1000)
        if self.disk_cut or q.hung or mine.other.off:
            await asyncio.sleep(timeout)
            raise DiskError("no answer in time")
        if not q.alive or not q.block.server:
            raise DiskError("connection refused")

    async def _look(self, disks: Any) -> None:
        """Stand in for Mirrors.look(), without a random time as that of a command."""
        q = next(
            x for x in (self.p, self.s)
            if x.controller is not None and x.controller.qemu.disks.mirrors is disks
        ).qemu  # fmt: skip
        if q.hung or (q.draining and q.block.flying):
            await asyncio.sleep(0.1)
            raise QmpTimeout("query-block-jobs: no answer in time")
        else:
            disks._waits.saw(q.block.mirrors(), self.ns() / 1e9)

    def _make_store(self, c: Config) -> SimStore:
        return SimStore(self.p if c.role == "primary" else self.s)

    def _make_heartbeat_links(
        self, c: Config, on_heartbeat: Callable[[Any], None]
    ) -> SimHeartbeatLinks:
        return SimHeartbeatLinks(self.p if c.role == "primary" else self.s, c.pair, on_heartbeat)

    def _make_peer(
        self, *, role: str, on_up: Any, on_down: Any, on_message: Any, **_: Any
    ) -> SimPeer:
        return SimPeer(self.p if role == "primary" else self.s, on_up, on_down, on_message)

    @contextlib.contextmanager
    def _installed(self) -> Iterator[None]:
        """Install the stand-ins in the product's modules."""
        clock = FakeTime(self.loop)
        modules = (
            controller_module, commands, ticker, checkpoint_coordinator, primary, secondary,
            conntrack_map,
            offload_maps, lease_module, takeover, device_watch, colo_entry, guest_lifecycle,
            supervisor, heartbeats, pvm_output, replacement, shadow, switchover, mirrors, replica,
            secondary_disks, secondary_entry, mirror_watch, handover,
        )  # fmt: skip
        disks, copies, files = mirrors.Mirrors, replica.Replica, overlays.OverlayFiles
        stood_in = {disks: ("probe", "look"), copies: ("_need_room",),
                    files: ("make", "remove_all", "rooms")}  # fmt: skip
        kept_disks = [(cls, n, getattr(cls, n)) for cls, names in stood_in.items() for n in names]
        kept = [(m, "time", m.time) for m in modules]  # type: ignore[attr-defined]
        kept += [
            (controller_module, n, getattr(controller_module, n))
            for n in ("Peer", "HeartbeatLinks")
        ]
        kept += [(arbiter, "make_store", arbiter.make_store)]
        kept += [(supervisor, n, getattr(supervisor, n)) for n in ("Qmp", "WATCH_S")]
        kept += [(primary.Primary, "_watch_disks", primary.Primary._watch_disks)]
        kept += [(offload_maps, "syscall", offload_maps.syscall), (states, "STRICT", states.STRICT)]
        kept += [(scheduler, n, getattr(scheduler, n)) for n in ("OFFER_AFTER", "MAX_BACKOFF")]
        kept += kept_disks  # type: ignore[arg-type]

        async def made(disk: Any, of: Any, size: int) -> tuple[Path, Path]:
            return Path("/active"), Path("/hidden")

        async def nothing(disks: Any, *args: Any) -> None: ...

        try:
            disks.probe = lambda d, timeout=1.0, answer_s=1.0: self._probe(d, answer_s)  # type: ignore[method-assign]
            files.make = made  # type: ignore[method-assign]
            files.remove_all = nothing  # type: ignore[method-assign]
            disks.look = lambda d: self._look(d)  # type: ignore[method-assign]
            copies._need_room = nothing  # type: ignore[method-assign]
            primary.Primary._watch_disks = nothing  # type: ignore[method-assign]
            files.rooms = lambda d: []  # type: ignore[method-assign]
            states.STRICT = True
            for m in modules:
                m.time = clock  # type: ignore[attr-defined]
            if self.scene.eager:
                scheduler.OFFER_AFTER = scheduler.MAX_BACKOFF = 1
            offload_maps.syscall = Bpf(self.ns)  # type: ignore[assignment]
            # A QEMU that hangs here refuses its commands, which the watch cannot interpret.
            supervisor.WATCH_S = 1e9
            supervisor.Qmp = self._make_qmp  # type: ignore[misc,assignment]
            controller_module.Peer = self._make_peer  # type: ignore[misc,assignment]
            controller_module.HeartbeatLinks = self._make_heartbeat_links  # type: ignore[misc,assignment]
            arbiter.make_store = self._make_store  # type: ignore[assignment]
            yield
        finally:
            for m, name, value in kept:
                setattr(m, name, value)

    # -- faults

    def strike(self, f: Fault) -> None:
        """Apply the fault."""
        self.note("FAULT %s for %d ms", f.kind, f.span)
        p, s = self.p, self.s
        pvm = self.pvm()
        for role, side in (("_pvm", pvm), ("_svm", pvm.other)):
            if role in f.kind:
                f = replace(f, kind=f.kind.replace(role, f"_{side.name.lower()}"))
        if f.kind in ("kill_p_controller", "kill_s_controller"):
            self._restart(p if "_p_" in f.kind else s, f.span)
        elif f.kind in ("stop_p_controller", "stop_s_controller"):
            self.spawn(self._stop(p if "_p_" in f.kind else s, f.span))
        elif f.kind in ("shutdown_p", "shutdown_s"):
            side = p if f.kind == "shutdown_p" else s
            if not side.off and side.name not in self.handed:
                self.spawn(self._shut_down(side))
        elif f.kind == "revoke":
            self.witness.revoke()
        elif f.kind == "trap":
            self.trap = f.span
        elif f.kind in ("entry_completed", "entry_stuck"):
            self.entry_trap = f.kind.removeprefix("entry_")
        elif f.kind == "poweroff":
            self.off = self.lost = True
            for side in (p, s):
                self.deaths.add(f"{side.name} qemu")
                self.later(self.rnd.uniform(0, 40), side.qemu.guest_off)
        elif f.kind in ("reset_p", "reset_s", "stop_p", "stop_s"):
            qemu = (p if f.kind.endswith("_p") else s).qemu
            if f.kind.startswith("reset"):
                qemu.reset()
            elif self.whole():  # a standalone guest stays stopped
                qemu.stop()
        elif f.kind == "cut_channel":
            self.channel_cut = True
            self.later(f.span, lambda: setattr(self, "channel_cut", False))
        elif f.kind == "cut_link":
            self.link_cut = True
            self.later(f.span, lambda: setattr(self, "link_cut", False))
        elif f.kind in ("deafen_p", "deafen_s"):
            name = f.kind[-1].upper()
            self.deaf.add(name)
            self.later(f.span, lambda: self.deaf.discard(name))
        elif f.kind in CUTS:
            self._cut(f.kind, 1)
            self.later(f.span, lambda: self._cut(f.kind, -1))
        elif f.kind == "cut_disk":  # silently
            self.disk_cut = True
            self.later(f.span, lambda: setattr(self, "disk_cut", False))
        elif f.kind == "lose_disk":
            pvm.qemu.block.fail("No space left on device")
        elif f.kind == "lose_events":
            self.ring_broken = True
            self.later(min(f.span, 60), lambda: setattr(self, "ring_broken", False))
        elif f.kind in ("hang_p_qemu", "hang_s_qemu"):
            qemu = (p if "_p_" in f.kind else s).qemu
            qemu.hung = True
            self.later(f.span, lambda: setattr(qemu, "hung", False))
        elif f.kind == "checkpoint" and pvm.controller is not None:
            self.spawn(self._command(pvm, "checkpoint"))
        elif f.kind == "reload" and p.controller is not None:
            p.controller.new_policy()
        elif f.kind == "shadow" and p.controller is not None and self.protected:
            p.controller.set_shadow(True)
            self.later(f.span, self._end_shadow)
        elif f.kind in ("kill_p_qemu", "kill_s_qemu"):
            side = p if "_p_" in f.kind else s
            self._doom(side)
            self.deaths.add(f"{side.name} qemu")
            side.kill_qemu()
        elif f.kind in ("kill_p_host", "kill_s_host"):
            self._doom(p if "_p_" in f.kind else s)
            self._power_off(p if "_p_" in f.kind else s)
        elif f.kind in ("power_p", "power_s"):
            side = p if f.kind == "power_p" else s
            self._doom(side)
            side.qemu.die(silently=True)
            side.kill_controller(silently=True)
            self._power_off(side)
        elif f.kind.endswith("_in_checkpoint"):
            side = p if "_p_" in f.kind else s
            if side.controller is None or not side.primary:
                return
            self.spawn(self._command(side, "checkpoint"))

            def die() -> None:
                self._doom(side)
                if "_qemu_" in f.kind:
                    self.deaths.add(f"{side.name} qemu")
                    side.kill_qemu()
                else:
                    self._power_off(side)

            self.later(self.rnd.uniform(0.5, 16), die)
        elif f.kind == "cut_colo":
            self.colo_cut = True
            self.later(1, pvm.other.qemu.lose_channel)
            if self.scene.roles:  # the PVM's QEMU notices at the next checkpoint
                self.spawn(self._command(pvm, "checkpoint"))
                self.later(f.span, lambda: setattr(self, "colo_cut", False))
        elif f.kind == "kill_waiting_qemu":
            for side in (p, s):
                waits = side.qemu.status() == "inmigrate" or side.qemu.migration == "active"
                if waits and side.qemu.incoming:
                    side.kill_qemu()
        elif f.kind == "switchover":
            side = self.rnd.choice((p, s))
            if side.controller is not None:
                self.spawn(self._command(side, "switchover"))
        elif f.kind in ("failover_p", "failover_s"):
            side = p if f.kind == "failover_p" else s
            if side.controller is not None:
                self.spawn(self._command(side, "failover"))
        elif f.kind in ("demote_p", "demote_s"):
            side = p if f.kind == "demote_p" else s
            if side.controller is not None:
                self._doom(side)
                self.spawn(self._demote(side))
        elif f.kind in ("flip_p", "flip_s"):
            self._flip(p if f.kind == "flip_p" else s)
        elif f.kind == "failover":
            side = self.rnd.choice((p, s))
            if side.controller is not None:
                self.spawn(self._command(side, "failover"))

    def _cut(self, kind: str, by: int) -> None:
        """Cut edges of the graph P, S, store."""
        for name in "ps":
            both = kind in (f"cut_{name}e", f"cut_{name}", "cut_e")
            if both or kind == f"cut_{name}e_out":
                self.store_cut_out[name.upper()] += by
            if both or kind == f"cut_{name}e_in":
                self.store_cut_in[name.upper()] += by
        if kind in ("cut_ps", "cut_p", "cut_s"):
            self.ps_cut += by
            self.channel_cut = self.link_cut = self.ps_cut > 0
        for c in (self.store_cut_out, self.store_cut_in):
            for name in [n for n, k in c.items() if k <= 0]:
                del c[name]

    def _flip(self, side: Side) -> None:
        """Flip a bit, in the guest's memory, of what it has not sent yet."""
        if side.guest is None:
            return
        for c in side.guest.conns.values():
            if c.sent_max < len(c.out):
                at = self.rnd.randrange(c.sent_max, len(c.out))
                c.out[at] ^= 1 << self.rnd.randrange(8)
                self.flipped.add(c.irs)

    def _end_shadow(self) -> None:
        c = self.p.controller
        if c is not None and c.view.shadow:
            c.set_shadow(False)

    async def _command(self, side: Side, name: str, **args: Any) -> None:
        c = side.controller
        if c is not None:
            self.ordered |= name == "failover"
            with contextlib.suppress(ValueError):
                await side.process.run(c.commands.run(name, args))

    async def _demote(self, side: Side) -> None:
        c = side.controller
        assert c is not None
        try:
            await side.process.run(c.commands.run("demote", {}))
        except ValueError:
            return
        if c is side.controller and not (side.mode is Mode.DROP and not side.stepped_out):
            raise Violation(f"{side.name} has demoted, and {side.mode.name} lets it transmit")

    # -- pairs created again

    def pvm(self) -> Side:
        """Return the host whose guest reaches the network, or would."""
        transmits = self.transmitter()
        return transmits if transmits is not None else self.s if self.s.primary else self.p

    def whole(self) -> bool:
        """Return whether the pair is protected: either guest can continue without the other."""
        for side in (self.p, self.s):
            c = side.controller
            if c is None or c.view.guest.colo_exit or side.mode is not Mode.RUN:
                return False
            # A secondary whose fence has failed reports "degraded" until the next checkpoint.
            fit = (State.PROTECTED,) if side.primary else (State.PROTECTED, State.DEGRADED)
            if c.state not in fit:
                return False
        return self.p.primary is not self.s.primary

    def oldest(self) -> int:
        """Return the number of takeovers survived by the connection that has seen most of them."""
        alive = [c for c in self.client.done if c.state == "closed"]
        return max((sum(c.opened < at <= c.heard for at in self.turns) for c in alive), default=0)

    def _doom(self, side: Side) -> None:
        """Return whether another guest can continue when this one dies."""
        other = side.other
        fit = other.guest is not None and not other.stale and other.qemu.alive and not other.off
        if side.stale or side.guest is None or not side.qemu.alive:
            return  # nobody needs it
        if not self.scene.roles:
            return
        if not fit or not (self.whole() or other.controller is None):
            self.lost = True

    def _rounds(self) -> None:
        """Start the next round of faults when the pair is protected again."""
        faults = self.scene.faults
        over = max((f.at + f.span for f in faults if f.round == self.round), default=0)
        if self.ms() < self.round_at + over + 20 or self.lost:
            return
        if self.whole():
            self.round += 1
            self.round_at = self.ms()
            self.pairs += 1
            self.note("ROUND %d", self.round)
            for f in faults:
                if f.round == self.round:
                    self.later(f.at, lambda f=f: self.strike(f))  # type: ignore[misc]
        elif self.ms() > self.round_at + over + PATIENCE_MS:
            ctl = [x.controller and (x.controller.state.value, x.controller.reason)
                   for x in (self.p, self.s)]  # fmt: skip
            raise Violation(f"the pair is not protected again: {ctl}")

    def _operate(self) -> None:
        """A person starts a QEMU where a secondary waits for one, and the controller does not know
        yet that it has to start one itself."""
        for side in (self.p, self.s):
            c = side.controller
            waits = c is not None and not side.primary and c.state is State.STARTING
            by_hand = waits and not side.qemu.alive and not c.needs_copy
            if by_hand and self.rnd.random() < 0.1:
                self.note("%s QEMU -incoming, by hand", side.name)
                side.new_qemu()

    def _decide_for_the_stopped(self) -> None:
        """Let an operator decide where no controller can.

        That is where a controller was stopped and its host or QEMU has died since, and where a
        guest waits for a message from a dead host.
        """
        for side in (self.p, self.s):
            c, other = side.controller, side.other
            dead = other.off or not other.qemu.alive
            if c is None or not dead or other.controller is not None or c.view.operator:
                continue
            told = side.peer_stopped > self.ns() and c.state is State.DEGRADED
            if (told or c.undecided) and self.rnd_person.random() < 0.02:
                self.note("a person decides for %s", side.name)
                self.spawn(self._command(side, "failover", force=True))

    # -- the run

    async def _main(self) -> None:
        self._tasks = set()
        for side in (self.p, self.s):
            self.boot(side)
        for f in self.scene.faults:
            if not f.round:
                self.later(f.at, lambda f=f: self.strike(f))  # type: ignore[misc]
        last = max((f.at + f.span for f in self.scene.faults if not f.round), default=0) + 200
        rounds = max((f.round for f in self.scene.faults), default=0) + 1
        calm = 0
        while self.ms() < last - 200 + SETTLE_MS:
            self._guarded(self._tick)
            self._guarded(self._decide_for_the_stopped)
            if self.broken is not None:
                raise self.broken
            await asyncio.sleep(TICK_MS / 1000)
            if self.scene.roles:
                self._guarded(self._operate)
                if self.round < rounds and not self.lost:
                    self._guarded(self._rounds)
                    last = self.ms() + 200
                    continue
                self.client.told = True
            if self.lost and self.transmitter() is None and self.ms() > self.round_at + PATIENCE_MS:
                break
            idle = not self.client.plans and not self.client.conns and not self.client.udp_left
            calm = calm + 1 if idle and self.ms() > last and self._quiet() else 0
            if calm > 30:
                break
        if self.broken is not None:
            raise self.broken
        self._finish()
        for side in (self.p, self.s):
            side.kill_controller()
        for t in list(self._tasks):
            t.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _tick(self) -> None:
        for frame in self.client.tick(self.ms()):
            self.from_client(frame)
        for side in (self.p, self.s):
            side.tick()
            self._check_still(side)
            self._check_writes(side)
            c, other = side.controller, side.other
            dead = other.off or not other.qemu.alive
            if self.scene.disk and c is not None and not side.primary and dead and c.disk_unproven:
                self.unproven = self.lost = True  # an operator decides
        for side in (self.p, self.s):
            c = side.controller
            if c is None or not side.primary:
                continue
            e = c.output.nics[0].engine
            kept = e.held_packets - e.pvm_packets
            if (
                e.pvm_packets > 17 * self.scene.queue
                or e.svm_packets > 2 * self.scene.queue + 16
                or kept
                > scheduler.BACKPRESSURE_STREAMS
                * (scheduler.BACKPRESSURE_FRAMES + controller_module.RING_BATCH)
            ):
                raise Violation(f"I10: {e.held_packets} held, {e.svm_packets} of the SVM")
            self._check_patience(side)
            if e.held_packets < 0 or e.held_bytes < 0 or e.svm_packets < 0:
                raise Violation("a count of what is held is negative")

    def _check_patience(self, side: Side) -> None:
        """Check that nothing waits for longer than compare_timeout before somebody asks, and that
        patience is never more than that."""
        c = side.controller
        e, limit = c.output.nics[0].engine, self.scene.compare_timeout * 1_000_000
        if not 0 < e.patience.ns <= limit or e.patience.quiet_ns > e.patience.ns:
            raise Violation(f"patience of {e.patience.ns / 1e6} ms, and {limit / 1e6} is the most")
        cks = c.checkpoints
        asked = cks.wanted is not None or cks.running is not None or e._outbox.asked
        heads = [] if asked or c.state is not State.PROTECTED else e._timers.flows()
        since = [flow.held[0][2] for flow in heads if flow.epoch == e.epoch and len(flow.held)]
        if not since or self.ns() - min(since) <= limit:
            self._overdue = 0
        elif (overdue := self._overdue + 1) > PATIENCE_TICKS:
            raise Violation(f"I4: a frame waits for {(self.ns() - min(since)) / 1e6} ms")
        else:
            self._overdue = overdue

    def _check_still(self, side: Side) -> None:
        """Check that the clients' only guest is not stopped for longer than an entry may take,
        plus 1 s."""
        q, c = side.qemu, side.controller
        alone = side.mode is Mode.BYPASS or (side.mode is Mode.CHECKPOINT and not side.protected)
        still = side.primary and alone and q.alive and not q.running
        if not still or q.hung or c is None or q.still == "shutdown":
            self._still_ms.pop(side.name, None)
        elif self.ms() - self._still_ms.setdefault(side.name, self.ms()) > ENTER_STOP_MS + 1200:
            raise Violation(
                f"{side.name} stands still (`{q.status()}`, {q.migration}): {c.state.value}, "
                f"{c.reason}"
            )

    def _check_writes(self, side: Side) -> None:
        """Check I11: a guest's writes end in time while the two controllers hear each other.

        Whatever the secondary's disk does then, it is given up after `nbd.write_timeout`.
        """
        block, c = side.qemu.block, side.controller
        calm = (
            c is not None
            and c.state is not State.STOPPED  # nobody waits for a guest that is silent for good
            and side.other.controller is not None
            and c.peer.connected
            and c.peer.silent_ms() < 150
            and side.other.qemu.alive
            and side.qemu.alive
            and not side.qemu.hung
            # a new controller learns of them from a QEMU that may stand still: _check_still()
            and c.qemu.disks.mirrors.mirroring
        )
        ended, since = self._writes.get(side.name, (0, 0))
        if not calm or not block.flying or block.ended != ended:
            self._writes[side.name] = (block.ended, self.ms())
        elif c is not None and self.ms() - since > c.config.nbd.write_timeout + WRITE_SLACK_MS:
            raise Violation(
                f"I11: {len(block.flying)} writes of {side.name} wait for the other host's disk "
                f"since {since} ms: {c.state.value}, {c.reason}"
            )

    def _quiet(self) -> bool:
        if self.transmitter() is None and any(x.qemu.alive for x in (self.p, self.s)):
            return False
        side = self.pvm()
        c = side.controller if side.primary else None
        settled = c is None or c.state in (State.PROTECTED, State.SOLO, State.STOPPED)
        return settled and (
            c is None or not (c.output.nics[0].engine.held_packets or self._held_in_kernel(side))
        )

    @staticmethod
    def _held_in_kernel(side: Side) -> int:
        """Return the fast path's waiting connections; its state of a lost pair is void."""
        k = side.fast
        return len(k.waiting()) if k is not None and side.mode is Mode.RUN else 0

    def transmitter(self) -> Side | None:
        """Return the side whose guest is on the network at the end."""
        for side in (self.s, self.p):
            if not side.primary and side.mode is Mode.TAKEOVER:
                return side if side.qemu.alive else None
        for side in (self.s, self.p):
            if side.primary and side.qemu.alive and side.mode is not Mode.DROP:
                return side
        return None

    def _finish(self) -> None:
        self.note("END")
        side = self.transmitter()
        ctl = [x.controller.state.value if x.controller else "-" for x in (self.p, self.s)]
        self.states = tuple(ctl)
        if side is None:
            if self.lost:
                return
            if not self.deaths:
                raise Violation(f"nobody died and nobody transmits: {ctl}")
            if len({d[0] for d in self.deaths}) < 2:
                alive = self.s if any(d[0] == "P" for d in self.deaths) else self.p
                if self._must_survive(alive):
                    raise Violation(f"{alive.name} lives and does not transmit: {ctl}")
            return
        if not side.qemu.running:
            raise Violation(f"{side.name} is on the network and does not run: {ctl}")
        self._check_survivor(side)
        waits = [c for c in self.client.conns.values()]
        if (waits or self.client.plans) and not self.given_up:
            raise Violation(
                f"I4: {len(waits)} connections and {len(self.client.plans)} plans wait for ever: "
                f"{[(c.port, c.v6, c.state, len(c.inn)) for c in waits]}, {ctl}"
            )
        c = side.controller
        if c is None or not side.primary:
            return
        if self.scene.calm():
            made = {
                n: k
                for n, k in c.checkpoints.by_cause.items()
                if n not in ("initial", "operator", "policy")
            }
            if made:
                raise Violation(f"checkpoints for no reason: {made}: {list(c.journal.entries)[-1]}")
        if c.output.nics[0].engine.held_packets:
            raise Violation(
                f"I4: {c.output.nics[0].engine.held_packets} frames are held for ever, {ctl}"
            )
        if self._held_in_kernel(side):
            raise Violation(
                f"I4: {self._held_in_kernel(side)} connections wait for ever in the fast path"
            )

    def _must_survive(self, side: Side) -> bool:
        """Return whether this side's guest has to continue standalone by itself."""
        c = side.controller
        if c is None or not side.qemu.alive or not self.protected:
            return False
        # where the pair was not held together, the operator decides
        if side is self.s and self.was_solo:
            return False  # clients may know what only the PVM ever sent
        if self.unproven:
            return False  # an operator decides
        if c.view.guest.demoted:
            return False  # requested by a primary that died before it reported what it then did
        return not c.view.shadow and c.state is not State.STARTING

    def _check_survivor(self, side: Side) -> None:
        """Check I8: what clients know is what the transmitting guest believes."""
        g = side.guest
        assert g is not None
        self._check_disk(side)
        missing = self.client.confirmed() - side.qemu.block.view()
        if self.scene.disk and missing and not self.ordered:
            raise Violation(f"I11: {side.name} has lost {sorted(missing)[:5]}")
        for c in [*self.client.done, *self.client.conns.values()]:
            if c.iss not in self.flipped:
                self.client.check_answers(c, Violation)
            if not c.acked:
                continue
            name = f"port {c.port}{' v6' if c.v6 else ''}"
            mine = g.find(c.v6, c.port, c.iss)
            if mine is None:
                raise Violation(f"I8: {side.name} does not know the connection of {name}")
            if bytes(mine.out[: len(c.inn)]) != bytes(c.inn):
                raise Violation(f"I8: the client of {name} got what {side.name} never said")
            if c.una > len(mine.inn) or bytes(mine.inn) != bytes(c.out[: len(mine.inn)]):
                raise Violation(
                    f"I8: {c.una} bytes were acked to {name}, {side.name} has {len(mine.inn)}"
                )
            if c.peer_fin is not None and c.peer_fin not in (mine.fin_at, mine.abort_at):
                raise Violation(f"I8: {name} saw a FIN at {c.peer_fin}, {side.name} {mine.fin_at}")
            if c.state == "reset" and not c.aborted and mine.state != "reset":
                raise Violation(f"I8: {name} was reset, {side.name} says {mine.state}")

    def run(self) -> World:
        """Run the scene. Raises Violation."""
        with self._installed():
            try:
                self.loop.run_until_complete(self._main())
            except _Excused:
                self.note("ends here: a known limit")
            except BadChecksum as e:
                raise Violation(f"a wrong checksum: {e}") from e
            finally:
                for t in asyncio.all_tasks(self.loop):
                    t.cancel()
                with contextlib.suppress(Exception):
                    self.loop.run_until_complete(asyncio.sleep(0))
                self.loop.close()
                for side in (self.p, self.s):
                    if side.fast is not None:
                        side.fast.close()
        return self


def _frame(frame: bytes) -> str:
    """Format a frame for the trace."""
    try:
        s = read(frame)
    except BadChecksum:
        return f"bad checksum {frame[:80].hex()}"
    if s is None:
        return f"udp or other, {len(frame)} bytes {frame[14:60].hex()}"
    flags = "".join(n for n, bit in zip("FSRPA", (1, 2, 4, 8, 16), strict=True) if s.flags & bit)
    six = " v6" if s.v6 else ""
    return (
        f"{s.sport}>{s.dport}{six} {flags} seq {s.seq} ack {s.ack} win {s.window} len {len(s.data)}"
        f" ts {s.tsval}/{s.tsecr}"
    )
