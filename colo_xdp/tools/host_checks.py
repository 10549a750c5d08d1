# SPDX-License-Identifier: GPL-2.0-or-later
"""Judge a host's devices, addresses and ways to the other host: facts in, findings out. Pure.

tools/host_facts.py and tools/reach.py gather the facts.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .. import validate
from ..config.file import Config
from ..config.network import Network
from .findings import FAIL, OK, WARN, Check, join_bridge, link_up

if TYPE_CHECKING:
    from ..datapath.devices import LinkInfo
    from .host_facts import Bridge, NicFacts, Standing
    from .reach import Reach

BY = " (by the running controller)"


def nics(config: Config, found: Sequence[NicFacts], at: Standing) -> Iterator[Check]:
    """Judge the devices of each NIC of the guest."""
    for net, facts in zip(config.networks, found, strict=True):
        for check in nic(net, facts, at):
            yield replace(check, nic=net.name) if config.further else check


def nic(net: Network, f: NicFacts, at: Standing) -> Iterator[Check]:
    """Judge the devices of one NIC of the guest."""
    if f.tap is None:
        yield Check(
            "tap", FAIL, f"network device {net.tap} does not exist",
            f"ip tuntap add dev {net.tap} mode tap vnet_hdr, and at each boot: "
            "docs/operator/install.md, step 2",
        )  # fmt: skip
    elif f.tap.kind != "tun":
        what = f.tap.kind or "physical device"
        yield Check("tap", FAIL, f"{net.tap} is a {what}, not a tap", "[network] tap names the tap")
    else:
        yield from _tap(net, f.tap, shut=_shut(net, f, at))
        yield from _membership(net, f, at)
        if at.role == "secondary":
            if f.hook_trouble:
                yield Check("hook", FAIL, f.hook_trouble, '[network] hook = "auto"')
            else:
                yield Check("hook", OK, f.hook)
    if net.bridge:
        yield from bridge(net.bridge, f.bridge, net.tap, shut=_shut(net, f, at))
    if f.waits:
        yield Check("bridge", FAIL, f"{net.tap} is {f.port} in its bridge: the guest is cut off",
                    "let STP forward on this port, or turn STP off")  # fmt: skip
    if f.foreign_xdp:
        yield Check(
            "XDP", FAIL, f"{net.tap} has a program of another tool ({f.foreign_xdp})",
            f"ip link set {net.tap} xdp off, once nobody needs it",
        )  # fmt: skip
    yield from _peer_link(net, f)


def _shut(net: Network, f: NicFacts, at: Standing) -> bool:
    """Return whether a device that is down may be what keeps the guest from transmitting."""
    return not at.allowed and (bool(f.master) or not net.bridge)


def _tap(net: Network, tap: LinkInfo, *, shut: bool) -> Iterator[Check]:
    wrong = False
    if not tap.persistent:
        wrong = True
        yield Check(
            "tap", FAIL, f"{net.tap} was made by QEMU itself: it vanishes with QEMU, and with it "
            "what keeps its guest silent",
            f"end QEMU, `ip tuntap add dev {net.tap} mode tap vnet_hdr`, start QEMU again; at each "
            "boot: docs/operator/install.md, step 2",
        )  # fmt: skip
    if not tap.up:
        wrong = True
        fix = link_up(net.tap)
        text = f"{net.tap} is down: nothing reaches the guest, and nothing leaves it"
        yield Check("tap", FAIL, text, fix.command, None if shut else fix)
    if not wrong:
        yield Check(
            "tap", OK, f"{net.tap}, vnet_hdr {'on' if tap.vnet_hdr else 'off'}, mtu {tap.mtu}"
        )


def _membership(net: Network, f: NicFacts, at: Standing) -> Iterator[Check]:
    """Judge which bridge the tap is in, if any: it joins when its guest may transmit."""
    tap, wanted = net.tap, net.bridge
    out = f"ip link set {tap} nomaster"
    if f.master and not at.allowed:
        if at.role == "secondary":
            yield Check("isolation", FAIL, f"{tap} is in a bridge ({f.master})",
                        f"{out}; it joins at failover")  # fmt: skip
        elif wanted not in ("", f.master):
            yield Check("isolation", FAIL, f"{tap} is in {f.master}, and [network] bridge is "
                        f"{wanted}", f"{out}; the controller adds it to {wanted}")  # fmt: skip
        else:
            yield Check(
                "isolation", WARN, f"{tap} is in a bridge, but no controller has allowed its guest "
                "to transmit: after a boot it transmits even if the other guest does",
                f"{out}, and set [network] bridge: the controller adds it",
            )  # fmt: skip
    elif at.allowed and wanted and not f.master:
        fix = join_bridge(tap, wanted)
        yield Check("bridge", FAIL, f"{tap} is in no bridge, although its guest transmits: clients "
                    "get no answer", fix.command, fix)  # fmt: skip
    elif at.allowed and wanted and f.master != wanted:
        yield Check("bridge", FAIL, f"{tap} is in {f.master}, and [network] bridge is {wanted}: "
                    "clients get no answer", f"ip link set {tap} master {wanted}")  # fmt: skip
    elif not wanted and (at.role == "secondary" or not f.master):
        what = (
            "none: after a failover the host must route for the guest"
            if at.role == "secondary"
            else f"{tap} is in no bridge, and none is configured: the host must route for the guest"
        )
        yield Check("bridge", WARN, what, "[network] bridge")
    elif f.master:
        yield Check("isolation", OK, f"{tap} is in {f.master}: its guest may transmit")
    else:
        yield Check("isolation", OK, f"{tap} is in no bridge until its guest may transmit")


def bridge(name: str, b: Bridge | None, tap: str, *, shut: bool = False) -> Iterator[Check]:
    """Judge the bridge: a port that joins it has to forward at once. `shut`: see _shut()."""
    if b is None:
        yield Check("bridge", FAIL, f"network device {name} does not exist",
                    f"ip link add {name} type bridge, and give it the uplink")  # fmt: skip
        return
    if not b.is_bridge:
        yield Check("bridge", FAIL, f"{name} is no bridge", "[network] bridge names a bridge")
        return
    bad = False
    if not b.up:
        bad, fix = True, link_up(name)
        text = f"{name} is down: it forwards nothing"
        yield Check("bridge", FAIL, text, fix.command, None if shut else fix)
    if b.stp == 1 and b.delay:
        bad = True
        yield Check(
            "bridge", FAIL,
            f"{name} has STP on: after a takeover the guest is cut off for {2 * b.delay:g} s",
            f"ip link set {name} type bridge stp_state 0, if the network has no loop here",
        )  # fmt: skip
    elif b.stp and b.delay:
        bad = True
        yield Check(
            "bridge", WARN, f"a daemon runs STP on {name}: the tap must forward at once",
            f"mstpctl setportadminedge {name} {tap} yes, whenever the tap joins",
        )  # fmt: skip
    if not bad:
        yield Check("bridge", OK, f"{name}, a port forwards as soon as it joins")


def _peer_link(net: Network, f: NicFacts) -> Iterator[Check]:
    peer = f.peer
    if peer is None:
        if net.vxlan_remote:
            yield Check("peer link", OK, f"{net.peer_link}: a VXLAN that `run` creates")
        else:
            yield Check("peer link", FAIL, f"network device {net.peer_link} does not exist",
                        "[network] peer_link, or docs/operator/install.md, step 3")  # fmt: skip
        return
    mtu = (f.tap.mtu if f.tap else 1500) + f.tag_bytes
    if net.vxlan_remote and peer.kind != "vxlan":
        yield Check("peer link", FAIL, f"{net.peer_link} exists and is not a VXLAN ({peer.kind})",
                    "another name for [network] peer_link, or no vxlan_remote")  # fmt: skip
    if not peer.up:
        fix = link_up(net.peer_link)
        yield Check("peer link", FAIL, f"{net.peer_link} is down", fix.command, fix)
    elif not peer.carrier:
        yield Check("peer link", FAIL, f"{net.peer_link} has no carrier",
                    "the cable, the switch's port, or the other host's device")  # fmt: skip
    elif peer.mtu < mtu:
        yield Check("peer link", WARN, f"{net.peer_link}: mtu {peer.mtu}, frames need {mtu}",
                    f"ip link set {net.peer_link} mtu {mtu}, on both hosts: frames carry a tag "
                    "there")  # fmt: skip
    else:
        yield Check("peer link", OK, f"{net.peer_link}, mtu {peer.mtu}")


# ---- addresses


def local_addresses(config: Config) -> list[tuple[str, str]]:
    """Return (key, IP address) of each address that the file says is this host's."""
    listed = [
        ("[peer] local", config.peer.local),
        ("[metrics] listen", config.metrics.listen),
        ("[nbd] local", config.nbd.local),
    ]
    out = [(key, str(end[0])) for key, text in listed if text and (end := validate.split(text))]
    for text in config.peer.heartbeat_links:
        ends = validate.path_ends(text)
        if ends is not None:
            out.append(("[peer] heartbeat_links", str(ends[0][0])))
    out += [("[network] vxlan_local", n.vxlan_local) for n in config.networks if n.vxlan_local]
    return out


