# SPDX-License-Identifier: GPL-2.0-or-later
"""The maps of bpf/lib/addresses.h as the controller sees them.

Decides which addresses are announced at a takeover, handed over with a checkpoint, and forgotten
with age.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from typing import Any, Protocol

from .. import abi
from ..net.address_claims import mac_bytes, mac_key
from ..net.announce import Own

#: An address that the guest has not claimed for this long is not announced, a MAC not mirrored to.
#: Guests claim their addresses each time a neighbour looks for them.
FORGET_S = 3600.0
#: A MAC that has been silent for longer is in no switch's table (802.1D ageing), so there is
#: nothing to refresh.
SWITCHES_S = 300.0

_KEY = abi.ADDRESS.size
_MAC = 6


class Table(Protocol):
    """A map like maps.Map."""

    @property
    def info(self) -> Any: ...
    def items(self) -> Iterable[tuple[bytes, bytes]]: ...
    def get(self, key: bytes) -> bytes | None: ...
    def set(self, key: bytes, value: bytes) -> None: ...
    def delete(self, key: bytes) -> bool: ...


class AddressTable:
    """The guest's addresses.

    Where a method takes `epoch`: only entries of that epoch count (secondary); None: all count
    (primary).
    """

    def __init__(self, addresses: Table, macs: Table) -> None:
        self._addresses, self._macs = addresses, macs
        #: what announced() has replaced, and the guest had claimed in the epoch that still runs
        self._before: dict[bytes, bytes] = {}

    def own(self, first: bytes, epoch: int | None) -> list[Own]:
        """Return the addresses that are certainly the guest's.

        first: the MAC address that QEMU reports.

        One at a MAC that has moved to another machine is no longer the guest's.
        """
        macs = {m for m, _ in self._fresh_macs(epoch)} | {mac_key(first)}
        found = []
        for key, (_, mac, _, flags) in self._fresh(epoch):
            if mac in macs:
                address, vlan = abi.ADDRESS.unpack(key)
                router = bool(flags & abi.CLAIM_ROUTER) if flags & abi.CLAIM_SAYS_ROUTER else None
                found.append(Own(address, vlan, mac_bytes(mac), router))
        return found

    def macs(self, epoch: int | None) -> list[bytes]:
        """Return the MAC addresses from which the guest has sent lately, besides the first one."""
        oldest = time.monotonic_ns() - int(SWITCHES_S * 1e9)
        return [mac_bytes(m) for m, seen in self._fresh_macs(epoch) if seen > oldest]

    def _fresh(self, epoch: int | None) -> list[tuple[bytes, tuple[int, int, int, int]]]:
        oldest = time.monotonic_ns() - int(FORGET_S * 1e9)
        out = []
        for key, raw in self._addresses.items():
            fields = abi.CLAIM.unpack(raw)
            if fields[0] > oldest and epoch in (None, fields[2]):
                out.append((key, fields))
        return out

    def _fresh_macs(self, epoch: int | None) -> list[tuple[int, int]]:
        oldest = time.monotonic_ns() - int(FORGET_S * 1e9)
        out = []
        for _, raw in self._macs.items():
            seen, mac, at, _ = abi.CLAIM.unpack(raw)
            if seen > oldest and epoch in (None, at):
                out.append((mac, seen))
        return out

    def export(self, limit: int) -> tuple[bytes, bytes]:
        """Return the guest's claims for the host of its copy.

        That is struct colo_address with MAC address and flags of each, and the MAC addresses.
        """
        out = b"".join(
            key + mac_bytes(mac) + bytes([flags])
            for key, (_, mac, _, flags) in self._fresh(None)[:limit]
        )
        macs = b"".join(self.macs(None)[:limit])
        return out, macs

    def announced(self, epoch: int, addresses: bytes, macs: bytes, *, running: int) -> None:
        """Store the claims, from export(), of a guest whose state this one has from `epoch` on.

        What this guest has claimed in the epoch `running` is kept, for undo(). Raises ValueError if
        the data is truncated, OSError if there is no room.
        """
        size, now = _KEY + _MAC + 1, time.monotonic_ns()
        if len(addresses) % size or len(macs) % _MAC:
            raise ValueError(f"{len(addresses)} and {len(macs)} bytes are no addresses")
        for was in [k for k, c in self._before.items() if abi.CLAIM.unpack(c)[2] != running]:
            del self._before[was]
        for at in range(0, len(macs), _MAC):
            key = mac_key(macs[at : at + _MAC])
            claim = abi.CLAIM.pack(now, key, epoch, 0)
            self._replace(self._macs, key.to_bytes(8, "little"), claim, running)
        for at in range(0, len(addresses), size):
            entry = addresses[at : at + size]
            mac = mac_key(entry[_KEY : _KEY + _MAC])
            claim = abi.CLAIM.pack(now, mac, epoch, entry[-1])
            self._replace(self._addresses, entry[:_KEY], claim, running)

    def _replace(self, table: Table, key: bytes, claim: bytes, running: int) -> None:
        old = table.get(key)
        if old is None:  # another machine has claimed it meanwhile
            self._before.pop(key, None)
        elif abi.CLAIM.unpack(old)[2] == running:
            self._before[key] = old
        table.set(key, claim)

    def undo(self, epoch: int) -> None:
        """Continue in `epoch`: drop what was stored for a later one, a state that never came."""
        for table in (self._addresses, self._macs):
            for key, raw in list(table.items()):
                if abi.CLAIM.unpack(raw)[2] <= epoch:
                    continue
                was = self._before.get(key)  # of either table; their keys differ in size
                if was is None or abi.CLAIM.unpack(was)[2] != epoch:
                    table.delete(key)
                    continue
                with contextlib.suppress(OSError):  # moved, and its place taken, since it was read
                    table.set(key, was)
        self._before.clear()

    def sweep(self, epoch: int | None) -> bool:
        """Delete entries that are old or of an epoch before `epoch`.

        Returns whether `macs` is full then.
        """
        oldest = time.monotonic_ns() - int(FORGET_S * 1e9)
        left = 0
        for table in (self._addresses, self._macs):
            left = 0
            for key, raw in list(table.items()):
                seen, _, at, _ = abi.CLAIM.unpack(raw)
                if seen <= oldest or (epoch is not None and at < epoch):
                    table.delete(key)
                else:
                    left += 1
        return left >= int(self._macs.info.max_entries)

    def forget_all(self) -> None:
        """Forget everything: the frames of the guest and the network are no longer seen."""
        self._before.clear()
        for table in (self._addresses, self._macs):
            for key, _ in list(table.items()):
                table.delete(key)
