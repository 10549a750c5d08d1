# SPDX-License-Identifier: GPL-2.0-or-later
"""Run `colo-xdp vhost-drill`: try a pair whose frames vhost-net moves, and judge it.

No machine that this project has been tried on has /dev/vhost-net, so nobody knows whether a pair
works with vhost=on. Whoever has one can find out. The drill builds a pair on one machine, lets it
work, kills the primary's QEMU, and judges what docs/design/queues.md expects of vhost, each
expectation by itself. The witnesses are the kernel's own counters of the tap, captures on the wires
and the bytes that a client receives. `--control` does the same without vhost: what fails there as
well is not vhost's fault.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..tools import vhost
from . import vm as vms
from .capture import GUEST_MAC, from_guest
from .client import EchoStream
from .net import GUEST_IP, LabError, in_ns, sh, wait_for
from .pair import Lab

PASSED, FAILED, CANNOT = 0, 1, 2  # exit codes
ASKED = 50  # questions to a guest that must stay silent
CHECKPOINTS = 12
GSO = 1514  # bytes; a larger frame left the guest unsegmented
NOT_REACHED = "not reached"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One expectation, whether it was met, and by what that was seen."""

    name: str
    passed: bool
    text: str

    def __str__(self) -> str:
        return f"{'PASS' if self.passed else 'FAIL'}  {self.name}: {self.text}"


Frames = list[tuple[float, bytes]]  # time of capture (unix time, s), bytes


@dataclass(slots=True)
class Seen:
    """What the drill has seen; None or empty: it has not come so far."""

    error: str = ""  # what ended it, with the step
    opened: tuple[int, int] | None = None  # how often each QEMU has /dev/vhost-net open
    moves: bool | None = None  # whether QEMU itself reports that vhost moves the PVM's frames
    silent: tuple[int, int] | None = None  # frames of a guest in MODE_DROP; dropped by pvm_out
    frames: tuple[int, int] | None = None  # of the guest to its tap; judged by pvm_out
    unsegmented: tuple[int, int] | None = None  # largest mean frame; frames with a lost offload
    # segments of the PVM that came to its tap after later ones, of how many (0: some were missed);
    # and those that came late to the client, whom CPUs of ours may have overtaken as well
    order: tuple[int, int, int] | None = None
    # of each guest: stops, frames that were captured within them, and in all; -1: some were missed
    stopped: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    checkpoints: int | None = None
    wrong: list[str] = field(default_factory=list)  # what a client got that is not right
    leaked: int | None = None  # frames of the SVM on the wire before the takeover
    after: tuple[bool, int] | None = None  # the connection lives; frames of the SVM after it


def missing(control: bool = False, device: str = vhost.DEVICE) -> str:
    """Return why the drill cannot run here, or an empty string."""
    if os.geteuid():
        return "cannot run here: not root (it builds network namespaces and loads BPF programs)"
    if not control and not os.path.exists(device):
        return f"cannot run here: {device} missing (modprobe vhost_net, or a kernel that has it)"
    return ""


