# SPDX-License-Identifier: GPL-2.0-or-later
"""Verify the identity of the other end of a TLS connection.

There are two ways to establish trust, both mutual and TLS 1.3 only:

- `ca`: a certificate issued by that authority which names the expected identity. The default
  identity is colo-xdp://PAIR/ROLE, so a certificate of another pair or of the same role is refused.
- `peer_cert`: exactly this certificate. If it names a colo-xdp identity, that must be the expected
  one; a certificate that names none (the user's own) is its own identity.

There are no session tickets: a resumed session would skip the check of the certificate, which may
have expired. peer/channel.py uses it for each connection.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEME = "colo-xdp://"


class TlsError(RuntimeError):
    """A file is missing or unusable, or the peer is not the expected one; the text says which."""


@dataclass(frozen=True, slots=True)
class Tls:
    """Paths of PEM files; `ca` or `peer_cert`. `identity` overrides that of pair and role."""

    cert: str
    key: str
    ca: str = ""
    peer_cert: str = ""
    identity: str = ""

    def context(self, *, server: bool) -> ssl.SSLContext:
        """Create a context; new for each connection, so that renewed files need no restart.

        Raises TlsError when a file is missing or not what it should be.
        """
        ctx = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        ctx.minimum_version = ssl.TLSVersion.TLSv1_3
        ctx.check_hostname = False  # hosts have addresses here; check() verifies the identity
        ctx.verify_mode = ssl.CERT_REQUIRED
        if server:
            ctx.num_tickets = 0
        if self.peer_cert:
            # a pinned certificate need not be an authority's
            ctx.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        what = "ca" if self.ca else "peer_cert"
        try:
            ctx.load_cert_chain(self.cert, self.key)
            ctx.load_verify_locations(self.ca or self.peer_cert)
        except (OSError, ssl.SSLError) as e:
            raise TlsError(f"[peer] cert, key, {what}: {e}") from e
        return ctx

    def check(self, found: Mapping[str, Any], der: bytes, pair: str, role: str) -> None:
        """Check that the other end's certificate, as ssl returns it, is that of `role` in `pair`.

        Raises TlsError, which names what was expected and what was found.
        """
        names = names_of(found)
        ours = [n for n in names if n.startswith(SCHEME)]
        want = self.identity or identity(pair, role)
        if self.peer_cert:
            try:
                pin = ssl.PEM_cert_to_DER_cert(Path(self.peer_cert).read_text("ascii"))
            except (OSError, ValueError) as e:
                raise TlsError(f"[peer] peer_cert: {e}") from e
            if der != pin:
                raise TlsError(
                    f"the peer's certificate ({_shown(names)}) is not the one of {self.peer_cert}"
                )
            if not ours:
                return
        if want not in names:
            raise TlsError(f"the peer's certificate is that of {_shown(names)}, expected {want}")


def identity(pair: str, role: str) -> str:
    """Return the URI that identifies one host of a pair in its certificate."""
    return f"{SCHEME}{pair}/{role}"


def names_of(found: Mapping[str, Any]) -> list[str]:
    """Return a certificate's URIs and DNS names, then its CN."""
    alt = [v for kind, v in found.get("subjectAltName", ()) if kind in ("URI", "DNS")]
    subject = [v for rdn in found.get("subject", ()) for k, v in rdn if k == "commonName"]
    return [*alt, *subject]


def _shown(names: list[str]) -> str:
    return " alias ".join(f"{n!r:.80}" for n in names[:3]) or "nobody (it has no name)"
