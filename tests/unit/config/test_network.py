# SPDX-License-Identifier: GPL-2.0-or-later
"""[network] and [[network]]: one NIC or several, each with devices and a name of its own."""

from __future__ import annotations

import pytest

from colo_xdp.config.file import ConfigError, as_toml, parse

BASE = """
pair = "web"
role = "primary"
[qemu]
qmp = "/run/a"
migrate_uri = "tcp:192.0.2.2:4444"
[peer]
local = "127.0.0.1:1"
remote = "127.0.0.1:2"
"""
LAN = '[[network]]\nname = "lan"\ntap = "tap0"\npeer_link = "p0"\n'
SAN = '[[network]]\nname = "san"\ntap = "tap1"\npeer_link = "p1"\n'
RULE = '[[rule]]\nname = "x"\naction = "pass"\nnic = "san"\n'


def test_several_are_kept_in_order() -> None:
    c = parse(BASE + LAN + SAN + RULE)
    assert [n.name for n in c.networks] == ["lan", "san"] and c.network.tap == "tap0"
    assert parse(as_toml(c)) == c
    names = [[r.name for r in c.policy(nic).order] for nic in ("lan", "san")]
    assert "x" not in names[0] and names[1][0] == "x"
    assert next(r.name for r in c.policy_of_all().order) == "x"


@pytest.mark.parametrize("text", [LAN, LAN.replace("[[network]]", "[network]")])
def test_one_may_be_written_either_way(text: str) -> None:
    c = parse(BASE + text)
    assert [n.name for n in c.networks] == ["lan"] and not c.further
    assert parse(as_toml(c)) == c


def test_the_only_one_needs_no_name() -> None:
    c = parse(BASE + '[network]\ntap = "tap0"\npeer_link = "p0"\n')
    assert c.network.name == "net0" and c.network.link_name == "peer link"
    assert [n.link_name for n in parse(BASE + LAN + SAN).networks] == [
        "peer link lan",
        "peer link san",
    ]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (LAN + SAN.replace("tap1", "tap0"), 'tap = "tap0": expected a device of its own'),
        (LAN + SAN.replace("p1", "p0"), 'peer_link = "p0": expected a device of its own'),
        (LAN + SAN.replace("p1", "tap0"), 'peer_link = "tap0": expected a device of its own'),
        (LAN + SAN.replace("san", "lan"), 'name = "lan": expected a name of its own'),
        (LAN + SAN.replace('name = "san"\n', "") + LAN.replace('name = "lan"\n', ""), "name"),
        (LAN + SAN + 'bridge = "tap0"\n', 'bridge = "tap0": expected no tap of the guest'),
        (
            LAN + 'guest_mac = "52:54:00:00:00:01"\n' + SAN + 'guest_mac = "52:54:00:00:00:01"\n',
            "expected an address of its own",
        ),
        (
            LAN + 'vxlan_remote = "192.0.2.2"\n' + SAN + 'vxlan_remote = "192.0.2.3"\n',
            "vxlan_vni = 9846: expected a VNI of its own",
        ),
        (LAN + RULE, 'nic = "san": expected the name of a NIC'),
        (LAN + SAN.replace("tap1", "bad tap"), "[network 2] tap"),
        (LAN + "[[network]]\nfoo = 1\n", "[network 2] unknown key 'foo'"),
        ("".join(LAN.replace("lan", f"n{i}") for i in range(9)), "9 NICs: expected at most 8"),
    ],
)
def test_what_cannot_be_is_named(text: str, why: str) -> None:
    with pytest.raises(ConfigError) as e:
        parse(BASE + text)
    assert why in str(e.value), str(e.value)


@pytest.mark.parametrize("value", ["3", "[]", "[1]", "[[]]", '"lan"'])
def test_no_table_at_all(value: str) -> None:
    with pytest.raises(ConfigError, match="network"):
        parse(f"network = {value}\n{BASE}")
