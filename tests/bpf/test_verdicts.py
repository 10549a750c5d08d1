# SPDX-License-Identifier: GPL-2.0-or-later
"""Test every program in every mode: the verdict, the frame, and the one reason that is counted."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from colo_xdp import abi
from colo_xdp.abi import Cfg, LossPolicy, Mode, Prog, Reason
from colo_xdp.datapath import loader, syscall
from colo_xdp.datapath.source import Options
from colo_xdp.failover.lease import boot_ns
from tests.netns.frames import tcp
from tests.sim.host import mirror_fate

from .conftest import TC_OK, TC_REDIRECT, TC_SHOT, TC_UNSPEC, XDP_PASS, Kernel

GUEST, CLIENT = tcp(b"from the guest"), tcp(b"from a client", reverse=True)
GARBAGE = b"\xff" * 12 + b"\x08\x00" + b"\x4f" + b"\0" * 45  # IPv4 whose header is beyond it


def tagged(frame: bytes, kind: int, epoch: int = 7) -> bytes:
    return frame[:12] + struct.pack("!HH", abi.TPID, kind << 13 | epoch) + frame[12:]


MIRRORED, SVMS = tagged(CLIENT, abi.KIND_MIRROR), tagged(GUEST, abi.KIND_SVM)

SECONDARY = [
    # program, mode, mark, frame, verdict, reason, frame afterwards (None: not looked at)
    ("svm_out", Mode.DROP, 0, GUEST, TC_SHOT, "DROP_MODE", None),
    ("svm_out", Mode.BYPASS, 0, GUEST, TC_SHOT, "DROP_MODE", None),
    ("svm_out", Mode.CHECKPOINT, 0, GUEST, TC_SHOT, "PUNT", None),
    ("svm_out", Mode.TAKEOVER, 0, GUEST, TC_OK, "PASS", GUEST),
    ("svm_out", Mode.TAKEOVER, abi.MARK, GUEST, TC_OK, "PASS_RELEASED", GUEST),
    ("svm_out", Mode.RUN, abi.MARK, GUEST, TC_REDIRECT, "PASS_REDIRECTED", None),
    ("svm_out", Mode.RUN, 0, GUEST, TC_REDIRECT, "PASS_REDIRECTED", None),
    ("svm_out", Mode.RUN, 0, GARBAGE, TC_REDIRECT, "NOTE_UNPARSED", None),
    ("svm_out", Mode.DROP, 0, GARBAGE, TC_SHOT, "DROP_MODE", None),
    ("svm_net", Mode.DROP, 0, CLIENT, TC_SHOT, "DROP_ISOLATED", None),
    ("svm_net", Mode.RUN, 0, CLIENT, TC_SHOT, "DROP_ISOLATED", None),
    ("svm_net", Mode.CHECKPOINT, 0, CLIENT, TC_SHOT, "DROP_ISOLATED", None),
    ("svm_net", Mode.RUN, abi.MARK, CLIENT, TC_OK, "PASS_RELEASED", CLIENT),
    ("svm_net", Mode.TAKEOVER, 0, CLIENT, TC_OK, "PASS", CLIENT),
    ("svm_net", Mode.TAKEOVER, 0, GARBAGE, TC_OK, "NOTE_UNPARSED", GARBAGE),
    ("svm_in", Mode.RUN, 0, CLIENT, TC_OK, "PASS_FOREIGN", CLIENT),
    ("svm_in", Mode.DROP, 0, CLIENT, TC_OK, "PASS_FOREIGN", CLIENT),
    ("svm_in", Mode.RUN, 0, SVMS, TC_SHOT, "DROP_ISOLATED", None),
    ("svm_in", Mode.DROP, 0, MIRRORED, TC_SHOT, "DROP_MODE", None),
    ("svm_in", Mode.RUN, 0, MIRRORED, TC_REDIRECT, "PASS_REDIRECTED", CLIENT),
    ("svm_in", Mode.CHECKPOINT, 0, MIRRORED, TC_SHOT, "PUNT", None),
    ("svm_in", Mode.TAKEOVER, 0, MIRRORED, TC_SHOT, "DROP_PROMOTED", None),
    ("svm_in", Mode.TAKEOVER, 0, SVMS, TC_SHOT, "DROP_ISOLATED", None),
    ("svm_in", Mode.BYPASS, 0, MIRRORED, TC_SHOT, "DROP_MODE", None),
    ("svm_deliver", Mode.DROP, 0, CLIENT, TC_SHOT, "DROP_MODE", None),
    ("svm_deliver", Mode.RUN, 0, CLIENT, TC_REDIRECT, "PASS_REDIRECTED", CLIENT),
    ("svm_deliver", Mode.CHECKPOINT, 0, CLIENT, TC_REDIRECT, "PASS_REDIRECTED", CLIENT),
    ("svm_deliver", Mode.TAKEOVER, 0, CLIENT, TC_REDIRECT, "PASS_REDIRECTED", CLIENT),
    ("svm_forward", Mode.DROP, 0, GUEST, TC_SHOT, "DROP_MODE", None),
    ("svm_forward", Mode.CHECKPOINT, 0, GUEST, TC_REDIRECT, "PASS_REDIRECTED", None),
    ("svm_forward", Mode.TAKEOVER, 0, GUEST, TC_REDIRECT, "PASS_REDIRECTED", GUEST),
]


@pytest.mark.parametrize(("prog", "mode", "mark", "frame", "verdict", "reason", "after"), SECONDARY)
def test_secondary(
    tc: Kernel,
    prog: str,
    mode: Mode,
    mark: int,
    frame: bytes,
    verdict: int,
    reason: str,
    after: bytes | None,
) -> None:
    tc.set(Cfg.MODE, mode)
    ran = tc.run(prog, frame, mark)
    assert (ran.verdict, ran.reasons) == (verdict, {reason: 1})
    if after is not None:
        assert ran.frame == after


@pytest.mark.parametrize("mode", [m for m in Mode if m is not Mode.TAKEOVER])
def test_the_svm_has_no_way_out_before_the_takeover(tc: Kernel, mode: Mode) -> None:
    """I6, for frames of every kind and any mark."""
    tc.set(Cfg.MODE, mode)
    arp = b"\xff" * 6 + GUEST[6:12] + b"\x08\x06" + bytes(46)
    for frame in (GUEST, GARBAGE, arp, SVMS, b"\0" * 14):
        for mark in (0, 1, abi.MARK):
            assert tc.bare("svm_out", frame, mark)[0] != TC_OK


def test_mirrored_frames_of_a_promoted_guest(tc: Kernel) -> None:
    """They are the clients' until switches have learnt; the kernel ends that without a controller,
    and it means nothing in any other mode."""
    far = time.monotonic_ns() + 10**12
    rows = [(mode, until) for mode in Mode for until in (0, 1, time.monotonic_ns(), far)]
    random.Random(1).shuffle(rows)
    for mode, until in rows:
        tc.set(Cfg.MIRRORED_UNTIL_NS, until)
        tc.set(Cfg.MODE, mode)
        ran = tc.run("svm_in", MIRRORED)
        want = mirror_fate(mode, time.monotonic_ns(), until)
        name = "PASS_REDIRECTED" if want is Reason.PASS else want.name
        assert ran.reasons == {name: 1}, (mode, until)
        assert ran.verdict == (TC_REDIRECT if want is Reason.PASS else TC_SHOT)
        assert tc.run("svm_in", SVMS).reasons == {"DROP_ISOLATED": 1}
        assert tc.run("svm_in", CLIENT).reasons == {"PASS_FOREIGN": 1}
    tc.set(Cfg.MODE, Mode.TAKEOVER)
    tc.set(Cfg.MIRRORED_UNTIL_NS, time.monotonic_ns() + 30_000_000)
    end = time.monotonic() + 5
    while "DROP_PROMOTED" not in tc.run("svm_in", MIRRORED).reasons:
        assert time.monotonic() < end
    tc.set(Cfg.MODE, Mode.RUN)  # a copy again
    assert tc.run("svm_in", MIRRORED).reasons == {"PASS_REDIRECTED": 1}


def test_xdp_passes_always_and_svm_out_decides(xdp: Kernel) -> None:
    for mode in Mode:
        xdp.set(Cfg.MODE, mode)
        for frame in (GUEST, GARBAGE):
            ran = xdp.run("svm_out_xdp", frame)
            assert ran.verdict == XDP_PASS and ran.frame == frame
            assert sum(ran.reasons.values()) == 1
    xdp.set(Cfg.MODE, Mode.DROP)
    assert xdp.run("svm_out", GUEST).verdict == TC_SHOT


class Primary:
    """The primary's programs and maps."""

    def __init__(self, objects: loader.Objects) -> None:
        self.objects = objects
        self._config, self._counters = objects.map("config"), objects.map("counters")

    def set(self, slot: Cfg, value: int) -> None:
        self._config.set(struct.pack("=I", slot), struct.pack("=Q", value))

    def _counts(self, prog: Prog) -> dict[str, int]:
        out = {}
        for r in Reason:
            if r is Reason.MAX:
                continue
            key = struct.pack("=I", prog * Reason.MAX + r)
            raw = self._counters.get(key) or b""
            out[r.name] = sum(p for p, _ in abi.COUNT.iter_unpack(raw))
        return out

    def run(self, prog: str, frame: bytes, mark: int = 0) -> tuple[int, dict[str, int], int]:
        which = Prog[prog.upper()]
        before = self._counts(which)
        ctx = struct.pack("=III", 0, 0, mark).ljust(192, b"\0")
        r = syscall.test_run(self.objects.programs[prog].fd, frame, ctx=ctx, ctx_out=192)
        after = self._counts(which)
        reasons = {k: n - before[k] for k, n in after.items() if n != before[k]}
        return r.retval, reasons, struct.unpack_from("=I", r.ctx, 8)[0]


