# SPDX-License-Identifier: GPL-2.0-or-later
"""Write what a filter of a running QEMU sends on its socket to a capture file.

Under QEMU's own COLO a guest's output does not reach its tap as it is: the filters take it away
before. A filter-mirror in front of them has it, and `colo-xdp replay` wants it.

QEMU writes to that socket in its main loop and waits for whoever reads slowly. So this reads before
it does anything else, and closes the socket when a limit is reached.
"""

from __future__ import annotations

import contextlib
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from ..colo_proxy.packet_stream import PacketDecoder, PacketStreamError
from .pcap import Writer

CONNECT_S = 5.0
POLL_S = 0.5
PIECE = 1 << 20  # bytes read at once


class FilterCaptureError(RuntimeError):
    """The socket cannot be read; the text says why."""


@dataclass(slots=True)
class FilterCaptured:
    """What was captured, and why it ended."""

    frames: int = 0
    octets: int = 0  # of frames, without virtio-net headers
    ended: str = ""


def _connect(path: Path) -> socket.socket:
    s = socket.socket(socket.AF_UNIX)
    s.settimeout(CONNECT_S)
    try:
        s.connect(str(path))
    except OSError as e:
        s.close()
        raise FilterCaptureError(f"{path}: {e.strerror or e}") from e
    s.settimeout(POLL_S)
    return s


def capture(
    path: Path, file: Path, *, guest: str, vnet_hdr: bool, seconds: float, max_bytes: int
) -> FilterCaptured:
    """Read packets of the socket chardev at `path`, until a limit, the end or an interrupt (^C).

    `guest` names the interface in the file ("pvm", "svm"); `vnet_hdr`: whether the filter has
    vnet_hdr_support=on; `max_bytes` of frames. Frames that were read at once have one time. Raises
    FilterCaptureError and PcapError; without a frame no file is written. A stream that turns out to
    be broken ends the capture, and what came before is kept.
    """
    done = FilterCaptured(ended="interrupted")
    with contextlib.closing(_connect(path)) as s, Writer(file) as writer:
        with contextlib.suppress(KeyboardInterrupt):
            _read(s, writer, done, guest, PacketDecoder(vnet_hdr=vnet_hdr), seconds, max_bytes)
        if not done.frames:
            raise FilterCaptureError(f"{path}: no frame came ({done.ended})")
    return done


def _read(
    s: socket.socket,
    writer: Writer,
    done: FilterCaptured,
    guest: str,
    decoder: PacketDecoder,
    seconds: float,
    max_bytes: int,
) -> None:
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            try:
                data = s.recv(PIECE)
            except TimeoutError:
                continue
            now_ns = time.time_ns()
            if not data:
                decoder.end()
                done.ended = "QEMU has closed the socket"
                return
            decoder.receive(data)
            while (packet := decoder.next_packet()) is not None:
                if done.octets + len(packet.frame) > max_bytes:
                    done.ended = "the file's limit is reached"
                    return
                writer.put(guest, now_ns, packet.frame)
                done.frames += 1
                done.octets += len(packet.frame)
        done.ended = "time is over"
    except PacketStreamError as e:
        done.ended = f"the stream is broken: {e}"
    except OSError as e:
        done.ended = f"the socket: {e.strerror or e}"