def addresses(config: Config, own: frozenset[str]) -> Iterator[Check]:
    """Judge whether the addresses that the file calls local are this host's."""
    mine = {ipaddress.ip_address(a.partition("%")[0]) for a in own}
    lost = []
    for key, text in local_addresses(config):
        ip = ipaddress.ip_address(text.partition("%")[0])
        if ip.is_loopback or ip.is_unspecified or ip in mine:
            continue
        lost.append(key)
        yield Check(
            "addresses", FAIL, f"{key}: {text} is no address of this host",
            f"`ip address` shows those that are: correct the file (is it the other host's?), or "
            f"ip address add {text}/... dev ...",
        )  # fmt: skip
    if not lost:
        yield Check("addresses", OK, "those of the file are this host's")


# ---- the other host


def by_controller(config: Config, status: Mapping[str, Any]) -> Iterator[Check]:
    """Judge whether both hosts reach each other, as a running controller has seen it."""
    peer, limit = status["peer"], config.peer.heartbeat_timeout
    if peer["connected"]:
        yield Check("other host", OK, f"the control channel is up, both ways; it says "
                    f"`{peer['state']}`{BY}")  # fmt: skip
    else:
        port = config.peer.remote if config.role == "primary" else config.peer.local
        yield Check(
            "other host", FAIL, f"the control channel is down: {status['reason']}{BY}",
            "start the other host's controller; else: `journalctl -u colo-xdp@"
            f"{config.pair}` on both hosts, and a firewall has to allow {port}/tcp",
        )  # fmt: skip
    for link in status["heartbeat_links"]:
        yield _heartbeats(link, limit, connected=bool(peer["connected"]))


