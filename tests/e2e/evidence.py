# SPDX-License-Identifier: GPL-2.0-or-later
"""Keep evidence of a chaos round in which a client got a wrong byte: who sent it, and when.

Each round is captured completely on both taps, both ends of the peer link and both client wires. A
clean round loses its captures; those of any other are kept with the controllers' logs, and
`explain` reports which frame brought the byte, from which guest, in which epoch and mode.
"""

from __future__ import annotations

import re
import shutil
import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from colo_xdp.lab.capture import GUEST_MAC, Capture, from_guest
from colo_xdp.lab.pair import Lab

HOSTS = ("primary", "secondary")  # by their role in the files
AROUND_S = 5.0  # how long before the byte was read frames of the connection are searched
SHOWN = 40  # number of lines in the story
EPOCH_TAG = 0x88A8  # of the peer link: kind << 13 | epoch
EPOCH_BITS = 0x0FFF
M32 = 0xFFFFFFFF
_MODE = re.compile(r"^(\S+ \S+),(\d{3}) \w+ \S+ data path: (.*)$", re.M)


@dataclass(frozen=True, slots=True)
class Wrong:
    """A byte that a client should not have received. `at`: unix time of the read, s."""

    what: str
    at: float
    server_port: int
    client_port: int
    got: bytes  # from the wrong byte on
    want: bytes
    position: int | None = None  # of that byte in the server's stream; None: unknown


@dataclass(frozen=True, slots=True)
class Segment:
    """A TCP segment of the guest in a capture. `epoch`: from the peer link's tag; -1: no tag."""

    at: float
    where: str
    epoch: int
    sport: int
    dport: int
    seq: int
    ack: int
    flags: int
    data: bytes

    def covers(self, seq: int) -> bool:
        return (seq - self.seq) & M32 < len(self.data)


def frames(raw: bytes) -> Iterator[tuple[float, bytes]]:
    """Yield (unix time in s, frame) of a nanosecond pcap; a truncated one ends it."""
    at = 24
    while at + 16 <= len(raw):
        s, ns, have, _len = struct.unpack_from("<IIII", raw, at)
        if at + 16 + have > len(raw):
            return
        yield s + ns / 1e9, raw[at + 16 : at + 16 + have]
        at += 16 + have


def segment(where: str, at: float, f: bytes) -> Segment | None:
    """Return the guest's TCP segment in a frame; None: something else."""
    if len(f) < 54 or f[6:12] != GUEST_MAC:
        return None
    epoch, pos = -1, 12
    while f[pos : pos + 2] in (b"\x88\xa8", b"\x81\x00"):
        proto, tci = struct.unpack_from("!HH", f, pos)
        if proto == EPOCH_TAG:
            epoch = tci & EPOCH_BITS
        pos += 4
    ip, end = pos + 2, len(f)
    if f[pos : pos + 2] == b"\x08\x00" and f[ip + 9] == 6:
        l4 = ip + (f[ip] & 15) * 4
        length = int.from_bytes(f[ip + 2 : ip + 4], "big")
    elif f[pos : pos + 2] == b"\x86\xdd" and f[ip + 6] == 6:
        l4 = ip + 40
        length = 40 + int.from_bytes(f[ip + 4 : ip + 6], "big")
    else:
        return None
    if l4 + 20 > len(f):
        return None
    end = min(end, ip + length) if length > 40 else end
    sport, dport, seq, ack, doff, flags = struct.unpack_from("!HHIIBB", f, l4)
    data = f[l4 + (doff >> 4) * 4 : end]
    return Segment(at, where, epoch, sport, dport, seq, ack, flags, data)


def modes(log: str) -> list[tuple[float, str]]:
    """Return (unix time, "mode M, epoch N") from a controller's log at level DEBUG."""
    out = []
    for day, ms, what in _MODE.findall(log):
        out.append((datetime.fromisoformat(day).timestamp() + int(ms) / 1000, what))
    return out


def _mode_at(log: str, at: float) -> str:
    before = [what for t, what in modes(log) if t <= at + 0.001]
    return before[-1] if before else "mode not known"


def _place(segs: list[Segment], w: Wrong) -> int | None:
    """Return the wrong byte's sequence number, in the client's numbers."""
    wire = [s for s in segs if s.where.startswith("client")]
    if w.position is not None:
        for s in wire:
            if s.flags & 0x12 == 0x12:
                return (s.seq + 1 + w.position) & M32
    for s in reversed(wire):
        found = s.data.find(w.got[:16]) if w.got else -1
        if found >= 0:
            return (s.seq + found) & M32
    return None


