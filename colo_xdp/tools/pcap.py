# SPDX-License-Identifier: GPL-2.0-or-later
"""Read and write capture files: the only module that imports scapy, for its readers and writers."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ETHERNET = 1  # LINKTYPE_ETHERNET


class _Complaints(logging.Handler):
    """Collect scapy's warnings.

    scapy only warns about a damaged block, and continues or ends as if nothing had happened.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.first = self.first or record.getMessage()


class PcapError(ValueError):
    """A capture cannot be read; the text names the file and the error."""


@dataclass(frozen=True, slots=True)
class CaptureRecord:
    """One captured frame. `ts_ns` is unix time, ns."""

    ts_ns: int
    data: bytes


def read(path: str | Path) -> Iterator[CaptureRecord]:
    """Yield the frames of a pcap or pcapng file, also gzipped.

    Raises PcapError: no such file, not a capture, not Ethernet, or a truncated frame (take captures
    with the full length: tcpdump -s 0).
    """
    from scapy.error import Scapy_Exception
    from scapy.utils import RawPcapNgReader, RawPcapReader

    n = 0
    log, said = logging.getLogger("scapy.runtime"), _Complaints()
    handlers, propagate = log.handlers, log.propagate
    log.handlers, log.propagate = [said], False
    try:
        with RawPcapReader(str(path)) as opened:
            reader: Any = opened
            ng = isinstance(reader, RawPcapNgReader)
            while True:
                try:
                    data, meta = reader._read_packet()
                except EOFError:
                    if said.first:
                        raise PcapError(f"{path}: damaged after packet {n}: {said.first}") from None
                    return
                n += 1
                link = meta.linktype if ng else reader.linktype
                if link != ETHERNET:
                    raise PcapError(f"{path}: packet {n}: link type {link}, not Ethernet (1)")
                if meta.wirelen is not None and len(data) < meta.wirelen:
                    raise PcapError(f"{path}: packet {n} was cut to {len(data)} of {meta.wirelen}")
                yield CaptureRecord(_time(meta, ng, getattr(reader, "nano", False)), bytes(data))
    except OSError as e:
        raise PcapError(f"{path}: {e.strerror or e}") from e
    except (Scapy_Exception, ValueError, TypeError, IndexError, KeyError, AttributeError) as e:
        if isinstance(e, PcapError):
            raise
        raise PcapError(f"{path}: not a capture, or damaged after packet {n}: {e}") from e
    except Exception as e:  # struct.error, and whatever else damaged blocks cause in the reader
        raise PcapError(f"{path}: damaged after packet {n}: {e!r}") from e
    finally:
        log.handlers, log.propagate = handlers, propagate


def _time(meta: Any, ng: bool, nano: bool) -> int:
    if not ng:
        return int(meta.sec) * 1_000_000_000 + int(meta.usec) * (1 if nano else 1000)
    if meta.tshigh is None or meta.tslow is None:
        return 0  # a simple packet block has no time
    ticks = (int(meta.tshigh) << 32) + int(meta.tslow)
    return ticks * 1_000_000_000 // int(meta.tsresol)


class Writer:
    """Write a pcapng file with one interface per guest and comments on packets, for Wireshark.

    The file appears under its name when it is complete.
    """

    def __init__(self, path: str | Path) -> None:
        from scapy.utils import RawPcapNgWriter

        self.path = Path(path)
        self._part = self.path.with_name(f".{self.path.name}.part")
        try:
            self._writer = RawPcapNgWriter(str(self._part))
        except OSError as e:
            raise PcapError(f"{self.path}: {e.strerror or e}") from e
        self._writer.linktype = ETHERNET
        self._writer.write_header(None)
        self.frames = 0

    def put(self, guest: str, ts_ns: int, frame: bytes, comment: str = "") -> None:
        """Write one frame; `guest` names the interface ("pvm", "svm")."""
        self._writer._write_packet(
            frame,
            linktype=ETHERNET,
            sec=ts_ns / 1e9,
            ifname=guest.encode(),
            comments=[comment.encode()] if comment else None,
        )
        self.frames += 1

    def close(self) -> None:
        """Complete the file."""
        self._writer.close()
        os.replace(self._part, self.path)

    def abandon(self) -> None:
        """Leave no file behind."""
        self._writer.close()
        self._part.unlink(missing_ok=True)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, value: object, trace: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()
