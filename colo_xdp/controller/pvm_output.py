# SPDX-License-Identifier: GPL-2.0-or-later
"""What becomes of the two guests' frames on the primary: compared, held, or passed on.

The only part of the primary that hands frames to the compare engine and to the injector.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable

from .. import abi
from ..abi import Mode
from ..compare.causes import Cause
from ..config.file import Config
from ..datapath.datapath import DataPath
from ..datapath.ring import CapturedFrame
from ..engine.engine import Engine
from ..engine.journal import Divergence
from ..engine.waits import WAIT_BUCKETS
from ..net.frame import Frame

#: request(cause, detail, divergence): ask for a checkpoint
Request = Callable[[Cause, str, Divergence | None], None]


class PvmOutput:
    """Feeds the engine and sends what it releases.

    `uncompared`: frames that are still on their way to this process leave as they are, since
    nothing is held any more (MODE_BYPASS).
    """

    def __init__(
        self,
        config: Config,
        datapath: DataPath,
        request: Request,
        on_divergence: Callable[[Divergence], None],
        *,
        uncompared: bool,
    ) -> None:
        self._dp = datapath
        self.uncompared = uncompared
        self.engine = Engine(
            config.limits(),
            config.policy(),
            self.release,
            request_checkpoint=lambda d: request(d.cause, f"{d.flow} at {d.evidence.offset}", d),
            on_wait=self._on_wait,
            on_divergence=on_divergence,
            unmirror=datapath.unmirror,
            fast=datapath.fast,
        )
        self.engine.epoch = datapath.epoch
        self._injector = datapath.injectors["release"]
        self.waits = [0] * (len(WAIT_BUCKETS) + 1)
        self.wait_sum = 0.0
        datapath.unmirror(None)  # forget what a former controller's rules said

    def on_frame(self, event: CapturedFrame) -> None:
        """Take a frame of either guest from the event ring."""
        rec = Frame(
            event.frame, event.ts_ns, event.gso_size, event.partial,
            punt_seq=event.punt_seq, gso_type=event.gso_type,
        )  # fmt: skip
        if event.source == abi.Source.PVM:
            if self.uncompared:
                self.release(rec)
            else:
                self.engine.from_pvm(rec, time.monotonic_ns())
        elif not self.uncompared:
            self.engine.from_svm(rec, event.epoch, time.monotonic_ns())

    def flush(self) -> None:
        """End a batch of frames."""
        self.engine.flush(time.monotonic_ns())

    def release(self, rec: Frame) -> None:
        """Send a frame of the PVM to the network."""
        self._injector.send(rec.frame, rec.gso_size, rec.partial, rec.gso_type)

    def hold(self) -> None:
        """Hold everything of both guests that comes from now on, for a checkpoint."""
        self.uncompared = False  # a failed entry can end here too, once QEMU was in COLO
        self.engine.begin_checkpoint()
        self._dp.mode = Mode.CHECKPOINT

    def release_all(self) -> int:
        """Release everything that is held; how many frames."""
        return self.engine.release_all()

    @property
    def held(self) -> tuple[int, int]:
        """Frames and bytes that are held."""
        return self.engine.held_packets, self.engine.held_bytes

    def _on_wait(self, ns: int) -> None:
        s = ns / 1e9
        self.waits[bisect_left(WAIT_BUCKETS, s)] += 1
        self.wait_sum += s