def _heartbeats(link: Mapping[str, Any], limit: float, *, connected: bool) -> Check:
    name, silent, echo = link["name"], link["silent_ms"], link["echo_age_ms"]
    comes = silent is not None and silent <= limit
    arrives = echo is not None and echo <= limit
    if link["trouble"]:
        return Check("heartbeats", FAIL, f"{name}: {link['trouble']}{BY}", "[peer] heartbeat_links")
    if comes and arrives:
        return Check("heartbeats", OK, f"over {name}, both ways{BY}")
    if comes:
        return Check(
            "heartbeats", FAIL, f"over {name} they come from the other host, and none of this "
            f"host's arrives there{BY}",
            "the firewall of the other host, or a switch that lets one direction through",
        )  # fmt: skip
    what = "nothing comes from the other host" + ("" if connected else ", whose controller is away")
    return Check(
        "heartbeats", FAIL if connected else WARN, f"over {name} {what}{BY}",
        "this host's firewall, the link itself, and the same entry in the other host's file",
    )  # fmt: skip


def reached(config: Config, r: Reach) -> Check:
    """Judge one attempt to reach the other host: without a controller here, only one way."""
    where, one_way = config.peer.remote, "; only the way there was tried: no controller runs here"
    listens = config.role == "primary"  # the other host's controller does
    match r.kind:
        case "open" if listens:
            return Check("other host", OK, f"{where}: {r.text}{one_way}")
        case "open":
            return Check("other host", WARN, f"{where}: something listens there, where no "
                         f"controller does{one_way}", "is that the primary's address?")  # fmt: skip
        case "refused" if listens:
            return Check("other host", WARN, f"{where}: the host answers, no controller listens",
                         "start the other host's controller")  # fmt: skip
        case "refused":
            return Check("other host", OK, f"{where}: the host answers{one_way}")
        case "tls":
            return Check("other host", FAIL, f"{where}: {r.text}", "[peer] cert, key, ca, on both "
                         "hosts: docs/operator/install.md, step 4")  # fmt: skip
        case "local":
            return Check("other host", WARN, f"{where}: {r.text}", "correct [peer] local")
        case _:
            return Check(
                "other host", FAIL if listens else WARN, f"{where}: {r.text}",
                "is that host up? The route to it, and a firewall: it has to allow the port",
            )  # fmt: skip


def firewall(config: Config, chains: Sequence[str], *, proven: bool) -> Iterator[Check]:
    """Judge this host's packet filter. `proven`: the other host has been heard through it."""
    if not chains or proven:
        return
    ports = [f"{config.peer.local.rpartition(':')[2]}/tcp"] * (config.role == "secondary")
    for text in config.peer.heartbeat_links:
        ends = validate.path_ends(text)
        ports += [f"{ends[0][1]}/udp"] if ends else []
    if config.nbd.local:
        ports.append(f"{config.nbd.local.rpartition(':')[2]}/tcp")
    ports.append("the port of QEMU's migration")
    yield Check(
        "firewall", WARN, f"nftables drops what no rule allows ({', '.join(chains)})",
        f"make sure that a rule allows from the other host: {', '.join(ports)}",
    )  # fmt: skip


def clock(is_set: bool | None) -> Check:
    """Judge this host's clock."""
    if is_set is False:
        return Check("clock", WARN, "nothing keeps it right: certificates begin and end by it, and "
                     "the logs of both hosts are compared by it",
                     "apt-get install systemd-timesyncd (or chrony)")  # fmt: skip
    return Check("clock", OK, "kept right" if is_set else "the kernel does not say")
