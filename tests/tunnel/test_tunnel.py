# SPDX-License-Identifier: GPL-2.0-or-later
"""A pair whose peer link is a VXLAN in a tunnel: protected, with nothing to read on the wire."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from colo_xdp.lab.guest import content
from colo_xdp.lab.net import sh, stop_process, wait_for
from colo_xdp.lab.pair import Lab
from tests.netns.conftest import Sniffer
from tests.tunnel.tunnels import (
    INSIDE,
    OTHER,
    OUTSIDE,
    ROLES,
    Esp,
    Tunnel,
    WireGuard,
    filter_strangers,
    missing,
    udp_port,
)

WHY = missing()
pytestmark = [
    pytest.mark.e2e, pytest.mark.timeout(600), pytest.mark.skipif(bool(WHY), reason=WHY),
]  # fmt: skip
BUILD = Path(__file__).parents[2] / "build"
PEER_LINK, VNI, VXLAN_PORT = "cxpeer", 9846, 4789
SECONDS = 4  # of a measurement
#: what is searched for on the wire: as much of the file as any frame with a part of it has
PIECE = 64


@pytest.fixture(params=[WireGuard, Esp], ids=["wireguard", "esp"])
def hosts(request: pytest.FixtureRequest) -> Iterator[Tunnel]:
    """Provide a laboratory's hosts, with their wires and nothing else yet."""
    lab = Lab(BUILD, tag="cxtun", overrides={"compare": {"wait": "fixed"}})
    t: Tunnel = request.param(lab)
    try:
        lab.down()  # what a run that was killed has left
        lab.work.mkdir(parents=True, exist_ok=True)
        yield t
    finally:
        lab.down()
        t.close()


@pytest.fixture
def tunnel(hosts: Tunnel) -> Tunnel:
    """Provide hosts with a tunnel, and no guests."""
    hosts.lab.net.up()
    hosts.up()
    return hosts


def make_vxlan(t: Tunnel, name: str, vni: int, addresses: dict[str, str], net: str) -> None:
    """Make a VXLAN between both hosts, with addresses in it."""
    for role, n in (("primary", 1), ("secondary", 2)):
        t.ip(role, f"link add {name} type vxlan id {vni} dstport {VXLAN_PORT} nolearning "
                   f"local {addresses[role]} remote {addresses[OTHER[role]]}")  # fmt: skip
        t.ip(role, f"addr add {net}.{n}/24 dev {name}")
        t.ip(role, f"link set {name} up")


def throughput(t: Tunnel, address: str) -> float:
    """Return the Mbit/s of one TCP connection to the secondary's host."""
    lab = t.lab
    log = lab.work / "iperf3.log"
    log.unlink(missing_ok=True)
    server = lab.procs.start(
        ["iperf3", "--server", "--one-off", "--forceflush"], log, lab.ns("secondary")
    )
    try:
        wait_for("iperf3", lambda: b"listening" in log.read_bytes(), 10)
        said = sh("nsenter", f"--net=/run/netns/{lab.ns('primary')}", "iperf3", "--client", address,
                  "--time", str(SECONDS), "--json")  # fmt: skip
    finally:
        stop_process(server)
    return float(json.loads(said)["end"]["sum_received"]["bits_per_second"]) / 1e6


def test_what_it_costs(tunnel: Tunnel, capsys: pytest.CaptureFixture[str]) -> None:
    """A ratio of one run; docs/operator/security.md has some of an idle and of a busy machine."""
    make_vxlan(tunnel, "cxm0", 70, OUTSIDE, "10.70.0")
    make_vxlan(tunnel, "cxm1", 71, INSIDE, "10.71.0")
    plain, inside = (
        [throughput(tunnel, f"{net}.2") for _ in range(3)] for net in ("10.70.0", "10.71.0")
    )
    ratio = sorted(inside)[1] / sorted(plain)[1]
    with capsys.disabled():
        print(f"\n{type(tunnel).__name__}: {inside} Mbit/s, plain VXLAN {plain}: {ratio:.3f} of it")
    assert min(inside) > 10 and ratio < 1


