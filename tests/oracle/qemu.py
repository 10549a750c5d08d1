# SPDX-License-Identifier: GPL-2.0-or-later
"""Run the corpus through the installed QEMU's colo-compare and filter-rewriter, without a guest.

python -m tests.oracle.qemu   writes qemu-decisions.toml (what QEMU did) and DECISIONS.md
"""

from __future__ import annotations

import contextlib
import json
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from colo_xdp.colo_proxy.packet_stream import PacketDecoder, StreamPacket, encode
from colo_xdp.tools import corpus
from colo_xdp.tools.corpus import Scenario, ScenarioStep
from colo_xdp.tools.corpus.play import Labels, changed

QEMU = "qemu-system-x86_64"
HERE = Path(__file__).parent
RECORDED = HERE / "qemu-decisions.toml"
WINDOW_S = 0.06  # as long as a step lasts in our own player
PATIENCE_S = 15.0
GONE = "QEMU aborts"


class Gone(Exception):
    """QEMU has exited."""


class Channel:
    """A socket chardev of a filter or of colo-compare, without virtio-net headers."""

    def __init__(self, path: Path, qemu: subprocess.Popen[bytes]) -> None:
        self._packets = PacketDecoder(vnet_hdr=False)
        end = time.monotonic() + PATIENCE_S
        while True:
            self.socket = socket.socket(socket.AF_UNIX)
            try:
                self.socket.connect(str(path))
                break
            except OSError:
                self.socket.close()
                if qemu.poll() is not None or time.monotonic() > end:
                    raise
                with contextlib.suppress(subprocess.TimeoutExpired):
                    qemu.wait(0.01)
        self.socket.settimeout(PATIENCE_S)

    def send(self, frame: bytes) -> None:
        try:
            # no filter writes an empty packet, so encode() does not; QEMU takes one
            data = encode(StreamPacket(frame), vnet_hdr=False) if frame else bytes(4)
            self.socket.sendall(data)
        except (BrokenPipeError, ConnectionError) as e:
            raise Gone from e

    def receive(self) -> list[bytes]:
        """Return what is readable now, whole frames only. Raises Gone at the end of file."""
        try:
            got = self.socket.recv(1 << 18)
        except ConnectionError as e:
            raise Gone from e
        if not got:
            raise Gone
        self._packets.receive(got)
        return [p.frame for p in iter(self._packets.next_packet, None)]


@contextlib.contextmanager
def running(
    arguments: list[str], names: str, sockets: Sequence[str] = ()
) -> Iterator[dict[str, Channel]]:
    """Start QEMU with a socket chardev for each letter of `names`, and connect to all.

    `sockets`: others that the arguments make; paths are relative to QEMU's directory.
    """
    where = Path(tempfile.mkdtemp(prefix="colo-oracle."))
    chardevs = [
        x for n in names
        for x in ("-chardev", f"socket,id={n},path={where}/{n},server=on,wait=off")
    ]  # fmt: skip
    with open(where / "log", "wb") as log:
        process = subprocess.Popen(
            [QEMU, "-nodefaults", "-display", "none", *chardevs, *arguments],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=where,
        )  # fmt: skip
    channels: dict[str, Channel] = {}
    try:
        channels |= {n: Channel(where / n, process) for n in (*names, *sockets)}
        yield channels
    finally:
        for c in channels.values():
            c.socket.close()
        process.kill()
        process.wait(PATIENCE_S)
        shutil.rmtree(where, ignore_errors=True)


def ask(channel: Channel, command: str, **arguments: Any) -> Any:
    """Execute one QMP command on a socket of QMP; the first one has to be qmp_capabilities.

    Raises RuntimeError with QEMU's answer.
    """
    message = {"execute": command, "arguments": arguments}
    with channel.socket.makefile("rwb") as f:
        if command == "qmp_capabilities":
            f.readline()
        f.write(json.dumps(message).encode() + b"\n")
        f.flush()
        while "event" in (answer := json.loads(f.readline())):
            pass
    if "error" in answer:
        raise RuntimeError(f"{command}: {answer['error']}")
    return answer["return"]


def _listen(channels: dict[str, Channel], seconds: float) -> Iterator[tuple[str, bytes]]:
    end = time.monotonic() + seconds
    with selectors.DefaultSelector() as sel:
        for name, c in channels.items():
            sel.register(c.socket, selectors.EVENT_READ, name)
        while (left := end - time.monotonic()) > 0:
            for key, _ in sel.select(left):
                for frame in channels[key.data].receive():
                    yield key.data, frame