def judge(
    seen: Seen, queues: int, *, control: bool = False, zero_copy: bool = False
) -> list[Verdict]:
    """Return a verdict for each expectation, in the order of the drill."""
    out: list[Verdict] = []

    def add(name: str, found: object, passed: Callable[[], bool], text: Callable[[], str]) -> None:
        reached = found is not None
        out.append(Verdict(name, reached and passed(), text() if reached else NOT_REACHED))

    if not control:
        opened, moves = seen.opened, seen.moves
        add(
            "both QEMUs use vhost", opened,
            lambda: opened == (queues, queues) and moves is not False,
            lambda: f"{opened} queues opened, of {queues}; the PVM's driver: "
            f"{'not known (QEMU before 7.2)' if moves is None else 'on' if moves else 'OFF'}",
        )  # fmt: skip
        out.append(
            Verdict(
                "no frame is sent from the guest's own memory", not zero_copy,
                f"vhost_net experimental_zcopytx {'is on' if zero_copy else 'is off'}",
            )
        )  # fmt: skip
    silent, frames = seen.silent, seen.frames
    add(
        "a guest that may not transmit is silent (MODE_DROP)", silent,
        lambda: silent is not None and silent[0] >= ASKED and silent[0] == silent[1],
        lambda: f"{silent and silent[0]} frames sent, {silent and silent[1]} dropped",
    )  # fmt: skip
    add(
        "our program sees each frame of the guest", frames,
        lambda: frames is not None and frames[0] == frames[1] > 0,
        lambda: f"the tap counts {frames and frames[0]}, pvm_out {frames and frames[1]}",
    )  # fmt: skip
    big = seen.unsegmented
    add(
        "offloads are carried", big,
        lambda: big is not None and big[0] > GSO and big[1] == 0,
        lambda: f"frames of {big and big[0]} bytes on average, {big and big[1]} refused",
    )  # fmt: skip
    order = seen.order
    add(
        "frames of a connection come in order", order,
        lambda: order is not None and order[0] == 0 < order[1],
        lambda: f"{order and order[0]} of {order and order[1]} segments were late at the tap "
        f"({order and order[2]} at the client)",
    )  # fmt: skip
    for who in ("PVM", "SVM"):
        stopped = seen.stopped.get(who)
        add(
            f"a stopped {who} sends nothing", stopped,
            lambda s=stopped: s[0] >= CHECKPOINTS and s[1] == 0 < s[2],  # type: ignore[misc]
            lambda s=stopped: f"{s[1]} frames in {s[0]} stops, of "  # type: ignore[misc]
            f"{s[2] if s[2] >= 0 else 'a capture that missed some'}",
        )  # fmt: skip
    made = seen.checkpoints
    add(
        "checkpoints carry what vhost has written", made,
        lambda: made is not None and made >= CHECKPOINTS and not seen.wrong,
        lambda: f"{made} checkpoints; {'; '.join(seen.wrong[:3]) or 'every byte right'}",
    )  # fmt: skip
    leaked, after = seen.leaked, seen.after
    add(
        "no frame of the SVM leaves before the takeover", leaked,
        lambda: leaked == 0 and after is not None and after[1] > 0,
        lambda: f"{leaked} before it, {after and after[1]} after it",
    )  # fmt: skip
    add(
        "a connection survives the primary's death", after,
        lambda: after is not None and after[0] and not seen.wrong,
        lambda: f"{'alive' if after and after[0] else 'DEAD'}; "
        f"{'; '.join(seen.wrong[:3]) or 'every byte right'}",
    )  # fmt: skip
    if seen.error:
        out.append(Verdict("the drill came to its end", False, seen.error))
    return out


class Stops:
    """When a QEMU was stopped, and until when: its own times, of its STOP and RESUME events."""

    def __init__(self, path: Path) -> None:
        self.spans: list[tuple[float, float]] = []
        self._since: float | None = None
        self._s = socket.socket(socket.AF_UNIX)
        self._s.settimeout(10)
        self._s.connect(str(path))
        self._s.settimeout(None)
        self._f = self._s.makefile("rwb")
        self._f.readline()
        self._f.write(b'{"execute":"qmp_capabilities"}\n')
        self._f.flush()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for line in self._f:
                self.event(json.loads(line))
        except (OSError, ValueError):
            return

    def event(self, message: dict[str, Any]) -> None:
        """Handle what QEMU sends."""
        at = message.get("timestamp", {})
        when = at.get("seconds", 0) + at.get("microseconds", 0) / 1e6
        if message.get("event") == "STOP":
            self._since = when
        elif message.get("event") == "RESUME" and self._since is not None:
            self.spans.append((self._since, when))
            self._since = None

    def close(self) -> None:
        self._s.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._s.close()


