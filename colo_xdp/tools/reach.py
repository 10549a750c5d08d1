# SPDX-License-Identifier: GPL-2.0-or-later
"""Try the way to the other host's controller, without being taken for one.

No hello is sent, so a running connection of the controllers is not replaced. QEMU's ports are not
tried: a QEMU that waits for a migration takes the first connection for it.
"""

from __future__ import annotations

import errno
import socket
import ssl
from dataclasses import dataclass

from ..config.file import Config
from ..peer.channel import OTHER, split_address
from ..peer.tls import Tls, TlsError

REACH_S = 3.0


@dataclass(frozen=True, slots=True)
class Reach:
    """What an attempt ended with: open, refused, tls, none (nobody answered), local (not tried)."""

    kind: str
    text: str


def control_channel(config: Config, timeout: float = REACH_S) -> Reach:
    """Connect to the other host's end of the control channel, with TLS as configured."""
    host, port = split_address(config.peer.remote)
    try:
        local = (split_address(config.peer.local)[0], 0)
        with socket.create_connection((host, port), timeout, source_address=local) as s:
            return _handshake(config, s)
    except ConnectionRefusedError:
        return Reach("refused", "connection refused")
    except TimeoutError:
        return Reach("none", f"no answer within {timeout:g} s")
    except OSError as e:
        if e.errno == errno.EADDRNOTAVAIL:
            return Reach("local", "not tried: [peer] local is no address of this host")
        return Reach("none", e.strerror or str(e))


def _handshake(config: Config, s: socket.socket) -> Reach:
    p = config.peer
    if not p.cert or config.role != "primary":  # only the secondary listens
        return Reach("open", "it answers, without TLS" if not p.cert else "it answers")
    tls = Tls(p.cert, p.key, p.ca, p.peer_cert, p.identity)
    try:
        with tls.context(server=False).wrap_socket(s) as t:
            tls.check(
                t.getpeercert() or {}, t.getpeercert(binary_form=True) or b"", config.pair,
                OTHER[config.role],
            )  # fmt: skip
    except (TlsError, ssl.SSLError) as e:
        return Reach("tls", str(e))
    except TimeoutError:
        return Reach("tls", "it takes the connection, and no TLS comes from it")
    except OSError as e:
        return Reach("tls", f"it closes the connection: {e.strerror or e}")
    return Reach("open", "it answers, with the certificate that is expected")
