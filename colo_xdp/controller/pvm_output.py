# SPDX-License-Identifier: GPL-2.0-or-later
"""What becomes of the two guests' frames on the primary: compared, held, or passed on.

The only part of the primary that hands frames to the compare engines and to the injectors. Each NIC
has an engine of its own, since a flow belongs to a NIC; checkpoints are the guest's, so what begins
or ends one concerns all of them.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import replace

from .. import abi
from ..abi import Mode
from ..compare.causes import Cause
from ..compare.patience import Patience
from ..config.file import Config
from ..datapath.datapath import DataPath
from ..datapath.host import HostDataPath
from ..datapath.ring import CapturedFrame
from ..engine.counters import UNCOMPARED
from ..engine.engine import Engine
from ..engine.journal import Divergence
from ..engine.waits import WAIT_BUCKETS
from ..net.frame import Frame

#: request(cause, detail, divergence): ask for a checkpoint
Request = Callable[[Cause, str, Divergence | None], None]


class NicOutput:
    """The engine and the injector of one NIC."""

    def __init__(
        self,
        config: Config,
        datapath: DataPath,
        number: int,
        request: Request,
        on_divergence: Callable[[Divergence], None],
        on_wait: Callable[[int], None],
        patience: Patience,
    ) -> None:
        self.name = config.networks[number].name
        self._several = len(config.networks) > 1
        self.fast = datapath.fast
        self.engine = Engine(
            config.limits(),
            config.policy(self.name),
            self.release,
            request_checkpoint=lambda d: request(
                d.cause, f"{self._at(d.flow)} at {d.evidence.offset}", self._named(d)
            ),
            on_wait=on_wait,
            on_divergence=lambda d: on_divergence(self._named(d)),
            unmirror=datapath.unmirror,
            fast=datapath.fast,
            patience=patience,
        )
        self.engine.epoch = datapath.epoch
        self._injector = datapath.injectors["release"]
        datapath.unmirror(None)  # forget what a former controller's rules said

    def _at(self, flow: str) -> str:
        return f"{self.name}: {flow}" if self._several else flow

    def _named(self, d: Divergence) -> Divergence:
        return replace(d, nic=self.name, flow=self._at(d.flow))

    def release(self, rec: Frame) -> None:
        """Send a frame of the PVM to the network."""
        self._injector.send(rec.frame, rec.gso_size, rec.partial, rec.gso_type)


class PvmOutput:
    """Feeds the engines and sends what they release.

    `uncompared`: frames that are still on their way to this process leave as they are, since
    nothing is held any more (MODE_BYPASS).
    """

    def __init__(
        self,
        config: Config,
        datapath: HostDataPath,
        request: Request,
        on_divergence: Callable[[Divergence], None],
        *,
        uncompared: bool,
    ) -> None:
        self._dp = datapath
        self.uncompared = uncompared
        self.waits = [0] * (len(WAIT_BUCKETS) + 1)
        self.wait_sum = 0.0
        self.patience = config.patience()
        self.nics = tuple(
            NicOutput(config, nic, i, request, on_divergence, self._on_wait, self.patience)
            for i, nic in enumerate(datapath.nics)
        )

    # ---- frames

    def on_frame(self, event: CapturedFrame) -> None:
        """Take a frame of either guest from an event ring."""
        rec = Frame(
            event.frame, event.ts_ns, event.gso_size, event.partial,
            punt_seq=event.punt_seq, gso_type=event.gso_type,
        )  # fmt: skip
        nic = self.nics[event.nic]
        if event.source == abi.Source.PVM:
            if self.uncompared:
                nic.release(rec)
            else:
                nic.engine.from_pvm(rec, time.monotonic_ns())
        elif not self.uncompared:
            nic.engine.from_svm(rec, event.epoch, time.monotonic_ns())

    def flush(self) -> None:
        """End a batch of frames."""
        now = time.monotonic_ns()
        for nic in self.nics:
            nic.engine.flush(now)

    def agreed(self) -> int:
        """Return how many frames of the PVM have left because the SVM has sent the same.

        The fast path counts what it has released once for each release, of whatever many bytes.
        """
        total = 0
        for nic in self.nics:
            c = nic.engine.counters
            total += c["released"] - sum(c[name] for name in UNCOMPARED)
            if nic.fast is not None:
                total += sum(nic.fast.waits())
        return total

    # ---- checkpoints

    def hold(self) -> None:
        """Hold everything of both guests that comes from now on, for a checkpoint."""
        self.uncompared = False  # a failed entry can end here too, once QEMU was in COLO
        self.begin_checkpoint()
        self._dp.mode = Mode.CHECKPOINT

    def begin_checkpoint(self) -> None:
        """Decide nothing until a checkpoint is over."""
        for nic in self.nics:
            nic.engine.begin_checkpoint()

    def commit_checkpoint(self, stop_ns: int, epoch: int, now_ns: int) -> None:
        """Release what was sent before the STOP; the rest belongs to the new epoch."""
        for nic in self.nics:
            nic.engine.commit_checkpoint(stop_ns, epoch, now_ns)

    def release_until(self, ts_ns: int) -> None:
        """Release what was captured until then, uncompared."""
        for nic in self.nics:
            nic.engine.release_until(ts_ns)

    def release_all(self) -> int:
        """Release everything that is held; how many frames."""
        return sum(nic.engine.release_all() for nic in self.nics)

    def void_flows(self, now_ns: int) -> None:
        """Forget what is known of every flow: frames may have been missed."""
        for nic in self.nics:
            nic.engine.void_flows(now_ns)

    # ---- time

    def tick(self, now_ns: int) -> None:
        """Look for what has waited too long."""
        if self.patience.due(now_ns):
            for i, nic in enumerate(self.nics):
                if nic.fast is not None and not nic.fast.unused:
                    self.patience.kernel_waits(i, nic.fast.waits())
            self.patience.end_window(now_ns)
        for nic in self.nics:
            nic.engine.tick(now_ns)

    def tick_ns(self) -> int:
        """Return when tick() has something to do (monotonic)."""
        return min(nic.engine.tick_ns() for nic in self.nics)

    @property
    def at_rest(self) -> bool:
        """Whether nothing waits, on the slow path or in the kernel, and nothing can time out."""
        return all(nic.engine.at_rest for nic in self.nics)

    @property
    def asleep(self) -> bool:
        """Whether that holds until a frame comes to this process."""
        return all(nic.engine.asleep for nic in self.nics)

    def gather(self, now_ns: int, nics: Iterable[int]) -> bool:
        """Take over what waits in the kernel at these NICs; return whether anything waits."""
        return any([self.nics[i].engine.gather(now_ns) for i in nics])

    def end_backpressure(self, now_ns: int) -> None:
        """Let clients' acknowledgements pass that wait for the SVM."""
        for nic in self.nics:
            nic.engine.end_backpressure(now_ns)

    def sweep(self, now_ns: int, most: int) -> None:
        """Forget connections of the fast path that are long unused; looks at `most` of each NIC."""
        for nic in self.nics:
            if nic.fast is not None:
                nic.fast.sweep(now_ns, most)

    # ---- modes

    @property
    def shadow(self) -> bool:
        """Whether frames leave at once, and are compared all the same."""
        return self.nics[0].engine.shadow

    def set_shadow(self, on: bool, now_ns: int) -> None:
        """Hold nothing, or hold again."""
        for nic in self.nics:
            nic.engine.set_shadow(on, now_ns)

    def followed_ns(self, after_ns: int, until_ns: int) -> int:
        """Return when the SVM had sent what it has sent of the output of that time; 0: unknown."""
        return max(nic.engine.followed_ns(after_ns, until_ns) for nic in self.nics)

    def waiting_ns(self) -> int:
        """Return since when the oldest output of the PVM has waited to be compared; 0: none."""
        return min((n for nic in self.nics if (n := nic.engine.waiting_ns())), default=0)

    def crossed_ns(self, after_ns: int) -> int:
        """Return when guests in shadow mode first waited for each other's clients; 0: not since."""
        return min(
            (n.engine.crossed_ns for n in self.nics if n.engine.crossed_ns > after_ns), default=0
        )

    def set_policy(self, config: Config) -> None:
        """Take over changed rules."""
        for nic in self.nics:
            nic.engine.set_policy(config.policy(nic.name))

    @property
    def held(self) -> tuple[int, int]:
        """Frames and bytes that are held."""
        return (
            sum(nic.engine.held_packets for nic in self.nics),
            sum(nic.engine.held_bytes for nic in self.nics),
        )

    def _on_wait(self, ns: int) -> None:
        s = ns / 1e9
        self.waits[bisect_left(WAIT_BUCKETS, s)] += 1
        self.wait_sum += s
