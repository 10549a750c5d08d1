# SPDX-License-Identifier: GPL-2.0-or-later
"""The last verified bytes of a stream, to compare retransmissions with.

Pieces are kept as they came, so that a large frame's payload is not copied again; small
ones are joined, so that a piece's overhead (some 60 bytes) stays small beside its bytes.
"""

from __future__ import annotations

JOIN = 8192  # bytes: pieces shorter than this are joined


class History:
    """A byte string that grows at its end and is cut at both."""

    __slots__ = ("_pieces", "size")

    def __init__(self) -> None:
        self._pieces: list[bytes | bytearray] = []  # a deque takes 600 bytes when empty
        self.size = 0

    def __len__(self) -> int:
        return self.size

    def add(self, data: bytes) -> None:
        """Append."""
        n = len(data)
        self.size += n
        if n < JOIN:
            pieces = self._pieces
            if pieces:
                last = pieces[-1]
                if type(last) is bytearray and len(last) < JOIN:
                    last += data
                    return
            pieces.append(bytearray(data))
        else:
            self._pieces.append(data)

    def clear(self) -> None:
        """Forget all."""
        self._pieces.clear()
        self.size = 0

    def trim(self, keep: int) -> None:
        """Forget the oldest bytes down to `keep`, or a piece above it."""
        old = 0
        for piece in self._pieces:
            if self.size <= keep or self.size - len(piece) < keep:
                break
            self.size -= len(piece)
            old += 1
        del self._pieces[:old]

    def cut(self, n: int) -> None:
        """Forget the newest `n` bytes, or all there are."""
        while n > 0 and self._pieces:
            last = self._pieces.pop()
            if len(last) > n:
                self._pieces.append(last[:-n])
                self.size -= n
                return
            n -= len(last)
            self.size -= len(last)

    def back(self, distance: int, n: int) -> bytes:
        """At most `n` bytes from `distance` (at most the size) before the end on."""
        pieces: list[bytes | bytearray] = []  # newest first
        skip = 0
        for piece in reversed(self._pieces):
            pieces.append(piece)
            if len(piece) >= distance:
                skip = len(piece) - distance
                break
            distance -= len(piece)
        out = bytearray()
        for piece in reversed(pieces):
            out += piece[skip : skip + n - len(out)]
            skip = 0
            if len(out) >= n:
                break
        return bytes(out)