def explain(captures: Iterable[tuple[str, bytes]], logs: dict[str, str], w: Wrong) -> list[str]:
    """Tell the story of a wrong byte.

    captures: ("tap primary", pcap) and so on; "client primary" is the client's wire to that host.
    logs: the controllers' logs, by host.
    """
    segs = [
        s
        for where, raw in captures
        for at, f in frames(raw)
        if (s := segment(where, at, f)) is not None
        and (s.sport, s.dport) == (w.server_port, w.client_port)
        and w.at - AROUND_S - 30 < at < w.at + AROUND_S
    ]
    segs.sort(key=lambda s: s.at)
    out = [f"{w.what}: got {w.got[:16].hex()}, wanted {w.want[:16].hex()}, read at {w.at:.6f}"]
    seq = _place(segs, w)
    if seq is None:
        return [*out, f"no capture has a frame of port {w.client_port} with it"]
    brought = None
    story = []
    for s in segs:
        if s.covers(seq):
            n = min(16, len(s.data) - ((seq - s.seq) & M32))
            have = s.data[(seq - s.seq) & M32 :][:n]
        elif s.where == "tap secondary" or s.where == "tap primary":
            # a guest with numbers of its own: identified by content
            found = max(s.data.find(w.got[:16]) if w.got else -1, s.data.find(w.want[:16] or b"?"))
            if found < 0:
                continue
            have = s.data[found:][:16]
        else:
            continue
        right = have == w.want[: len(have)]
        if not right and s.where.startswith("client") and s.at <= w.at and brought is None:
            brought = s
        epoch = f" epoch tag {s.epoch}" if s.epoch >= 0 else ""
        story.append(
            f"{s.at:.6f} {s.where:<16} seq {s.seq} ack {s.ack} flags {s.flags:02x} len "
            f"{len(s.data)}{epoch}: {'right' if right else 'WRONG ' + have.hex()}"
        )
    if brought is None:
        out.append("every frame on the client's wires has the right bytes there")
    else:
        host = brought.where.removeprefix("client ")
        out.append(
            f"brought by the frame of {brought.at:.6f} from the {host} host's guest, seq "
            f"{brought.seq}, len {len(brought.data)}"
        )
        out += [f"{h}: {_mode_at(logs[h], brought.at)}" for h in HOSTS if h in logs]
    return out + story[:SHOWN]


class Evidence:
    """The captures of one round."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        net = lab.net
        spots = (
            ("client primary", net.client, "to-p", "in"),
            ("client secondary", net.client, "to-s", "in"),
            ("tap primary", net.primary, "tap0", "inout"),
            ("tap secondary", net.secondary, "tap0", "inout"),
            ("peer primary", net.primary, "peer0", "inout"),
            ("peer secondary", net.secondary, "peer0", "inout"),
        )
        self._captures: dict[str, Capture] = {
            name: lab.capture(ns, dev, f"round {name}".replace(" ", "-"), way, whole=True)
            for name, ns, dev, way in spots
        }
        self.began = time.time()

    def stop(self) -> tuple[list[tuple[float, str]], list[str]]:
        """End the captures; return (time, host) of each frame of a guest on the clients' wires, in
        order.

        It also returns which captures are no witness because frames were lost.
        """
        seen: list[tuple[float, str]] = []
        lost = []
        for name, c in self._captures.items():
            got = self.lab.stop_capture(c)
            if name.startswith("client"):
                host = name.split()[1]
                seen += [(at, host) for at, f in got if from_guest([(at, f)])]
                if c.dropped:
                    lost.append(f"the capture of {name} lost {c.dropped} frames")
        seen.sort()
        return seen, lost

    def _logs(self) -> dict[str, str]:
        logs = {}
        for host in HOSTS:
            path = self.lab.controller_log(host)
            if path.exists():
                logs[host] = path.read_text(errors="replace")
        return logs

    def explain(self, w: Wrong) -> list[str]:
        files = [(name, c.path.read_bytes()) for name, c in self._captures.items()]
        return explain(files, self._logs(), w)

    def keep(self, to: Path) -> None:
        """Keep everything there is for later inspection."""
        to.mkdir(parents=True, exist_ok=True)
        for c in self._captures.values():
            shutil.copy(c.path, to / c.path.name)
        for host, text in self._logs().items():
            (to / f"{host}.controller.log").write_text(text)

    def forget(self) -> None:
        """Discard the captures of a clean round."""
        for c in self._captures.values():
            c.path.unlink(missing_ok=True)