@pytest.fixture(scope="module")
def primary(bpffs: Path) -> Iterator[Primary]:
    objects = loader.load("primary", "verdicts", str(bpffs), Options(ring_pages=64))
    try:
        p = Primary(objects)
        p.set(Cfg.TAP, 1)
        p.set(Cfg.PEER, 1)
        yield p
    finally:
        objects.close()
        loader.remove_pins(objects.pin_dir)


PVM_OUT = [
    (Mode.DROP, 0, TC_SHOT, "DROP_MODE"),
    (Mode.BYPASS, 0, TC_OK, "PASS"),
    (Mode.RUN, 0, TC_SHOT, "PUNT"),
    (Mode.CHECKPOINT, 0, TC_SHOT, "PUNT"),
    (Mode.TAKEOVER, 0, TC_SHOT, "PUNT"),
    (Mode.RUN, abi.MARK, TC_OK, "PASS_RELEASED"),
    (Mode.DROP, abi.MARK, TC_SHOT, "DROP_MODE"),
    (Mode.RUN, abi.MARK + 1, TC_SHOT, "PUNT"),
]


@pytest.mark.parametrize(("mode", "mark", "verdict", "reason"), PVM_OUT)
def test_pvm_out(primary: Primary, mode: Mode, mark: int, verdict: int, reason: str) -> None:
    primary.set(Cfg.MODE, mode)
    primary.set(Cfg.LOSS_NS, 0)
    for frame in (GUEST, GARBAGE):
        got, reasons, mark_after = primary.run("pvm_out", frame, mark)
        assert (got, reasons) == (verdict, {reason: 1})
        if reason == "PASS_RELEASED":
            assert mark_after == 0, "the host's own rules do not see our mark"


