# SPDX-License-Identifier: GPL-2.0-or-later
"""The keys of [network] and [[network]]: the devices of this host that carry the guest's frames."""

from __future__ import annotations

from dataclasses import dataclass

from .. import validate

DEFAULT_NIC = "net0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """[network]: the devices of this host; a [[network]] for each NIC of a guest with several."""

    name: str = validate.key(
        validate.pattern(r"[a-z0-9-]{1,10}", "1 to 10 of a-z, 0-9 and -"),
        "name of the NIC, the same on both hosts; required with several NICs",
        default=DEFAULT_NIC,
    )
    tap: str = validate.key(
        validate.device,
        "tap device of this host's guest",
    )
    peer_link: str = validate.key(
        validate.device,
        "device that leads to the other host; it carries the guests' frames",
    )
    vxlan_remote: str = validate.key(
        validate.or_empty(validate.ip, "peer_link exists already"),
        "remote address of a VXLAN that the controller creates and uses as peer_link; a VXLAN "
        "is not encrypted, so encrypt the network below it",
        default="",
    )
    vxlan_local: str = validate.key(
        validate.or_empty(validate.ip, "the kernel chooses it"),
        "this host's address of that VXLAN",
        default="",
    )
    vxlan_vni: int = validate.key(
        validate.integer(1, (1 << 24) - 1, "(a VNI)"),
        "VNI of that VXLAN: the same on both hosts, and a different one for each pair",
        default=9846,
    )
    vxlan_port: int = validate.key(
        validate.integer(1, 65535, "(a port)"),
        "UDP port of that VXLAN",
        default=4789,
    )
    bridge: str = validate.key(
        validate.or_empty(validate.device, "none"),
        'bridge that the tap joins as soon as the guest may transmit; "": the host routes the '
        "traffic, or the tap is added to a bridge by hand (primary host only)",
        default="",
    )
    uplink: str = validate.key(
        validate.device,
        'how frames released by the fast path leave; "auto": directly by the bridge port '
        'where the client was last seen, if the bridge filters nothing; "bridge": through the '
        "bridge; a device name: always by that device",
        default="auto",
    )
    hook: str = validate.key(
        validate.choice("auto", "xdp", "tc"),
        'where the secondary guest\'s output is intercepted; "auto": XDP if the tap has no '
        "vnet_hdr, else tc",
        default="auto",
    )
    guest_mac: str = validate.key(
        validate.or_empty(validate.mac, "the controller asks QEMU"),
        'MAC address of the guest, announced at a takeover; "": the controller asks QEMU',
        default="",
    )
    guest_addresses: tuple[str, ...] = validate.key(
        validate.ip_addresses,
        "IP addresses of the guest that are announced at a takeover, in addition to those "
        "that the guest has claimed itself by ARP or neighbor discovery",
        default=(),
    )

    @property
    def link_name(self) -> str:
        """The name of the peer link among the heartbeat links."""
        return "peer link" if self.name == DEFAULT_NIC else f"peer link {self.name}"
