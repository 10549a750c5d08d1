# SPDX-License-Identifier: GPL-2.0-or-later
"""What a NIC needs before anything is loaded, attached or replaced for any of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .. import abi
from ..abi import Cfg
from ..config.file import Config
from ..config.network import Network
from . import attach, devices, loader
from .manifest import Manifest, manifest_path


class DataPathError(RuntimeError):
    """The data path cannot be set up as configured; the text names the device or key."""


class DeviceMissing(DataPathError):
    """A device does not exist (yet); the text names its key."""

    def __init__(self, why: str, device: str) -> None:
        super().__init__(why)
        self.device = device


def choose_hook(wanted: str, tap: devices.LinkInfo) -> str:
    """Return `xdp` or `tc` for the SVM's output.

    XDP sees neither GSO nor partial checksums, so it is correct only on a tap without vnet_hdr.
    Raises DataPathError when XDP is requested where it would corrupt frames.
    """
    if wanted == "xdp" and tap.vnet_hdr:
        raise DataPathError(
            f'[network] hook = "xdp": tap {tap.name} has vnet_hdr, its frames carry offloads that '
            'XDP cannot see (checksums would be corrupted); use "tc" or a tap with vnet_hdr=off'
        )
    if wanted == "auto":
        return "tc" if tap.vnet_hdr else "xdp"
    return wanted


@dataclass(frozen=True, slots=True)
class Prepared:
    """The devices of one NIC, which can be used; `role`: which guest this host runs now."""

    manifest: Manifest
    role: str
    tap: devices.LinkInfo
    peer: devices.LinkInfo
    hook: str  # of the SVM's output: xdp or tc


def device(key: str, name: str) -> devices.LinkInfo:
    """Return the state of a device that [network] names. Raises DeviceMissing."""
    try:
        return devices.link_info(name)
    except devices.NoSuchDevice as e:
        raise DeviceMissing(f"[network] {key}: {e}", name) from e


def make_peer_link(net: Network, manifest: Manifest) -> None:
    """Create the peer link that is a VXLAN. Raises devices.DeviceError."""
    devices.make_vxlan(
        net.peer_link,
        net.vxlan_vni,
        net.vxlan_local,
        net.vxlan_remote,
        net.vxlan_port,
        manifest,
    )


def prepare(config: Config, nic: int, manifest: Manifest) -> Prepared:
    """Check what the NIC of that number needs; create its VXLAN.

    Raises DataPathError, DeviceMissing while a device is missing, attach.Taken when another pair
    has one, devices.DeviceError when the VXLAN cannot be created.
    """
    net, d = config.networks[nic], config.datapath
    first, pins = (loader.pin_dir(d.bpffs, config.pair, config.role, i) for i in (0, nic))
    stored = abi.HostRole(loader.pinned_slot(first, Cfg.ROLE))
    role = config.role if stored is abi.HostRole.CONFIGURED else stored.name.lower()
    tap = device("tap", net.tap)
    for dev, seen in attach.look((net.tap, net.peer_link)).items():
        if seen is not None and (why := attach.other_pair(dev, seen, config.pair)):
            raise attach.Taken(why)
    if net.vxlan_remote:
        make_peer_link(net, manifest)
    peer = device("peer_link", net.peer_link)
    pinned = (Path(pins) / "config").exists()
    if net.uplink not in ("auto", "bridge") and not pinned:
        device("uplink", net.uplink)
    if tap.kind != "tun":
        raise DataPathError(f"[network] tap: {net.tap} is not a tap device (kind {tap.kind!r})")
    secondary = Path(loader.pin_dir(d.bpffs, config.pair, "secondary", nic)) / "config"
    if role == "secondary" and tap.master and not stored and not secondary.exists():
        raise DataPathError(
            f"[network] tap: {net.tap} is in a bridge; on the secondary it must be in none "
            "(the bridge would learn the guest's address there)"
        )
    if net.bridge and not pinned:
        # a missing bridge should not first be noticed at a failover
        device("bridge", net.bridge)
    hook = "tc" if role == "primary" else choose_hook(net.hook, tap)
    return Prepared(manifest, role, tap, peer, hook)


def record(config: Config) -> Manifest:
    """Return the record of what is attached. Raises DataPathError if it has other NICs.

    The pins of a NIC are found by its number, and hold the offsets of its connections.
    """
    manifest = Manifest(manifest_path(config.datapath.run_dir, config.pair, config.role))
    was, now = manifest.data["nics"], _nics(config)
    pins = Path(loader.pin_dir(config.datapath.bpffs, config.pair, config.role))
    if was and was != now and (pins / "config").exists():
        raise DataPathError(
            f"[network]: the pinned data path has the NICs {', '.join(was)}, the configuration "
            f"{', '.join(now)}; a pair's NICs, their order and their taps stay as they are: stop "
            "both controllers and run `colo-xdp cleanup` once the guest may lose its connections"
        )
    return manifest


def note_nics(config: Config, manifest: Manifest) -> None:
    """Record the NICs that are about to be loaded."""
    manifest.replace("nics", _nics(config))


def _nics(config: Config) -> list[str]:
    return [f"{net.name} ({net.tap})" for net in config.networks]
