# SPDX-License-Identifier: GPL-2.0-or-later
"""What doctor says of devices, addresses and the other host: a row for each finding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from colo_xdp.abi import Mode
from colo_xdp.config.file import Config, load
from colo_xdp.datapath import firewall, loader
from colo_xdp.datapath.devices import LinkInfo
from colo_xdp.tools import host_checks, host_facts
from colo_xdp.tools.findings import FAIL, OK, WARN, Check, FixKind
from colo_xdp.tools.host_facts import Bridge, NicFacts, Standing
from colo_xdp.tools.reach import Reach

EXAMPLES = Path(__file__).parents[3] / "deploy/examples"
PRIMARY, SECONDARY = (load(EXAMPLES / f"{role}.toml") for role in ("primary", "secondary"))
NET = PRIMARY.network  # tap-web1, eth1, br0
TAP = LinkInfo("tap-web1", 5, "tun", True, True, 1500, "", 0, True, False, 0, "none")
PEER = replace(TAP, name="eth1", kind="", mtu=1600, vnet_hdr=False)
GOOD = NicFacts(TAP, PEER, Bridge("br0", True), hook="tc")
LIVE = Standing("primary", allowed=True)
UNDECIDED = Standing("primary")
SVM = Standing("secondary")
TAKEN_OVER = Standing("secondary", allowed=True)


def worse(found: list[Check]) -> list[Check]:
    for c in found:
        assert c.level == OK or c.remedy, f"{c.text}: no remedy"
    return [c for c in found if c.level != OK]


@pytest.mark.parametrize(
    ("facts", "at"),
    [(GOOD, UNDECIDED), (GOOD, SVM), (replace(GOOD, master="br0"), LIVE),
     (replace(GOOD, master="br0"), TAKEN_OVER)],
)  # fmt: skip
def test_devices_as_they_should_be(facts: NicFacts, at: Standing) -> None:
    assert worse(list(host_checks.nic(NET, facts, at))) == []


def tap(**change: Any) -> NicFacts:
    return replace(GOOD, tap=replace(TAP, **change))


def peer(**change: Any) -> NicFacts:
    return replace(GOOD, peer=replace(PEER, **change))


@pytest.mark.parametrize(
    ("facts", "at", "key", "level", "text", "remedy"),
    [
        (replace(GOOD, tap=None), SVM, "tap", FAIL, "tap-web1 does not exist",
         "ip tuntap add dev tap-web1 mode tap vnet_hdr"),
        (tap(kind="veth"), SVM, "tap", FAIL, "is a veth, not a tap", "[network] tap"),
        (tap(up=False), SVM, "tap", FAIL, "tap-web1 is down", "ip link set tap-web1 up"),
        (tap(persistent=False), SVM, "tap", FAIL, "made by QEMU itself", "ip tuntap add"),
        (replace(GOOD, master="br7"), SVM, "isolation", FAIL, "is in a bridge (br7)", "nomaster"),
        (replace(GOOD, master="br0"), UNDECIDED, "isolation", WARN, "no controller has allowed",
         "nomaster"),
        (replace(GOOD, master="br7"), UNDECIDED, "isolation", FAIL,
         "is in br7, and [network] bridge is br0", "nomaster"),
        (GOOD, LIVE, "bridge", FAIL, "in no bridge, although its guest transmits",
         "ip link set tap-web1 master br0"),
        (GOOD, TAKEN_OVER, "bridge", FAIL, "in no bridge, although its guest transmits",
         "ip link set tap-web1 master br0"),
        (replace(GOOD, master="br7"), LIVE, "bridge", FAIL,
         "is in br7, and [network] bridge is br0", "ip link set tap-web1 master br0"),
        (replace(GOOD, bridge=None), SVM, "bridge", FAIL, "br0 does not exist", "ip link add br0"),
        (replace(GOOD, bridge=Bridge("br0", True, is_bridge=False)), SVM, "bridge", FAIL,
         "br0 is no bridge", "names a bridge"),
        (replace(GOOD, bridge=Bridge("br0", False)), SVM, "bridge", FAIL, "br0 is down",
         "ip link set br0 up"),
        (replace(GOOD, bridge=Bridge("br0", True, 1, 15.0)), SVM, "bridge", FAIL,
         "cut off for 30 s", "stp_state 0"),
        (replace(GOOD, bridge=Bridge("br0", True, 2, 15.0)), SVM, "bridge", WARN,
         "a daemon runs STP", "setportadminedge br0 tap-web1"),
        (replace(GOOD, master="br0", port="learning", waits=True), LIVE, "bridge", FAIL,
         "tap-web1 is learning", "turn STP off"),
        (replace(GOOD, foreign_xdp="other"), SVM, "XDP", FAIL, "another tool (other)", "xdp off"),
        (replace(GOOD, hook_trouble="XDP cannot"), SVM, "hook", FAIL, "XDP cannot", "hook"),
        (replace(GOOD, peer=None), SVM, "peer link", FAIL, "eth1 does not exist", "peer_link"),
        (peer(up=False), SVM, "peer link", FAIL, "eth1 is down", "ip link set eth1 up"),
        (peer(carrier=False), SVM, "peer link", FAIL, "no carrier", "cable"),
        (peer(mtu=1500), SVM, "peer link", WARN, "mtu 1500, frames need 1504",
         "ip link set eth1 mtu 1504"),
    ],
)  # fmt: skip
def test_each_fault_of_a_device(
    facts: NicFacts, at: Standing, key: str, level: int, text: str, remedy: str
) -> None:
    (c,) = worse(list(host_checks.nic(NET, facts, at)))
    assert (c.key, c.level) == (key, level)
    assert text in c.text and remedy in c.remedy


@pytest.mark.parametrize(
    ("facts", "at", "kind", "command"),
    [
        (tap(up=False), SVM, FixKind.LINK_UP, "ip link set tap-web1 up"),
        (GOOD, LIVE, FixKind.JOIN_BRIDGE, "ip link set tap-web1 master br0"),
        (replace(GOOD, bridge=Bridge("br0", False)), SVM, FixKind.LINK_UP, "ip link set br0 up"),
        (peer(up=False), SVM, FixKind.LINK_UP, "ip link set eth1 up"),
        (replace(GOOD, master="br7"), LIVE, None, ""),
        (replace(GOOD, master="br0"), SVM, None, ""),
        (replace(GOOD, master="br0"), UNDECIDED, None, ""),
        (replace(GOOD, bridge=Bridge("br0", True, 1, 15.0)), SVM, None, ""),
        (tap(persistent=False), SVM, None, ""),
        (GOOD, SVM, None, ""),
    ],
)  # fmt: skip
def test_what_is_mended_and_what_only_told(
    facts: NicFacts, at: Standing, kind: FixKind | None, command: str
) -> None:
    """Never: a tap into a bridge whose guest may not transmit, out of a bridge, or STP."""
    fixes = [c.fix for c in host_checks.nic(NET, facts, at) if c.fix]
    assert [(f.kind, f.command) for f in fixes] == ([(kind, command)] if kind else [])


@pytest.mark.parametrize("at", [SVM, UNDECIDED])
def test_a_device_that_is_down_may_be_what_keeps_a_guest_silent(at: Standing) -> None:
    """A tap that is in a bridge too early, or whose host routes: nothing is brought up."""
    down = replace(tap(up=False), bridge=Bridge("br0", False))
    for net, facts in ((NET, replace(down, master="br0")), (replace(NET, bridge=""), down)):
        found = [c for c in host_checks.nic(net, facts, at) if "is down" in c.text]
        assert found and not [c for c in found if c.fix]
    assert [c.fix for c in host_checks.nic(NET, replace(down, master="br0"), LIVE) if c.fix]


def test_without_a_bridge_the_host_routes() -> None:
    routed = replace(NET, bridge="")
    for at, words in ((SVM, "after a failover the host must route"), (LIVE, "none is configured")):
        (c,) = worse(list(host_checks.nic(routed, replace(GOOD, bridge=None), at)))
        assert (c.key, c.level) == ("bridge", WARN) and words in c.text
    by_hand = replace(GOOD, bridge=None, master="br0")
    assert worse(list(host_checks.nic(routed, by_hand, LIVE))) == []


def test_a_vxlan_is_made_by_the_controller() -> None:
    net = replace(NET, vxlan_remote="192.0.2.2")
    assert worse(list(host_checks.nic(net, replace(GOOD, peer=None), SVM))) == []
    (c,) = worse(list(host_checks.nic(net, GOOD, SVM)))
    assert c.key == "peer link" and "is not a VXLAN" in c.text


def test_of_several_nics_each_is_named() -> None:
    c = replace(PRIMARY, further=(replace(NET, name="san", tap="tap7"),))
    found = list(host_checks.nics(c, [GOOD, replace(GOOD, tap=None)], UNDECIDED))
    assert {x.nic for x in found} == {NET.name, "san"}
    assert [x.title for x in found if x.level == FAIL] == ["tap (san)"]
    assert {x.nic for x in host_checks.nics(PRIMARY, [GOOD], UNDECIDED)} == {""}


# ---- addresses


LOCAL = {"peer": replace(PRIMARY.peer, heartbeat_links=("198.51.100.1:9850->198.51.100.2:9850",))}


def test_addresses_of_this_host() -> None:
    c = replace(PRIMARY, **LOCAL)
    assert worse(list(host_checks.addresses(c, frozenset({"192.0.2.1", "198.51.100.1"})))) == []
    found = worse(list(host_checks.addresses(c, frozenset({"192.0.2.2", "127.0.0.1"}))))
    assert [x.level for x in found] == [FAIL, FAIL]
    assert "[peer] local: 192.0.2.1 is no address of this host" in found[0].text
    assert "[peer] heartbeat_links: 198.51.100.1" in found[1].text
    more = replace(
        c, nbd=replace(c.nbd, local="[fd00::1]:10809"),
        metrics=replace(c.metrics, listen="0.0.0.0:9847"),
        network=replace(NET, vxlan_local="10.9.9.9"),
    )  # fmt: skip
    own = frozenset({"192.0.2.1", "198.51.100.1"})
    said = [x.text.partition(":")[0] for x in worse(list(host_checks.addresses(more, own)))]
    assert said == ["[nbd] local", "[network] vxlan_local"]


# ---- the other host


LINK = {"name": "peer link", "silent_ms": 90.0, "echo_age_ms": 95.0, "trouble": ""}


def status(connected: bool = True, **link: Any) -> dict[str, Any]:
    return {
        "peer": {"connected": connected, "state": "protected"},
        "reason": "the peer is silent",
        "heartbeat_links": [LINK | link],
    }


@pytest.mark.parametrize(
    ("doc", "said"),
    [
        (status(), []),
        (status(False), [("other host", FAIL, "control channel is down", "9846/tcp")]),
        (status(echo_age_ms=9000.0), [("heartbeats", FAIL, "none of this host's arrives",
                                       "firewall of the other host")]),
        (status(echo_age_ms=None), [("heartbeats", FAIL, "none of this host's arrives",
                                     "firewall of the other host")]),
        (status(silent_ms=9000.0), [("heartbeats", FAIL, "nothing comes", "this host's firewall")]),
        (status(silent_ms=None), [("heartbeats", FAIL, "nothing comes", "this host's firewall")]),
        (status(False, silent_ms=None),
         [("other host", FAIL, "control channel is down", ""),
          ("heartbeats", WARN, "whose controller is away", "firewall")]),
        (status(trouble="no such device"), [("heartbeats", FAIL, "no such device", "[peer]")]),
    ],
)  # fmt: skip
def test_both_ways_as_the_controller_sees_them(
    doc: dict[str, Any], said: list[tuple[str, int, str, str]]
) -> None:
    found = list(host_checks.by_controller(PRIMARY, doc))
    assert all("(by the running controller)" in c.text for c in found)
    bad = worse(found)
    assert [(c.key, c.level) for c in bad] == [x[:2] for x in said]
    for c, (_, _, text, remedy) in zip(bad, said, strict=True):
        assert text in c.text and remedy in c.remedy


@pytest.mark.parametrize(
    ("config", "kind", "level", "text"),
    [
        (PRIMARY, "open", OK, "only the way there was tried"),
        (PRIMARY, "refused", WARN, "no controller listens"),
        (PRIMARY, "tls", FAIL, "says so"),
        (PRIMARY, "none", FAIL, "says so"),
        (PRIMARY, "local", WARN, "says so"),
        (SECONDARY, "refused", OK, "the host answers"),
        (SECONDARY, "open", WARN, "where no controller does"),
        (SECONDARY, "none", WARN, "says so"),
    ],
)
def test_one_way_without_a_controller(config: Config, kind: str, level: int, text: str) -> None:
    c = host_checks.reached(config, Reach(kind, "says so"))
    assert (c.key, c.level) == ("other host", level) and text in c.text
    assert bool(c.remedy) == (level != OK)


def test_a_packet_filter_that_drops() -> None:
    chains = ["inet filter input"]
    assert list(host_checks.firewall(SECONDARY, [], proven=False)) == []
    assert list(host_checks.firewall(SECONDARY, chains, proven=True)) == []
    (c,) = host_checks.firewall(replace(SECONDARY, **LOCAL), chains, proven=False)
    assert c.level == WARN and "inet filter input" in c.text
    assert "9850/udp" in c.remedy and "migration" in c.remedy
    (c,) = host_checks.firewall(SECONDARY, chains, proven=False)
    assert "9846/tcp" in c.remedy, "the secondary listens"


class Chain(dict[str, Any]):
    """A message of nf_tables, as pyroute2 gives it."""

    def get_attr(self, name: str) -> Any:
        return self.get(name)


def test_chains_that_drop(monkeypatch: pytest.MonkeyPatch) -> None:
    def chain(family: int, hook: int | None, policy: int) -> Chain:
        at = None if hook is None else Chain(NFTA_HOOK_HOOKNUM=hook)
        return Chain(
            nfgen_family=family, NFTA_CHAIN_HOOK=at, NFTA_CHAIN_POLICY=policy,
            NFTA_CHAIN_TABLE="filter", NFTA_CHAIN_NAME="input",
        )  # fmt: skip

    class Session:
        def __enter__(self) -> Session:
            return self

        def __exit__(self, *exc: object) -> None:
            pass

        def get_chains(self) -> list[Chain]:
            return [chain(1, 1, 0), chain(1, 1, 1), chain(2, 3, 0), chain(7, 1, 0), chain(10, 1, 0),
                    chain(2, None, 0)]  # fmt: skip

    monkeypatch.setattr(firewall, "nftables", Session)
    assert firewall.dropping() == ["inet filter input", "ip6 filter input"]

    def absent() -> Session:
        raise OSError(95, "no nf_tables")

    monkeypatch.setattr(firewall, "nftables", absent)
    assert firewall.dropping() == []


def test_the_clock() -> None:
    assert host_checks.clock(True).level == host_checks.clock(None).level == OK
    bad = host_checks.clock(False)
    assert bad.level == WARN and "timesyncd" in bad.remedy
    assert host_facts.clock_is_set() in (True, False, None)


def test_where_the_guest_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the controller's status, else by what is pinned for either role."""
    modes = {"web1-primary": Mode.DROP, "web1-secondary": Mode.DROP}

    def pinned(directory: str, slot: int) -> int:
        return modes[Path(directory).name]

    monkeypatch.setattr(loader, "pinned_slot", pinned)
    assert host_facts.standing(PRIMARY, 0) == Standing("primary", 0, False)
    modes["web1-secondary"] = Mode.RUN
    assert not host_facts.standing(SECONDARY, 0).allowed, "an SVM that is compared"
    modes["web1-secondary"] = Mode.TAKEOVER
    assert host_facts.standing(SECONDARY, 0).allowed
    assert host_facts.standing(SECONDARY, 7, "primary", "run") == Standing("primary", 7, True)
    assert not host_facts.standing(SECONDARY, 7, "secondary", "checkpoint").allowed
