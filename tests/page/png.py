# SPDX-License-Identifier: GPL-2.0-or-later
"""Pictures of a browser as pixels, and smaller than the browser writes them."""

from __future__ import annotations

import struct
import zlib
from collections import Counter
from typing import NamedTuple

MAGIC = b"\x89PNG\r\n\x1a\n"
Pixel = bytes


class Image(NamedTuple):
    width: int
    height: int
    pixels: list[Pixel]  # of three bytes

    def colours(self) -> Counter[Pixel]:
        return Counter(self.pixels)


def _paeth(a: int, b: int, c: int) -> int:
    pa, pb, pc = abs(b - c), abs(a - c), abs(a + b - 2 * c)
    return a if pa <= pb and pa <= pc else b if pb <= pc else c


def read(data: bytes) -> Image:
    """Decode what Chromium writes: 8 bits for each channel, not interlaced."""
    assert data.startswith(MAGIC)
    at, packed, head = 8, b"", b""
    while at < len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + size]
        head, packed = (body if kind == b"IHDR" else head), packed + body * (kind == b"IDAT")
        at += 12 + size
    width, height, depth, colour, *_, interlaced = struct.unpack(">IIBBBBB", head)
    assert (depth, interlaced) == (8, 0) and colour in (2, 6)
    n = {2: 3, 6: 4}[colour]
    raw, stride, before = zlib.decompress(packed), width * n, bytearray(width * n)
    pixels: list[Pixel] = []
    for y in range(height):
        kind_of, line = raw[y * (stride + 1)], bytearray(raw[y * (stride + 1) + 1 :][:stride])
        for i in range(stride if kind_of else 0):
            a, b, c = (line[i - n], before[i], before[i - n]) if i >= n else (0, before[i], 0)
            line[i] = (line[i] + (0, a, b, (a + b) // 2, _paeth(a, b, c))[kind_of]) & 255
        pixels += [bytes(line[i : i + 3]) for i in range(0, stride, n)]
        before = line
    return Image(width, height, pixels)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def write(image: Image) -> bytes:
    """Encode with a palette of the most frequent colours; others become the nearest of them."""
    palette = [c for c, _ in image.colours().most_common(256)]
    index = {c: i for i, c in enumerate(palette)}

    def nearest(c: Pixel) -> int:
        if c not in index:
            index[c] = min(
                range(len(palette)),
                key=lambda i: sum((x - y) ** 2 for x, y in zip(palette[i], c, strict=True)),
            )
        return index[c]

    w = image.width
    rows = (bytes(map(nearest, image.pixels[y * w : y * w + w])) for y in range(image.height))
    head = struct.pack(">IIBBBBB", w, image.height, 8, 3, 0, 0, 0)
    return (
        MAGIC
        + _chunk(b"IHDR", head)
        + _chunk(b"PLTE", b"".join(palette))
        + _chunk(b"IDAT", zlib.compress(b"".join(b"\0" + r for r in rows), 9))
        + _chunk(b"IEND", b"")
    )
