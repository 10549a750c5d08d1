# SPDX-License-Identifier: GPL-2.0-or-later
"""Validate values of the configuration: each check names what it expects.

A check returns None if the value is valid, otherwise the end of a sentence ("expected ..."). Pure,
nothing is looked up. config/schema.py and compare/policy.py declare their keys with it.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Callable
from dataclasses import MISSING, Field, field, fields
from typing import Any

Check = Callable[[Any], str | None]
_IFNAMSIZ = 16
_SUN_PATH = 108


_CONTROL = {
    n: "\N{REPLACEMENT CHARACTER}" for n in (*range(32), *range(127, 160)) if n not in (9, 10)
}


def printable(text: str) -> str:
    """Return a text of somebody else's without what a terminal would obey."""
    return text.translate(_CONTROL)


def key(check: Check, text: str, *, default: Any = MISSING, unit: str = "") -> Any:
    """Declare a configuration key; `check` returns None, or what it expects of a wrong value."""
    meta = {"check": check, "help": text, "unit": unit}
    return field(default=default, metadata=meta)


def integer(low: int, high: int, unit: str) -> Check:
    want = f"expected a whole number of {unit} from {low} to {high}"

    def check(v: Any) -> str | None:
        return None if type(v) is int and low <= v <= high else want

    return check


def power_of_two(low: int, high: int, unit: str) -> Check:
    want = f"expected a power of two from {low} to {high} ({unit})"

    def check(v: Any) -> str | None:
        return None if type(v) is int and low <= v <= high and not v & (v - 1) else want

    return check


def boolean(v: Any) -> str | None:
    return None if isinstance(v, bool) else "expected true or false"


def choice(*names: str) -> Check:
    want = "expected " + " or ".join(json.dumps(n) for n in names)

    def check(v: Any) -> str | None:
        return None if isinstance(v, str) and v in names else want

    return check


def pattern(pattern: str, want: str) -> Check:
    exact = re.compile(pattern)

    def check(v: Any) -> str | None:
        return None if isinstance(v, str) and exact.fullmatch(v) else f"expected {want}"

    return check


def or_empty(inner: Check, meaning: str) -> Check:
    def check(v: Any) -> str | None:
        if v == "" and isinstance(v, str):
            return None
        want = inner(v)
        return None if want is None else f'{want}, or "" ({meaning})'

    return check


def device(v: Any) -> str | None:
    ok = isinstance(v, str) and re.fullmatch(r"[^\s/:\0]+", v) and v not in (".", "..")
    if ok and len(v.encode()) < _IFNAMSIZ:
        return None
    return "expected the name of a network device (1 to 15 bytes)"


def path(v: Any) -> str | None:
    return None if isinstance(v, str) and v and "\0" not in v else "expected a path"


def directory(v: Any) -> str | None:
    ok = isinstance(v, str) and v.startswith("/") and "\0" not in v
    return None if ok else "expected an absolute path of a directory"


def socket_path(v: Any) -> str | None:
    ok = path(v) is None and len(v.encode()) < _SUN_PATH
    return None if ok else "expected the path of a unix socket (1 to 107 bytes)"


def mac(v: Any) -> str | None:
    ok = isinstance(v, str) and re.fullmatch(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}", v)
    if ok and not int(v[:2], 16) & 1 and v != "00:00:00:00:00:00":
        return None
    return "expected a unicast MAC address such as 52:54:00:12:34:56"


def split(v: Any) -> tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int] | None:
    """Split "ip:port" or "[v6]:port"; return None for anything else."""
    m = (
        re.fullmatch(r"(?:\[([^\[\]]+)\]|([^:\[\]]+)):([0-9]{1,5})", v)
        if isinstance(v, str)
        else None
    )
    if m is None:
        return None
    try:
        ip = ipaddress.IPv6Address(m[1]) if m[1] else ipaddress.IPv4Address(m[2])
    except ValueError:
        return None
    port = int(m[3])
    return (ip, port) if 1 <= port <= 65535 else None


def loopback(*where: tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int] | None) -> bool:
    """Return whether all ends are loopback.

    An end that could not be parsed counts as loopback, because it has an error of its own.
    """
    return all(w is None or w[0].is_loopback for w in where)


def address(v: Any) -> str | None:
    return None if split(v) else 'expected "ip:port" or "[ipv6]:port", port from 1 to 65535'


def ip(v: Any) -> str | None:
    try:
        ok = isinstance(v, str) and bool(ipaddress.ip_address(v))
    except ValueError:
        ok = False
    return None if ok else "expected an IPv4 or IPv6 address"


Where = tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int]


def path_ends(v: Any) -> tuple[Where, Where] | None:
    """Split "local:port->remote:port", both of one family; return None for anything else."""
    if not isinstance(v, str):
        return None
    local, arrow, remote = (part.strip() for part in v.partition("->"))
    a, b = split(local), split(remote)
    return (a, b) if arrow and a and b and a[0].version == b[0].version else None


def heartbeat_links(v: Any) -> str | None:
    want = 'expected a list of at most 4 links "local:port->remote:port", both IPv4 or both IPv6'
    if not isinstance(v, list | tuple) or len(v) > 4:
        return want
    for s in v:
        if path_ends(s) is None:
            return f"{want}; {json.dumps(s, default=str):.60} is none"
    return None


def identity(v: Any) -> str | None:
    ok = isinstance(v, str) and re.fullmatch(r"[!-~]{1,255}", v)
    return None if ok else "expected a name in a certificate (1 to 255 printable characters)"


def argv(v: Any) -> str | None:
    ok = isinstance(v, list | tuple) and all(isinstance(s, str) and "\0" not in s for s in v)
    if ok and (not v or v[0]):
        return None
    return "expected a list of strings: a program and its arguments"


def urls(v: Any) -> str | None:
    where = r"https?://(\[[0-9a-fA-F:]+\]|[A-Za-z0-9.-]+)(:[0-9]{1,5})?/?"
    ok = isinstance(v, list | tuple) and all(
        isinstance(s, str) and re.fullmatch(where, s) for s in v
    )
    return None if ok else "expected a list of addresses such as http://192.0.2.3:2379"


def ip_addresses(v: Any) -> str | None:
    want = "expected a list of IPv4 and IPv6 addresses"
    if not isinstance(v, list | tuple) or not all(isinstance(s, str) for s in v):
        return want
    try:
        for s in v:
            ipaddress.ip_address(s)
    except ValueError as e:
        return f"{want}: {e}"
    return None


def keys(cls: type[Any]) -> dict[str, Field[Any]]:
    """Return the keys that a section's class declares."""
    return {f.name: f for f in fields(cls) if "check" in f.metadata}