@pytest.mark.parametrize(
    ("policy", "verdict", "reason"),
    [
        (LossPolicy.HOLD, TC_SHOT, "DROP_CONTROLLER_LOST"),
        (LossPolicy.RELEASE, TC_OK, "PASS_CONTROLLER_LOST"),
    ],
)
def test_pvm_out_without_a_controller(
    primary: Primary, policy: LossPolicy, verdict: int, reason: str
) -> None:
    primary.set(Cfg.MODE, Mode.RUN)
    primary.set(Cfg.LOSS_POLICY, policy)
    primary.set(Cfg.LOSS_NS, 1_000_000_000)
    primary.set(Cfg.CONTROLLER_NS, time.monotonic_ns())
    assert primary.run("pvm_out", GUEST)[:2] == (TC_SHOT, {"PUNT": 1})
    primary.set(Cfg.CONTROLLER_NS, time.monotonic_ns() - 2_000_000_000)
    assert primary.run("pvm_out", GUEST)[:2] == (verdict, {reason: 1})
    primary.set(Cfg.LOSS_NS, 0)


@pytest.mark.parametrize("mode", [Mode.BYPASS, Mode.TAKEOVER])
def test_pvm_in_passes_untouched_when_nothing_is_mirrored(primary: Primary, mode: Mode) -> None:
    primary.set(Cfg.MODE, mode)
    assert primary.run("pvm_in", CLIENT)[:2] == (TC_UNSPEC, {"PASS": 1})


