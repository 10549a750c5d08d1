# SPDX-License-Identifier: GPL-2.0-or-later
"""What the configuration specifies about QEMU's migration channel, as QEMU's parameters. Pure.

Qmp.prepare() sets them on either side; Qmp.migration_trouble() looks whether this QEMU takes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MULTIFD_SINCE = (11, 0, 0)  # QEMU that loads what comes by multifd into COLO's cache
MAX_BANDWIDTH = 8 << 30  # bytes/s: more than any link, where the configuration has no limit


@dataclass(frozen=True, slots=True)
class MigrationOptions:
    """How this host's QEMU sends its guest's state, or receives the other one's."""

    max_bandwidth: int = 0  # bytes/s; 0: no limit
    multifd: int = 0  # channels besides the main one; 0: off
    tls_creds: str = ""  # id of an object for the direction of this guest's role
    tls_hostname: str = ""
    listen: str = ""  # where a QEMU that was started with `-incoming defer` is to wait

    def parameters(self, *, sends: bool) -> dict[str, Any]:
        """Return the arguments of migrate-set-parameters.

        A limit that another tool has left is always replaced. TLS credentials that the
        configuration does not name stay: whoever has set them wants the channel encrypted.
        """
        out: dict[str, Any] = {}
        if sends:
            out["max-bandwidth"] = self.max_bandwidth or MAX_BANDWIDTH
        if self.multifd:
            out |= {"multifd-channels": self.multifd, "multifd-compression": "none"}
        if self.tls_creds:
            hostname = self.tls_hostname if sends else ""
            out |= {"tls-creds": self.tls_creds, "tls-hostname": hostname, "tls-authz": ""}
        return out

    def report(self) -> dict[str, str]:
        """Return what both hosts must agree on, for the comparison in qemu/hardware.py."""
        out = {"[migration] multifd": str(self.multifd)} if self.multifd else {}
        return out | ({"[migration] tls_creds": "set"} if self.tls_creds else {})


def is_deferred(migration: Mapping[str, Any]) -> bool:
    """Return whether a waiting QEMU (its query-migrate) has not been told yet where to wait.

    QEMU 8.2 and newer say `setup` once they listen, all say at which address.
    """
    return not migration.get("status") and "socket-address" not in migration


def creds_refusal(
    options: MigrationOptions, types: Mapping[str, str], endpoint: str, *, sends: bool
) -> str:
    """Return why the TLS credentials cannot be used, or an empty string.

    `types`: QOM types of the children of /objects, by id. `endpoint`: that of the credentials.
    """
    name = options.tls_creds
    if not types.get(name, "").startswith("child<tls-creds-"):
        return (
            f"[migration] names the TLS credentials {name}, and this QEMU has no such object: "
            f"-object tls-creds-x509,id={name},..."
        )
    want = "client" if sends else "server"
    if endpoint != want:
        does = "sends its guest's state" if sends else "receives the other guest's state"
        return (
            f"[migration] names the TLS credentials {name}, which are for the endpoint "
            f"`{endpoint}`: a QEMU that {does} needs endpoint={want}"
        )
    return ""
