# SPDX-License-Identifier: GPL-2.0-or-later
"""Routes and addresses: how the kernel reaches another host, and which it is itself."""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass

from .devices import DeviceError
from .netlink import NetlinkError, rtnetlink

RTN_UNICAST = 1


@dataclass(frozen=True, slots=True)
class Route:
    """How the kernel reaches another host."""

    dev: str
    gateway: str  # empty: it is on the same network
    source: str  # empty: any
    quickack: bool

    def with_quickack(self, address: str) -> str:
        """Return the command that makes this a route of its own, with quickack, to one host."""
        via = f" via {self.gateway}" if self.gateway else ""
        src = f" src {self.source}" if self.source else ""
        return f"ip route replace {address}{via} dev {self.dev}{src} quickack 1"


def route_to(address: str) -> Route | None:
    """Return the route to an IP address; None if there is none, or if it is this host's own."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with rtnetlink() as ipr:
        try:
            found = next(iter(ipr.route("get", dst=address, family=family)))
        except NetlinkError as e:
            if e.code in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL):
                return None
            raise
        if found["type"] != RTN_UNICAST:
            return None
        dev = ipr.link("get", index=found.get_attr("RTA_OIF"))[0].get_attr("IFLA_IFNAME")
    metrics = found.get_attr("RTA_METRICS")
    return Route(
        dev,
        found.get_attr("RTA_GATEWAY") or "",
        found.get_attr("RTA_PREFSRC") or "",
        bool(metrics and metrics.get_attr("RTAX_QUICKACK")),
    )


def has_own_route(address: str) -> bool:
    """Return whether somebody has made a route for this one address already."""
    v6 = ":" in address
    with rtnetlink() as ipr:
        return any(
            m["dst_len"] == (128 if v6 else 32) and m.get_attr("RTA_DST") == address
            for m in ipr.get_routes(family=socket.AF_INET6 if v6 else socket.AF_INET)
        )


def set_quickack(address: str) -> None:
    """Make the way to one host a route of its own, with quickack. Raises DeviceError."""
    way = route_to(address)
    if way is None:
        raise DeviceError(f"there is no route to {address}")
    v6 = ":" in address
    more: dict[str, object] = {"gateway": way.gateway} if way.gateway else {}
    if way.source:
        more["prefsrc"] = way.source
    with rtnetlink() as ipr:
        ipr.route(
            "replace",
            dst=f"{address}/{128 if v6 else 32}",
            family=socket.AF_INET6 if v6 else socket.AF_INET,
            oif=ipr.link_lookup(ifname=way.dev)[0],
            metrics={"quickack": 1},
            **more,
        )


def own_addresses() -> frozenset[str]:
    """Return the IP addresses of this host's devices."""
    with rtnetlink() as ipr:
        found = [m.get_attr("IFA_LOCAL") or m.get_attr("IFA_ADDRESS") for m in ipr.get_addr()]
    return frozenset(str(a) for a in found if a)
