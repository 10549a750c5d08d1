# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands that an operator or a cluster manager sends to the control socket of a controller.

Each is an entry of one table; the keys are the names that the CLI sends
(service/control_socket.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from ..clock import TICK_S
from ..config.file import Config, ConfigError, load
from ..datapath.host import HostDataPath
from ..failover.decision import Action
from ..failover.states import Role, State
from ..peer.channel import Peer
from .checkup import Checkup
from .command import Command
from .handover import Handover
from .pair_view import PairView
from .replacement import Replacement
from .story import Kind, Story

log = logging.getLogger("colo_xdp")

FAILOVER_S = 30.0  # for an operator request; the time of the fence command is added
ORDER_S = 60.0  # for a request that was made to a former controller
#: commands that are told in the story
CHANGES = (
    Command.MODE, Command.FAILOVER, Command.SWITCHOVER, Command.HANDOVER, Command.DEMOTE,
    Command.CHECKPOINT, Command.REPROTECT, Command.RELOAD,
)  # fmt: skip
DEMOTE_S = 30.0  # for the action in progress to end

Handler = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
Document = Callable[[dict[str, Any]], dict[str, Any]]


class Commandable(Protocol):
    """The part of a controller that commands use."""

    config: Config
    role: Role
    dp: HostDataPath
    view: PairView
    peer: Peer
    state: State
    reason: str
    replacement: Replacement
    story: Story
    checkup: Checkup

    @property
    def undecided(self) -> bool:
        """Whether nobody has decided yet that this host's guest may transmit."""
        ...

    @property
    def path_shut(self) -> bool:
        """Whether nothing leaves, or will without a new guest: what `shut` means."""
        ...

    @property
    def transmits(self) -> bool:
        """Whether the network receives this host's guest."""
        ...

    @property
    def acting(self) -> asyncio.Task[Any] | None:
        """The one action in progress."""
        ...

    def reconsider(self) -> None:
        """Decide anew, since something has changed."""

    def shown_state(self) -> State:
        """Return the state that operators see."""
        ...

    def superseded(self) -> bool:
        """Return whether this guest is worthless, since the other one certainly serves alone."""
        ...

    async def perform(self, action: Action, why: str) -> None:
        """Carry out an action."""

    async def keep_shut(self) -> None:
        """See to it that a program is attached which obeys a mode in which nothing leaves."""

    def may_demote(self) -> None:
        """Raise ValueError where this guest must not fall silent now."""

    def failover_steps(self, *, force: bool) -> list[str]:
        """Return what a failover would do now, step by step."""
        ...

    @property
    def disk_unproven(self) -> bool:
        """Whether this guest runs a checkpoint whose disks may not be whole on this host."""
        ...

    def switchover_steps(self) -> list[str]:
        """Return what a switchover would do now, step by step."""
        ...

    async def switch_over(self, deadline: float, why: str) -> bool:
        """Make the SVM the live guest by a checkpoint; whether it is, by `deadline` (monotonic, s).

        Raises ValueError when it cannot begin.
        """
        ...

    async def command_checkpoint(self, args: dict[str, Any]) -> dict[str, Any]:
        """Make one checkpoint. Raises ValueError where there is none."""
        ...

    def set_shadow(self, on: bool) -> None:
        """Hold nothing, or hold again. Raises ValueError."""

    def asked_again(self) -> None:
        """Try again what was given up: an operator wants the pair protected."""

    def new_policy(self) -> None:
        """Take over changed rules."""


class OperatorCommands:
    """Carries out commands on one controller, within the rules of its role."""

    def __init__(self, controller: Commandable) -> None:
        self._c = c = controller
        self._table: dict[Command, Handler] = {
            Command.MODE: self.mode,
            Command.FAILOVER: self.failover,
            Command.SWITCHOVER: self.switchover,
            Command.HANDOVER: Handover(c, self.demote).command,
            Command.DEMOTE: self.demote,
            Command.CHECKPOINT: c.command_checkpoint,
            Command.REPROTECT: self.reprotect,
            Command.RELOAD: self._reload,
            Command.DOCTOR: c.checkup.command,
        }
        if c.dp.adopted and c.dp.order:
            # The controller that got the request died while it carried it out. Every step of a
            # failover can be done twice, so this one carries it out again.
            self.order("force" if c.dp.order == "force" else "failover", ORDER_S)

    def serve(self, command: Command, handler: Handler) -> None:
        """Register a command whose answer takes several turns of the loop."""
        self._table[command] = handler

    def answer(self, command: Command, document: Document) -> None:
        """Register a command whose answer is a document built elsewhere (status/builder.py)."""

        async def handler(args: dict[str, Any]) -> dict[str, Any]:
            return document(args)

        self._table[command] = handler

    async def run(self, name: str, args: dict[str, Any]) -> dict[str, Any]:
        """Carry out a command of the CLI.

        Raises ValueError when the command is unknown or impossible now.
        """
        handler = self._table.get(Command(name)) if name in set(Command) else None
        if handler is None:
            raise ValueError(f"unknown command {name!r}")
        if name in CHANGES and not args.get("dry_run") and (name != Command.MODE or args):
            kind = Kind.SHUTDOWN if args.get("shutdown") else Kind.OPERATOR
            said = [str(v)[:200] if v is not True else k for k, v in args.items() if v]
            self._c.story.tell(kind, " ".join([name, *said]))
        return await handler(args)

    async def _reload(self, args: dict[str, Any]) -> dict[str, Any]:
        return self.reload()

    def reload(self) -> dict[str, Any]:
        """Read the configuration file again and take over what may change at run time: the rules.

        Raises ValueError when the file is invalid, or when something else in it has changed.
        """
        c = self._c
        if c.config.path is None:
            raise ValueError("this configuration came from no file")
        try:
            new = load(c.config.path)
        except ConfigError as e:
            raise ValueError(str(e)) from e
        changed = c.config.differences(new)
        if changed:
            raise ValueError(f"needs a restart of the controller: {', '.join(changed)} changed")
        c.config = new
        c.new_policy()
        log.info("policy reloaded: %d rules", len(new.rules))
        return {"rules": len(new.rules)}

    async def mode(self, args: dict[str, Any]) -> dict[str, Any]:
        """Report or change the mode: protected, paused or shadow. Raises ValueError."""
        c = self._c
        mode = args.get("mode")
        if mode is not None:
            if mode not in ("protected", "paused", "shadow"):
                raise ValueError(f"mode {mode!r}: protected, paused or shadow")
            c.set_shadow(mode == "shadow")
            c.asked_again()
            c.view.set_paused(mode == "paused")
            log.info("mode set to %s by the operator", mode)
        return {"mode": c.shown_state().value}

    def order(self, what: str, seconds: float) -> float:
        """Record an operator request. Returns the time until which it counts (monotonic, s)."""
        until = time.monotonic() + seconds
        self._c.view.ordered(forced=what == "force", until_s=until)
        return until

    async def switchover(self, args: dict[str, Any]) -> dict[str, Any]:
        """Change the guest that serves the clients, while both live. Raises ValueError."""
        c = self._c
        steps = c.switchover_steps()
        if args.get("dry_run"):
            return {"steps": steps, "done": False, "state": c.state.value}
        ck, q = c.config.checkpoint, c.config.qemu
        end = time.monotonic() + (ck.deadline + 2 * q.qmp_timeout) / 1000
        done = await c.switch_over(end, "asked by the operator")
        return {"steps": steps, "done": done, "state": c.state.value, "reason": c.reason}

    async def failover(self, args: dict[str, Any]) -> dict[str, Any]:
        """Make this host's guest serve standalone. Raises ValueError."""
        c = self._c
        if args.get("planned"):
            raise ValueError("a planned failover is another command: `switchover`")
        force = args.get("force", False)
        steps = c.failover_steps(force=bool(force))
        if args.get("dry_run"):
            return {"steps": steps, "done": False, "state": c.state.value}
        if c.state in (State.SOLO, State.PROMOTED):
            return {"steps": [], "done": True, "state": c.state.value, "reason": c.reason}
        undecided = c.undecided
        if c.state is State.STOPPED or (c.state is State.STARTING and not undecided):
            raise ValueError(f"no failover from state {c.state.value}: {c.reason}")
        if c.disk_unproven and not force:
            raise ValueError(
                "the disks here may lack what was written before the last checkpoint: make sure "
                "that the other guest is silent, and use --force to accept that"
            )
        c.view.fence_is_void()
        c.dp.order = "force" if force else "failover"
        fence_s = c.config.failover.fence_timeout / 1000
        deadline, opened = self.order(c.dp.order, FAILOVER_S + fence_s), False
        try:
            while time.monotonic() < deadline:
                c.reconsider()
                if c.state in (State.SOLO, State.PROMOTED, State.STOPPED):
                    break
                opened = undecided and not c.undecided and c.acting is None
                given_up = c.state is State.STARTING and c.view.guest.standalone
                if given_up and not undecided and c.acting is None and c.transmits:
                    # The entry into COLO was given up meanwhile, so the guest serves alone. Neither
                    # this request nor the fence that it began is about the next copy.
                    c.view.order_withdrawn()
                    c.view.fence_is_void()
                    opened = True
                if opened:
                    break
                if c.view.pair.fence.result is False and not c.view.forced:
                    c.view.order_withdrawn()
                    raise ValueError(
                        "the fence command failed: the peer may be alive, so nothing is opened"
                    )
                await asyncio.sleep(TICK_S)
        finally:
            c.dp.order = ""
        done = c.state in (State.SOLO, State.PROMOTED) or opened
        return {"steps": steps, "done": done, "state": c.state.value, "reason": c.reason}

    async def demote(self, args: dict[str, Any]) -> dict[str, Any]:
        """Silence this host's guest. On return it is certain to be silent: the other may go on."""
        c = self._c
        why = str(args.get("why", "asked by the operator"))[:200]
        c.may_demote()
        if (acting := c.acting) is not None:
            # The action may be a takeover, which opens the data path at its end.
            await asyncio.wait({acting}, timeout=DEMOTE_S)
            if not acting.done():
                raise ValueError(f"a decision is still being carried out: {c.reason}")
        c.view.order_withdrawn()
        c.dp.order = ""
        if not c.path_shut:
            await c.perform(Action.STOP, f"demoted: {why}")
        await c.keep_shut()
        return {"state": c.state.value, "reason": c.reason, "peer": c.view.peer.state}

    async def reprotect(self, args: dict[str, Any]) -> dict[str, Any]:
        """Make room here for a new copy, or ask the other host to. Raises ValueError."""
        c = self._c
        if c.state is State.STOPPED:
            if not c.superseded():
                raise ValueError(f"the other guest is not known to run standalone: {c.reason}")
            c.replacement.wanted = True
            c.replacement.begin()
            here = True
        elif c.state in (State.SOLO, State.PROMOTED) or (
            c.role is Role.PRIMARY and c.state is State.STARTING
        ):
            if not c.peer.send("reprotect", why="asked by the operator"):
                raise ValueError("the other host's controller does not answer: start it first")
            here = False
        else:
            raise ValueError(f"nothing to do from state {c.state.value}: {c.reason}")
        return {"here": here, "state": c.state.value, "command": list(c.config.qemu.incoming)}
