# SPDX-License-Identifier: GPL-2.0-or-later
"""Read a block of an NBD export: whether the server and its storage still answer.

The messages are those of the NBD protocol (doc/proto.md of the NetworkBlockDevice project): fixed
newstyle negotiation with NBD_OPT_GO, then one NBD_CMD_READ. All numbers are big-endian.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct

GREETING, OPTION, REPLY = b"NBDMAGIC", b"IHAVEOPT", 0x3E889045565A9
FIXED_NEWSTYLE, NO_ZEROES = 1, 2
OPT_ABORT, OPT_GO = 2, 7
REP_ACK, REP_INFO, REP_ERROR = 1, 3, 1 << 31
REQUEST, SIMPLE_REPLY = 0x25609513, 0x67446698
CMD_READ, CMD_DISC = 0, 2
INFO_EXPORT = 0
BLOCK = 4096
MAX_DATA = 65536  # of one answer in the negotiation


class NbdError(RuntimeError):
    """The server does not do what it is asked for; the text says why."""


async def read(host: str, port: int, export: str, place: float, answer_s: float) -> None:
    """Connect, read a block at this place (0 to 1) of the export, and disconnect.

    The server has to answer within `answer_s`; for its storage the deadline is the caller's. Not a
    flush: after the first copy that may take minutes, though nothing is wrong. Raises NbdError,
    OSError (TimeoutError), or EOFError when the server hangs up.
    """
    async with asyncio.timeout(answer_s):
        reader, writer = await asyncio.open_connection(host, port)
    try:
        async with asyncio.timeout(answer_s):
            size = await _negotiate(reader, writer, export)
        at, length = int(size * place) // BLOCK * BLOCK, min(BLOCK, size)
        writer.write(struct.pack("!IHHQQI", REQUEST, 0, CMD_READ, 1, at, length))
        magic, error, _ = struct.unpack("!IIQ", await reader.readexactly(16))
        if magic != SIMPLE_REPLY:
            raise NbdError("no NBD server: its answer to a read is not one")
        if error:
            raise NbdError(f"export {export} cannot be read (error {error})")
        await reader.readexactly(length)
        writer.write(struct.pack("!IHHQQI", REQUEST, 0, CMD_DISC, 2, 0, 0))
        await writer.drain()
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _negotiate(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, export: str
) -> int:
    """Ask for the export; return its size in bytes."""
    greeting, option, flags = struct.unpack("!8s8sH", await reader.readexactly(18))
    if (greeting, option) != (GREETING, OPTION) or not flags & FIXED_NEWSTYLE:
        raise NbdError("no NBD server (fixed newstyle)")
    name = export.encode()
    body = struct.pack(f"!I{len(name)}sH", len(name), name, 0)
    writer.write(struct.pack("!I", FIXED_NEWSTYLE | flags & NO_ZEROES))
    writer.write(struct.pack("!8sII", OPTION, OPT_GO, len(body)) + body)
    size_of_export = 0
    while True:
        magic, _, kind, size = struct.unpack("!QIII", await reader.readexactly(20))
        if magic != REPLY or size > MAX_DATA:
            raise NbdError("no NBD server: its answer to NBD_OPT_GO is not one")
        data = await reader.readexactly(size)
        if kind & REP_ERROR:
            writer.write(struct.pack("!8sII", OPTION, OPT_ABORT, 0))
            await writer.drain()
            said = data.decode(errors="replace") or f"error {kind - REP_ERROR}"
            raise NbdError(f"export {export}: {said}")
        if kind == REP_ACK:
            return size_of_export
        if kind != REP_INFO:
            raise NbdError(f"no NBD server: an answer of type {kind}")
        if size >= 10 and data[:2] == INFO_EXPORT.to_bytes(2, "big"):
            size_of_export = int.from_bytes(data[2:10], "big")