def within(frames: Frames, spans: list[tuple[float, float]], *, again: bool = False) -> int:
    """Count the guest's frames that were captured while it was stopped.

    `again`: what was held is released at the same tap, so a segment that was there before does not
    count.
    """
    known: set[bytes] = set()
    count = 0
    begins = [a for a, _ in spans]
    for t, f in sorted(frames):
        if f[6:12] != GUEST_MAC:
            continue
        # An ack and a window may have been lowered since, and the checksum with them.
        key = f[16:18] + f[26:42] if f[12:14] == b"\x08\x00" and f[23] == 6 else f
        i = bisect_right(begins, t) - 1
        if i >= 0 and begins[i] < t < spans[i][1] and not (again and key in known):
            count += 1
        known.add(key)
    return count


def late(frames: Frames) -> tuple[int, int]:
    """Count the guest's TCP segments that fill a gap which a later one has left, and all of them.

    Neither a retransmission does that, nor what is released at the same tap once more.
    """
    ends: dict[bytes, int] = {}
    gaps: dict[bytes, list[tuple[int, int]]] = {}
    count = total = 0
    for _, f in sorted(frames):
        v6 = f[12:14] == b"\x86\xdd"
        l4 = 54 if v6 else 34
        if f[6:12] != GUEST_MAC or len(f) < l4 + 20 or f[20 if v6 else 23] != 6:
            continue
        size = struct.unpack_from("!H", f, 18 if v6 else 16)[0] - (0 if v6 else 20)
        flow, seq = f[12:14] + f[l4 : l4 + 4], struct.unpack_from("!I", f, l4 + 4)[0]
        flags = f[l4 + 13]
        size += bool(flags & 0x02) + bool(flags & 0x01) - (f[l4 + 12] >> 4) * 4
        if size <= 0:
            continue
        total += 1
        ahead = (seq - ends[flow] + (1 << 31)) % (1 << 32) - (1 << 31) if flow in ends else 0
        if flags & 0x02 or flow not in ends:  # a new connection
            gaps[flow] = []
            ahead = 0
        elif ahead > 0:
            gaps[flow].append((ends[flow], seq))
        elif any((seq - a) % (1 << 32) < (b - a) % (1 << 32) for a, b in gaps[flow]):
            count += 1
        if ahead >= 0 or size + ahead > 0:
            ends[flow] = (seq + size) % (1 << 32)
    return count, total


