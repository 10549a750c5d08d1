# SPDX-License-Identifier: GPL-2.0-or-later
"""What a person, or a cluster manager, asks of a controller: the commands of its control socket."""

from __future__ import annotations

import asyncio
import logging
import time
from abc import abstractmethod
from typing import Any

from .config import Config, ConfigError, load
from .datapath import DataPath
from .failover import Action, Role, State
from .node import Node
from .peer import Peer
from .ticker import TICK_S

log = logging.getLogger("colo_xdp")

FAILOVER_S = 30.0  # for one that a person asks for, and the fence on top
ORDER_S = 60.0  # for one that a former controller was asked for
STAND_DOWN_S = 30.0  # for a decision that is being carried out


class Commanded(Node):
    """A host that obeys, within the rules of its two sides."""

    peer: Peer
    peer_state: str
    fence_result: bool | None

    def __init__(self, config: Config, datapath: DataPath) -> None:
        super().__init__(config, datapath)
        self._busy: asyncio.Task[Any] | None = None  # the one action in progress
        if datapath.adopted and datapath.order:
            # Whoever was asked has died on the way. Every step of it can be done twice.
            self._order("force" if datapath.order == "force" else "failover", ORDER_S)

    # ---- of the two sides

    @property
    @abstractmethod
    def path_shut(self) -> bool:
        """Nothing leaves, or will without a new guest: what `shut` means."""

    @property
    def undecided(self) -> bool:
        """Nobody has said yet that this host's guest may speak (datapath.py)."""
        return False

    @abstractmethod
    async def perform(self, action: Action, why: str) -> None:
        """Carry out GO_SOLO, TAKE_OVER, STOP or REARM."""

    @abstractmethod
    def failover_steps(self, *, planned: bool, force: bool) -> list[str]:
        """What a failover would do now, step by step."""

    @abstractmethod
    async def hand_over(self, deadline: float) -> bool:
        """Planned: a checkpoint, then the SVM goes on and the PVM is silent. Whether it is done.

        Raises ValueError when it cannot begin.
        """

    @abstractmethod
    def status(self) -> dict[str, Any]:
        """The documented status (status.py)."""

    async def keep_shut(self) -> None:
        """The mode says that nothing leaves: see to it that a program is there that obeys."""

    # ---- commands

    async def command(self, name: str, args: dict[str, Any]) -> dict[str, Any]:
        """Carry out a command of the CLI.

        Raises ValueError for what is unknown or impossible now.
        """
        if name == "status":
            return self.status()
        if name == "mode":
            return self._command_mode(args)
        if name == "failover":
            return await self._command_failover(args)
        if name == "stand-down":
            return await self._command_stand_down(args)
        if name == "checkpoint":
            return await self.command_checkpoint(args)
        if name == "reprotect":
            return self._command_reprotect()
        if name == "reload":
            return self.reload()
        if name in ("explain", "capture"):
            return self.tell(name, args)
        raise ValueError(f"unknown command {name!r}")

    async def command_checkpoint(self, args: dict[str, Any]) -> dict[str, Any]:
        raise ValueError("checkpoints are asked for on the primary host")

    def reload(self) -> dict[str, Any]:
        """Read the file again and take over what can change while running: the rules.

        Raises ValueError: the file is wrong, or something else in it has changed.
        """
        if self.config.path is None:
            raise ValueError("this configuration came from no file")
        try:
            new = load(self.config.path)
        except ConfigError as e:
            raise ValueError(str(e)) from e
        changed = self.config.differences(new)
        if changed:
            raise ValueError(f"needs a restart of the controller: {', '.join(changed)} changed")
        self.config = new
        self.new_policy()
        log.info("policy reloaded: %d rules", len(new.rules))
        return {"rules": len(new.rules)}

    def new_policy(self) -> None:
        """The rules have changed."""

    def tell(self, name: str, args: dict[str, Any]) -> dict[str, Any]:
        """What only the primary knows."""
        raise ValueError(f"{name}: ask the primary host, which compares")

    def asked_again(self) -> None:
        """A person wants the pair protected: what was given up is tried again."""

    def set_shadow(self, on: bool) -> None:
        """Hold nothing, or hold again."""
        if on:
            raise ValueError("shadow mode is set on the primary host, which holds the frames")

    def _command_mode(self, args: dict[str, Any]) -> dict[str, Any]:
        mode = args.get("mode")
        if mode is not None:
            if mode not in ("protected", "paused", "shadow"):
                raise ValueError(f"mode {mode!r}: protected, paused or shadow")
            self.set_shadow(mode == "shadow")
            self.asked_again()
            self.view.set_paused(mode == "paused")
            log.info("mode set to %s by the operator", mode)
        return {"mode": self.shown_state().value}

    def _order(self, what: str, seconds: float) -> float:
        """A person's word, which counts until the time that is returned (monotonic, s)."""
        until = time.monotonic() + seconds
        self.view.ordered(forced=what == "force", until_s=until)
        return until

    async def _command_failover(self, args: dict[str, Any]) -> dict[str, Any]:
        planned, force = args.get("planned", False), args.get("force", False)
        if planned is True and force is True:
            raise ValueError("planned or force: a peer that is dead takes part in no plan")
        steps = self.failover_steps(planned=bool(planned), force=bool(force))
        if args.get("dry_run"):
            return {"steps": steps, "done": False, "state": self.state.value}
        if planned:
            c, q = self.config.checkpoint, self.config.qemu
            end = time.monotonic() + (c.deadline + 2 * q.qmp_timeout) / 1000
            done = await self.hand_over(end)
            return {
                "steps": steps, "done": done, "state": self.state.value, "reason": self.reason,
            }  # fmt: skip
        if self.state in (State.SOLO, State.TAKEN_OVER):
            return {"steps": [], "done": True, "state": self.state.value, "reason": self.reason}
        undecided = self.undecided
        if self.state is State.STOPPED or (self.state is State.STARTING and not undecided):
            raise ValueError(f"no failover from state {self.state.value}: {self.reason}")
        self.view.fence_is_void()
        self.dp.order = "force" if force else "failover"
        fence_s = self.config.failover.fence_timeout / 1000
        deadline, opened = self._order(self.dp.order, FAILOVER_S + fence_s), False
        try:
            while time.monotonic() < deadline:
                self._decide()
                if self.state in (State.SOLO, State.TAKEN_OVER, State.STOPPED):
                    break
                busy = self._busy is not None and not self._busy.done()
                opened = undecided and not self.undecided and not busy
                if opened:
                    break
                if self.view.pair.fence.result is False and not self.view.forced:
                    self.view.order_withdrawn()
                    raise ValueError(
                        "the fence command failed: the peer may be alive, nothing is opened"
                    )
                await asyncio.sleep(TICK_S)
        finally:
            self.dp.order = ""
        done = self.state in (State.SOLO, State.TAKEN_OVER) or opened
        return {"steps": steps, "done": done, "state": self.state.value, "reason": self.reason}

    async def _command_stand_down(self, args: dict[str, Any]) -> dict[str, Any]:
        """This host's guest is silent for certain when this returns; the other one may go on."""
        why = str(args.get("why", "asked by the operator"))[:200]
        if self._busy is not None and not self._busy.done():
            # It may be a takeover, which opens the data path at its end.
            await asyncio.wait({self._busy}, timeout=STAND_DOWN_S)
            if not self._busy.done():
                raise ValueError(f"a decision is still being carried out: {self.reason}")
        self.view.order_withdrawn()
        self.dp.order = ""
        if not self.path_shut:
            await self.perform(Action.STOP, f"stood down: {why}")
        await self.keep_shut()
        return {"state": self.state.value, "reason": self.reason, "peer": self.view.peer.state}

    def _command_reprotect(self) -> dict[str, Any]:
        if self.state is State.STOPPED:
            if not self.superseded():
                raise ValueError(f"the other guest is not known to speak: {self.reason}")
            self.incoming_wanted = True
            self.await_successor()
            here = True
        elif self.state in (State.SOLO, State.TAKEN_OVER) or (
            self.role is Role.PRIMARY and self.state is State.STARTING
        ):
            if not self.peer.send("reprotect", why="asked by the operator"):
                raise ValueError("the other host's controller does not answer: start it first")
            here = False
        else:
            raise ValueError(f"nothing to do from state {self.state.value}: {self.reason}")
        return {"here": here, "state": self.state.value, "command": list(self.config.qemu.incoming)}
