# SPDX-License-Identifier: GPL-2.0-or-later
"""Which programs a pair needs on this host, and compiling those before anything waits for them.

A host's role changes when it takes over, just when its guest has no copy. So a controller has what
every role needs compiled in the background, once it runs (`colo-xdp run`), and an administrator may
before an upgrade or a new pair (`colo-xdp compile`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .. import abi
from ..config.file import Config
from ..failover.arbiter import ARBITERS
from . import devices, loader, netlink
from .cache import Cache
from .prepare import DataPathError, choose_hook
from .source import OBJECTS, LoadError, NotCompiled, Options, Refused, Source

log = logging.getLogger("colo_xdp.datapath.programs")

NICE = 19  # of a compiler for which nobody waits


def options(config: Config, role: str, hook: str) -> Options:
    """Return the options of one NIC's programs; hook: xdp or tc, of the SVM's output."""
    d = config.datapath
    return Options(
        flow_table=d.flow_table,
        ring_pages=d.ring_pages,
        events=d.events,
        rewrite_at_xdp=hook == "xdp",
        fast=d.fast_path == "on" and role == "primary",
        buffers=max(1, d.fast_path_memory * (1 << 20) // abi.BUFFER // len(config.networks)),
        conns=d.fast_path_flows,
        lease=ARBITERS[config.failover.arbiter].needs_grant,
    )


def _hooks(config: Config) -> set[str]:
    """Return the hooks of the NICs; that of a tap which does not exist yet is likely tc."""
    found = set()
    for net in config.networks:
        try:
            found.add(choose_hook(net.hook, devices.link_info(net.tap)))
        except (devices.NoSuchDevice, netlink.NetlinkError, DataPathError, OSError):
            found.add("tc" if net.hook == "auto" else net.hook)
    return found


def wanted(config: Config) -> list[Source]:
    """Return what this host may have to load, the configured role's first. Blocks (netlink)."""
    out: list[Source] = []
    for role in sorted(OBJECTS, key=lambda r: r != config.role):
        # A promoted guest's programs are loaded with a primary's options.
        at_home = "secondary" if role == "secondary" else "primary"
        for hook in sorted(_hooks(config)) if role == "secondary" else ["tc"]:
            o = options(config, at_home, hook)
            if o.fast and loader.events(o) != "ring":
                o = replace(o, fast=False)  # as DataPath does
            out.append(loader.plan(role, o).source)
    return out


def unfit_pins(config: Config) -> list[str]:
    """Return which maps that a controller has pinned here this release cannot take over."""
    o = options(config, config.role, "tc")
    d = config.datapath.bpffs
    return [
        bad
        for nic in range(len(config.networks))
        for bad in loader.check_pins(loader.pin_dir(d, config.pair, config.role, nic), o)
    ]


@dataclass(frozen=True, slots=True)
class Filled:
    """One image that the cache has; `seconds`: what it took, 0 if it was there."""

    role: str
    path: str
    seconds: float


def fill(config: Config, *, nice: int = 0) -> Iterator[Filled]:
    """Compile what is missing; blocks for seconds each. Raises LoadError."""
    cache = Cache()
    for source in wanted(config):
        began = time.monotonic()
        there = cache.find(source) is not None
        if not there:
            try:
                cache.obtain(source, nice=nice)
            except NotCompiled:
                raise
            except Refused:
                if not source.btf:
                    raise
                source = replace(source, btf=False)  # as load() does
                cache.obtain(source, nice=nice)
        took = 0.0 if there else time.monotonic() - began
        yield Filled(source.role, str(cache.path(source)), took)


def fill_quietly(config: Config) -> None:
    """Do that with the lowest priority; failures will come up again when it is needed."""
    try:
        for _ in fill(config, nice=NICE):
            pass
    except (LoadError, OSError) as e:
        log.warning("the programs of another role will be compiled when it is taken: %s",
                    str(e).splitlines()[0])  # fmt: skip