class Drill:
    """The steps, each of which fills in what it has seen."""

    def __init__(self, lab: Lab, seen: Seen, say: Callable[[str], None]) -> None:
        self.lab, self.seen, self.say = lab, seen, say

    def run(self) -> None:
        """Run all steps; what ends them early is noted."""
        steps = (self.start, self.silence, self.protect, self.work, self.stops, self.death)
        for step in steps:
            self.say((step.__doc__ or "").split("\n")[0].rstrip("."))
            try:
                step()
            except (LabError, OSError, KeyError, ValueError) as e:
                self.seen.error = f"{step.__name__}: {type(e).__name__}: {e}"
                return

    def start(self) -> None:
        """Boot both guests."""
        lab = self.lab
        lab.up()
        p, s = (vhost.opened(lab.vm[r].pid) for r in ("primary", "secondary"))
        self.seen.opened = p, s
        self.seen.moves = self._moves()

    def _moves(self) -> bool | None:
        """Return whether QEMU says that vhost runs for the PVM's card; None: it says nothing."""
        p = self.lab.vm["primary"]
        try:
            found = p.ask("x-query-virtio")
            cards = [x["path"] for x in found if x["name"] == "virtio-net"]
            answers = [p.ask("x-query-virtio-status", path=x) for x in cards]
        except LabError:
            return None
        return bool(answers) and all(x.get("vhost-started") is True for x in answers)

    def silence(self) -> None:
        """Ask a guest that may not transmit yet."""
        lab = self.lab
        lab.start_controller("primary")
        wait_for("a controller", lambda: lab.status("primary").get("programs"), 60)
        sent, dropped = self._sent(), self._programs().get("drop_mode", 0)
        in_ns(lab.net.primary, ask_guest)

        def quiet() -> bool:
            self.seen.silent = (
                self._sent() - sent, self._programs().get("drop_mode", 0) - dropped,
            )  # fmt: skip
            return self.seen.silent[0] >= ASKED and self.seen.silent[0] == self.seen.silent[1]

        _settle(quiet)

    def protect(self) -> None:
        """Enter COLO."""
        lab = self.lab
        lab.start_controller("secondary")
        for role in ("primary", "secondary"):
            lab.wait_state(role, "protected")
        self.on_wire = lab.capture(lab.net.secondary, "uplink", "vhost-leaks", "out")

    def work(self) -> None:
        """Download and upload, byte by byte."""
        lab, seen = self.lab, self.seen
        sent, before = self._sent(), self._judged()
        rows = self._rows()
        capture = lab.capture(lab.net.primary, "tap0", "vhost-order", "in")
        behind = self._client_late()
        for i, name in enumerate(["index.html"] * 10 + ["f100k"] * 10 + ["f1m"] * 4 + ["big"] * 4):
            self._check(name, *lab.client.download(name, v6=bool(i % 2)))
        for i in range(4):
            self._upload(1 << 20, i)
        behind = self._client_late() - behind
        count, segments = late(lab.stop_capture(capture))
        seen.order = count, 0 if capture.dropped else segments, behind

        def equal() -> bool:
            seen.frames = self._sent() - sent, self._judged() - before
            return seen.frames[0] == seen.frames[1]

        _settle(equal)
        rows = {r: (n - rows.get(r, (0, 0))[0], b - rows.get(r, (0, 0))[1])
                for r, (n, b) in self._rows().items()}  # fmt: skip
        means = [b // n for r, (n, b) in rows.items() if n and r != "pass_released"]
        seen.unsegmented = max(means, default=0), rows.get("drop_gso_unsupported", (0, 0))[0]

    def stops(self) -> None:
        """Make checkpoints while clients are busy."""
        lab, seen = self.lab, self.seen
        watch = {r: Stops(lab.vm[r].lab_qmp) for r in ("primary", "secondary")}
        captures = {r: lab.capture(lab.ns(r), "tap0", f"vhost-{r}", "in") for r in watch}
        made = lab.checkpoints()
        over = threading.Event()

        def busy() -> None:
            seed = 100
            while not over.is_set():
                self._check("f1m", *lab.client.download("f1m"))
                self._upload(1 << 20, seed)
                seed += 1

        worker = threading.Thread(target=busy)
        worker.start()
        try:
            for _ in range(CHECKPOINTS):
                good, why = lab.client.uptime_page()
                if not good:
                    seen.wrong.append(f"a page of both guests at once: {why}")
                lab.ask("primary", "checkpoint")
        finally:
            over.set()
            worker.join(120)
            for w in watch.values():
                w.close()
        seen.checkpoints = lab.checkpoints() - made
        for role, who in (("primary", "PVM"), ("secondary", "SVM")):
            capture, spans = captures[role], watch[role].spans
            frames = lab.stop_capture(capture)
            seen.stopped[who] = (
                len(spans), within(frames, spans, again=role == "primary"),
                -1 if capture.dropped else from_guest(frames),
            )  # fmt: skip

    def death(self) -> None:
        """Kill the primary's QEMU under a connection."""
        lab, seen = self.lab, self.seen
        stream = EchoStream(lab.net.client)
        wait_for("answers", lambda: len(stream.stats.answered_at) > 40, 30)
        lab.vm["primary"].kill9()
        taken = lab.wait_state("secondary", "promoted", 30)
        at = float(next(h["at"] for h in taken["history"] if h["state"] == "promoted"))
        _settle(lambda: stream.stats.answered_after(at) > 50, 20)
        stats = stream.stop()
        if stats.wrong:
            seen.wrong.append(f"{stats.wrong} bytes of an echo")
        self._check("big", *lab.client.download("big"))
        self._upload(4 << 20, 1)
        frames = lab.stop_capture(self.on_wire)
        seen.leaked = from_guest(frames, before=at)
        alive = not stats.dead and stats.answered_after(at) > 50
        seen.after = alive, from_guest(frames) - seen.leaked

    # ---- witnesses

    def _sent(self) -> int:
        """Return how many frames the kernel has got from the PVM's queues."""
        text = sh("ip", "-n", self.lab.net.primary, "-s", "-j", "link", "show", "dev", "tap0")
        return int(json.loads(text)[0]["stats64"]["rx"]["packets"])

    def _rows(self) -> dict[str, tuple[int, int]]:
        rows: dict[str, tuple[int, int]] = self.lab.status("primary")["programs"]["pvm_out"]
        return rows

    def _programs(self) -> dict[str, int]:
        return {reason: n for reason, (n, _) in self._rows().items()}

    def _judged(self) -> int:
        """Return how many frames pvm_out has judged; released ones come by a second time."""
        rows = self._programs()
        return sum(rows.values()) - rows.get("pass_released", 0)

    def _client_late(self) -> int:
        """Return how many segments have come to the client after later ones."""
        text = in_ns(self.lab.net.client, lambda: Path("/proc/thread-self/net/netstat").read_text())
        return counter(text, "TcpExt", "TCPOFOQueue")

    def _check(self, name: str, size: int, wrong: int) -> None:
        if wrong or not size:
            self.seen.wrong.append(f"{wrong} bytes of {name}, of {size}")

    def _upload(self, size: int, seed: int) -> None:
        why = self.lab.client.upload(size, seed=seed)
        if why:
            self.seen.wrong.append(f"upload: {why}")


def counter(text: str, group: str, name: str) -> int:
    """Return a counter of /proc/net/netstat or snmp by its nstat name."""
    rows = [line.split()[1:] for line in text.splitlines() if line.startswith(f"{group}:")]
    return int(rows[1][rows[0].index(name)])


def ask_guest() -> None:
    """Put ARP requests for the guest's address into its tap, from the host's side."""
    asker = bytes.fromhex("020000000001")
    request = bytes(6 * [0xFF]) + asker + struct.pack("!HHHBBH", 0x0806, 1, 0x0800, 6, 4, 1)
    request += asker + socket.inet_aton("10.9.0.1") + bytes(6) + socket.inet_aton(GUEST_IP)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:
        s.bind(("tap0", 0))
        for _ in range(ASKED):
            s.send(request)
            time.sleep(0.01)


def _settle(cond: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait until something holds; what did not is for judge() to say."""
    end = time.monotonic() + seconds
    while not cond() and time.monotonic() < end:
        time.sleep(0.2)


def report(verdicts: list[Verdict], say: Callable[[str], None]) -> int:
    """Print the verdicts and return the exit code."""
    for v in verdicts:
        say(str(v))
    failed = sum(not v.passed for v in verdicts)
    say(f"{failed} of {len(verdicts)} expectations not met" if failed else "all expectations met")
    return FAILED if failed else PASSED


def main(directory: Path, queues: int = 1, *, control: bool = False) -> int:
    """Run the drill; return 0 if all expectations were met, 1 if not, 2 if it cannot run here."""

    def say(text: str) -> None:
        print(text, flush=True)

    why = missing(control)
    if why:
        say(why)
        return CANNOT
    seen = Seen()
    began = time.monotonic()

    def progress(text: str) -> None:
        say(f"[{time.monotonic() - began:6.1f} s] {text}")

    lab = Lab(directory, tag="cxvhd", queues=queues, vhost=not control, say=progress)
    try:
        Drill(lab, seen, progress).run()
    finally:
        lab.down()
    about = f"{os.uname().release}, QEMU {'.'.join(map(str, vms.qemu_version()))}, {lab.accel}"
    say(f"\nvhost {'off (control)' if control else 'on'}, {queues} queues; Linux {about}")
    return report(judge(seen, queues, control=control, zero_copy=vhost.zero_copy()), say)