def _compare(s: Scenario) -> Iterator[str]:
    options = (
        f"compare_timeout={s.compare_timeout},expired_scan_cycle=200,"
        f"max_queue_size={s.max_queue_size}"
    )
    arguments = [
        "-machine", "none", "-S", "-object", "iothread,id=io", "-object",
        "colo-compare,id=c,primary_in=p,secondary_in=s,outdev=o,notify_dev=x,iothread=io,"
        + options,
    ]  # fmt: skip
    labels = Labels()
    with running(arguments, "psox") as ch:
        heard = {"o": ch["o"], "x": ch["x"]}
        list(_listen(heard, WINDOW_S))  # until its iothread serves the sockets
        for step in s.steps:
            words: list[str] = []
            _say(step, ch, labels)
            seconds = int(step.text) / 1000 if step.who == "wait" else WINDOW_S
            for name, frame in _listen(heard, seconds):
                if name == "o":
                    words.append(labels.name(frame))
                elif "checkpoint" not in words:  # it repeats the request every scan cycle
                    words.append("checkpoint")
            yield " ".join(words)


def _say(step: ScenarioStep, ch: dict[str, Channel], labels: Labels) -> None:
    if step.who == "checkpoint":
        ch["x"].send(b"COLO_CHECKPOINT")
    elif step.who != "wait":
        for frame in step.frames():
            if step.who == "P":
                labels.sent.append(frame)
            ch[step.who.lower()].send(frame)


def _rewrite(s: Scenario) -> Iterator[str]:
    arguments = [
        "-machine", "pc", "-accel", "tcg", "-m", "16", "-device", "rtl8139,netdev=n,romfile=",
        "-netdev", "stream,id=n,server=on,addr.type=unix,addr.path=net",
    ]  # fmt: skip
    for name, queue, way in (
        ("a", "tx", "indev"), ("d", "rx", "outdev"), ("", "all", ""),
        ("b", "tx", "outdev"), ("c", "rx", "indev"),
    ):  # fmt: skip
        if name:
            what = f"filter-redirector,id=f{name},netdev=n,queue={queue},{way}={name}"
        else:
            what = "filter-rewriter,id=rew,netdev=n,queue=all"
        arguments += ["-object", what]
    with running(arguments, "abcd") as ch:
        list(_listen({"b": ch["b"], "d": ch["d"]}, WINDOW_S))
        for step in s.steps:
            if step.who == "checkpoint":  # only a COLO migration triggers it
                yield ""
                continue
            words = []
            into, out = ("a", "b") if step.who == "C" else ("c", "d")
            for frame in step.frames():
                ch[into].send(frame)
                got = next((f for _, f in _listen({out: ch[out]}, 5 * WINDOW_S)), None)
                words.append("nothing" if got is None else changed(frame, got))
            yield " ".join(words)


def decide(s: Scenario) -> list[str]:
    """Return what happened at each step; it ends with GONE if QEMU exited."""
    out: list[str] = []
    try:
        for what in _rewrite(s) if s.rewrites else _compare(s):
            out.append(what)
    except Gone:
        out.append(GONE)
    return out


def version() -> str:
    """Return the version of the installed QEMU."""
    text = subprocess.run([QEMU, "--version"], capture_output=True, text=True, timeout=30).stdout
    return text.splitlines()[0]


def decide_all(scenarios: list[Scenario], jobs: int = 4) -> dict[str, list[str]]:
    """Return the decisions by scenario. QEMU idles most of the time, so several run at once."""
    with ThreadPoolExecutor(jobs) as pool:
        return dict(zip((s.name for s in scenarios), pool.map(decide, scenarios), strict=True))


def main() -> None:
    """Record the decisions."""
    chosen = [s for s in corpus.load() if not sys.argv[1:] or s.name in sys.argv[1:]]
    found = decide_all(chosen)
    if sys.argv[1:]:
        for name, steps in found.items():
            print(name, steps)
        return
    lines = [f"# What {version()} did; by tests/oracle/qemu.py.", ""]
    for name, steps in found.items():
        lines += [f"{name} = [", *(f'  "{x}",' for x in steps), "]"]
    RECORDED.write_text("\n".join(lines) + "\n")
    from .table import write

    write()


if __name__ == "__main__":
    main()