def stranger(t: Tunnel, marker: bytes) -> None:
    """Send the primary's host a VXLAN frame over the bare wire, as anybody there could."""
    inner = b"\xff" * 6 + bytes.fromhex("020000000001") + b"\x88\xb5" + marker.ljust(60, b"\0")
    vxlan = struct.pack("!II", 0x08000000, VNI << 8) + inner
    udp = struct.pack("!HHHH", 40000, VXLAN_PORT, 8 + len(vxlan), 0) + vxlan
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0)
    ends = b"".join(
        bytes(map(int, a.split("."))) for a in (OUTSIDE["secondary"], INSIDE["primary"])
    )
    total = sum(struct.unpack("!10H", head + ends))
    total = (total & 0xFFFF) + (total >> 16)
    head = head[:10] + struct.pack("!H", ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF)
    mac = json.loads(t.ip("primary", "-json link show peer0"))[0]["address"]
    frame = bytes.fromhex(mac.replace(":", "")) + bytes.fromhex("020000000002") + b"\x08\x00"
    wire = Sniffer(t.lab.ns("secondary"), "peer0")
    wire.s.send(bytes(10) + frame + head + ends + udp)
    wire.close()


def test_a_strangers_frame_stays_outside(tunnel: Tunnel) -> None:
    """A VXLAN accepts what comes from anybody: the rule is what keeps the tunnel's promise."""
    make_vxlan(tunnel, PEER_LINK, VNI, INSIDE, "10.72.0")
    inside = Sniffer(tunnel.lab.ns("primary"), PEER_LINK)
    stranger(tunnel, b"before the rule")
    assert inside.wait(lambda f: b"before the rule" in f), "without a rule it arrives"
    filter_strangers(tunnel, "primary")
    stranger(tunnel, b"behind the rule")
    genuine = Sniffer(tunnel.lab.ns("secondary"), PEER_LINK)
    genuine.s.send(
        bytes(10)
        + b"\xff" * 6
        + bytes.fromhex("020000000003")
        + b"\x88\xb5"
        + b"through the tunnel".ljust(60)
    )
    genuine.close()
    seen: list[bytes] = []

    def last(frame: bytes) -> bool:
        seen.append(frame)
        return b"through the tunnel" in frame

    assert inside.wait(last)
    inside.close()
    assert not [f for f in seen if b"behind the rule" in f]


def use(t: Tunnel) -> None:
    """Have both controllers make their peer link in the tunnel."""
    for role in ROLES:
        path = t.lab.config_path(role)
        new = (f'peer_link = "{PEER_LINK}"\nvxlan_local = "{INSIDE[role]}"\n'
               f'vxlan_remote = "{INSIDE[OTHER[role]]}"\nvxlan_vni = {VNI}')  # fmt: skip
        text = path.read_text()
        assert text.count('peer_link = "peer0"') == 1
        path.write_text(text.replace('peer_link = "peer0"', new))


def found(frames: list[tuple[float, bytes]], text: bytes) -> bool:
    """Return whether a piece of the text is readable in one of the frames."""
    pieces = [text[i : i + PIECE] for i in range(0, len(text) - PIECE, 500)]
    return any(piece in frame for _, frame in frames for piece in pieces)


def test_a_pair_is_protected_and_nobody_reads_along(hosts: Tunnel) -> None:
    tunnel, lab = hosts, hosts.lab
    lab.up()
    tunnel.up()
    use(tunnel)
    for role in ROLES:
        filter_strangers(tunnel, role)
    lab.protect()
    for role in ROLES:  # WireGuard repeats a lost handshake after 5 s
        wait_for("heartbeats through the tunnel", lambda r=role: any(
            x["name"] == "peer link" and (x["silent_ms"] or 1e9) < 1000
            for x in lab.status(r)["heartbeat_links"]
        ), 20)  # type: ignore[misc]  # fmt: skip
        lab.wait_state(role, "protected", 20)
    wire = lab.capture(lab.net.primary, "peer0", "wire", whole=True)
    link = lab.capture(lab.net.primary, PEER_LINK, "link", whole=True)
    assert lab.client.download("f100k") == (100 << 10, 0)
    ok, why = lab.client.uptime_page()  # costs a checkpoint
    assert ok, why
    frames, inner = lab.stop_capture(wire), lab.stop_capture(link)
    assert found(inner, content("f100k")), "the guests' traffic is what goes through the tunnel"
    assert not found(frames, content("f100k"))
    assert not [f for _, f in frames if udp_port(f) == VXLAN_PORT]
    assert sum(tunnel.is_its_own(f) for _, f in frames) > 100
    # the tunnel has no part in a takeover
    lab.vm["primary"].kill9()
    lab.wait_state("secondary", "promoted", 30)
    assert lab.client.download("f100k") == (100 << 10, 0)
