# SPDX-License-Identifier: GPL-2.0-or-later
"""What a host may promise that does not know what its guest has done."""

from __future__ import annotations

import asyncio

import pytest

from colo_xdp.failover.lease import Leadership, StoreError, StoreView


class Store:
    """A store of which only the record can be read."""

    def __init__(self, standalone: str) -> None:
        self.standalone, self.failing = standalone, False

    async def look(self) -> StoreView:
        if self.failing:
            raise StoreError("no answer")
        return StoreView("", self.standalone)


def leadership(store: Store, *, knows: bool) -> Leadership:
    return Leadership(
        store, node="secondary", address="a", boot="2", ttl_ms=1000, margin_ms=200,  # type: ignore[arg-type]
        transmitting=False, allow=lambda ns: None, changed=lambda: None, knows=knows,
    )  # fmt: skip


@pytest.mark.parametrize("standalone", ["", "primary", "secondary"])
def test_a_host_that_has_booted_promises_silence_once_the_store_says_that_it_may(
    standalone: str,
) -> None:
    async def body() -> None:
        store = Store(standalone)
        store.failing = True
        x = leadership(store, knows=False)
        with pytest.raises(StoreError):
            await x._step()
        assert not x.promise(), "a former guest of this host may have run standalone"
        store.failing = False
        await x._step()
        assert x.promise() == (standalone != "secondary")

    asyncio.run(body())


def test_a_host_that_has_run_standalone_promises_again_when_both_guests_are_equal() -> None:
    async def body() -> None:
        x = leadership(Store("secondary"), knows=False)
        await x._step()
        assert not x.promise()
        x.paired()
        assert x.promise()

    asyncio.run(body())


def test_a_restarted_controller_knows_by_its_data_path() -> None:
    assert leadership(Store(""), knows=True).promise()
