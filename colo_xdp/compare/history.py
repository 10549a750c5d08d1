# SPDX-License-Identifier: GPL-2.0-or-later
"""The last verified bytes of each stream, against which retransmissions are compared.

Large pieces are kept as they came, so that their payload is not copied again. Small ones are
joined, so that a piece's overhead (some 60 bytes) stays small relative to its bytes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

JOIN = 8192  # bytes: shorter pieces are joined


class History:
    """Byte string that grows at its end and is cut at both ends."""

    __slots__ = ("_pieces", "charged", "size")

    def __init__(self) -> None:
        self._pieces: list[bytes | bytearray] = []  # a deque takes 600 bytes when empty
        self.size = 0
        self.charged = 0  # bytes charged to the budget

    def __len__(self) -> int:
        return self.size

    def add(self, data: bytes) -> None:
        """Append bytes."""
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
        """Forget all bytes."""
        self._pieces.clear()
        self.size = 0

    def trim(self, keep: int) -> None:
        """Forget the oldest pieces, but keep at least `keep` bytes."""
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
        """Return at most `n` bytes, starting `distance` (at most the size) before the end."""
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


class HistoryBudget:
    """Budget for histories: `each` per stream plus a quarter of slack, `total` for all.

    evicted() is called when one stream's history is given up in favour of others.
    """

    def __init__(self, each: int, total: int, evicted: Callable[[], None]) -> None:
        self._each, self._total, self._evicted = each, total, evicted
        self._histories: OrderedDict[History, None] = OrderedDict()  # last grown at the end
        self.charged = 0

    def charge(self, history: History) -> None:
        """Charge a history that has outgrown its charge, or trim it."""
        full = self._each + self._each // 4
        n = history.size
        if n > full:
            history.trim(self._each)
            n = history.size
        charged = max(n, min(max(2 * history.charged, 4096), full))
        self.charged += charged - history.charged
        history.charged = charged
        self._histories[history] = None
        self._histories.move_to_end(history)
        while self.charged > self._total and len(self._histories) > 1:
            self._evicted()
            self.drop(next(iter(self._histories)))

    def drop(self, history: History) -> None:
        """Give up a history."""
        if history.charged:
            self.charged -= history.charged
            history.charged = 0
            history.clear()
            del self._histories[history]

    def clear(self) -> None:
        """Forget all histories."""
        self._histories.clear()
        self.charged = 0
