# SPDX-License-Identifier: GPL-2.0-or-later
"""Run a part of these tests on the QEMU of Debian sid, beside the installed one.

`make test-qemu-11` runs all of them on it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from colo_xdp.lab import newer_qemu
from colo_xdp.lab import vm as vms
from colo_xdp.lab.net import LabError
from colo_xdp.lab.pair import Lab
from tests.e2e import test_disks, test_failover, test_migration, test_traffic
from tests.e2e.conftest import BUILD, LabMaker, protected_pair

pytestmark = pytest.mark.skipif(
    bool(os.environ.get("COLO_QEMU")), reason="COLO_QEMU is set: all tests run on that QEMU"
)


@pytest.fixture(scope="module")
def qemu() -> str:
    """Provide the command of sid's QEMU, which is fetched once."""
    try:
        run = str(newer_qemu.fetch(BUILD / "qemu-sid"))
    except LabError as e:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"QEMU of Debian {newer_qemu.SUITE}: {e}")
    assert vms.qemu_version(run) >= (11, 0, 0)
    return run


@pytest.fixture
def make_lab(qemu: str, make_lab: LabMaker) -> LabMaker:
    return partial(make_lab, qemu=qemu)


class TestTraffic:
    """One pair, which is gone before the next test needs the laboratory."""

    @pytest.fixture(scope="class")
    def pair(self, qemu: str) -> Iterator[Lab]:
        with protected_pair(qemu=qemu) as lab:
            yield lab

    test_downloads = staticmethod(test_traffic.test_downloads_need_no_checkpoint)
    test_uploads = staticmethod(test_traffic.test_uploads_arrive_whole)
    test_udp = staticmethod(test_traffic.test_udp_is_compared)
    test_a_page = staticmethod(test_traffic.test_a_page_that_differs_costs_one_checkpoint_each)
    test_checkpoints = staticmethod(test_traffic.test_checkpoints_on_request_do_not_disturb_streams)
    test_isolation = staticmethod(test_traffic.test_nothing_of_the_svm_reaches_the_network)

    def test_the_version(self, pair: Lab) -> None:
        assert pair.vm["primary"].ask("query-version")["qemu"]["major"] >= 11
        print(f"QEMU {pair.qemu_version}, {pair.accel}")

    def test_under_kvm(self, pair: Lab) -> None:
        """Where a guest boots under KVM, all of these tests run under it."""
        if pair.accel != "kvm":
            pytest.skip("no guest boots under KVM here (tried by the laboratory): these ran on TCG")
        assert pair.vm["primary"].ask("query-kvm")["enabled"]


@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_takeover(make_lab: LabMaker, machine: str) -> None:
    """q35 needs QEMU 11."""
    options = ("-machine", machine)
    test_failover.test_primary_qemu_dies(partial(make_lab, qemu_options=options), vnet_hdr=True)


def test_disks_and_new_secondaries(make_lab: LabMaker) -> None:
    test_disks.test_records_survive_takeovers_and_a_switchover(make_lab)


def test_further_channels(make_lab: LabMaker, tmp_path: Path) -> None:
    test_migration.channels(make_lab, tmp_path)