@pytest.mark.parametrize("mode", [Mode.RUN, Mode.CHECKPOINT, Mode.DROP])
def test_pvm_in_mirrors_also_for_a_guest_that_has_fallen_silent(
    primary: Primary, mode: Mode
) -> None:
    primary.set(Cfg.MODE, mode)
    assert primary.run("pvm_in", CLIENT)[:2] == (TC_UNSPEC, {"PASS_MIRRORED": 1})


def test_the_hosts_own_frames_on_the_peer_link_are_left_alone(primary: Primary) -> None:
    primary.set(Cfg.MODE, Mode.RUN)
    assert primary.run("svm_arrival", GUEST)[:2] == (TC_OK, {"PASS_FOREIGN": 1})


def test_a_released_frame_is_marked_and_sent_to_the_tap(primary: Primary) -> None:
    verdict, reasons, mark = primary.run("pvm_release", GUEST)
    assert (verdict, reasons, mark) == (TC_REDIRECT, {"PASS_REDIRECTED": 1}, abi.MARK)


# ---- [failover] arbiter = "lease": the kernel ends the permission to transmit


@pytest.fixture(scope="module")
def leased(bpffs: Path) -> Iterator[tuple[Primary, Kernel]]:
    """Provide both hosts' programs, compiled with COLO_LEASE; the primary's with the fast path."""
    o = Options(ring_pages=64, flow_table=1024, lease=True)
    p = loader.load("primary", "leasep", str(bpffs), replace(o, fast=True))
    s = loader.load("secondary", "leases", str(bpffs), o)
    try:
        yield Primary(p), Kernel(s)
    finally:
        for objects in (p, s):
            objects.close()
            loader.remove_pins(objects.pin_dir)


@pytest.mark.parametrize("mode", [Mode.BYPASS, Mode.RUN, Mode.CHECKPOINT])
@pytest.mark.parametrize("mark", [0, abi.MARK])
def test_nothing_leaves_the_pvm_after_its_time(
    leased: tuple[Primary, Kernel], mode: Mode, mark: int
) -> None:
    p, _ = leased
    p.set(Cfg.MODE, mode)
    p.set(Cfg.LOSS_POLICY, LossPolicy.RELEASE)
    for until in (0, 1, boot_ns() - 1):  # never written, long ago, just now
        p.set(Cfg.LEASE_EXPIRY_NS, until)
        for frame in (GUEST, GARBAGE):
            assert p.run("pvm_out", frame, mark)[:2] == (TC_SHOT, {"DROP_LEASE_EXPIRED": 1})
    p.set(Cfg.LEASE_EXPIRY_NS, boot_ns() + 10**10)
    assert "DROP_LEASE_EXPIRED" not in p.run("pvm_out", GUEST, mark)[1]
    p.set(Cfg.LEASE_EXPIRY_NS, boot_ns() + 30_000_000)  # by itself, without a controller
    end = time.monotonic() + 5
    while "DROP_LEASE_EXPIRED" not in p.run("pvm_out", GUEST, mark)[1]:
        assert time.monotonic() < end


def test_nothing_leaves_the_svm_after_its_time(leased: tuple[Primary, Kernel]) -> None:
    _, s = leased
    s.set(Cfg.MODE, Mode.TAKEOVER)
    for until in (0, boot_ns() - 1):
        s.set(Cfg.LEASE_EXPIRY_NS, until)
        for mark in (0, abi.MARK):
            ran = s.run("svm_out", GUEST, mark)
            assert (ran.verdict, ran.reasons) == (TC_SHOT, {"DROP_LEASE_EXPIRED": 1})
    s.set(Cfg.MODE, Mode.RUN)  # towards the primary it may transmit
    assert s.run("svm_out", GUEST).verdict == TC_REDIRECT
    s.set(Cfg.MODE, Mode.TAKEOVER)
    s.set(Cfg.LEASE_EXPIRY_NS, boot_ns() + 10**10)
    assert s.run("svm_out", GUEST).verdict == TC_OK
