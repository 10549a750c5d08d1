# SPDX-License-Identifier: GPL-2.0-or-later
"""Build Ethernet frames from one line of text, valid or deliberately invalid (network byte order).

    tcp 0:100 PA vlan=5        bytes 0 to 100 of a fixed stream, at sequence number isn + 1
    udp 'hello' dport=53       a literal payload
    raw hex=0011               these bytes

The first word is the protocol, upper-case letters are TCP flags, `v6` selects IPv6, and the rest
are `name=value`: see DEFAULTS and build(). The corpus and the tests build their frames with it.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Callable, Mapping
from typing import Any

#: content of every stream in the corpus; the same range is the same bytes in both guests
STREAM = b"".join(hashlib.sha256(b"%d" % i).digest() for i in range(3000))
GUEST, CLIENT = bytes.fromhex("525400000001"), bytes.fromhex("525400000002")
FLAGS = {"F": 1, "S": 2, "R": 4, "P": 8, "A": 16, "U": 32, "E": 64, "C": 128}
DEFAULTS: Mapping[str, Any] = {
    "isn": 1000, "ack": 5000, "win": 64000, "sport": 80, "dport": 40000, "id": 1, "ttl": 64,
    "tos": 0, "urg": 0, "ae": 0, "type": 0, "code": 0, "eid": 7, "eseq": 1, "num": 47, "badsum": 0,
    "iplen": 0, "src": "10.0.0.1", "dst": "10.0.0.2", "opt": "", "ipopt": "", "hex": "",
    "padbyte": 0, "label": 0,
}  # fmt: skip
_TEXT = {"src", "dst", "opt", "ipopt", "hex", "frag", "flip", "ext", "quote"}
_OTHER = {"seq", "doff", "ihl", "pad", "cut", "vlan", "qinq", "repeat", "len"}
_PROTOCOLS = {"tcp", "udp", "icmp", "icmp6", "arp", "proto", "raw", "ether"}


class SpecError(ValueError):
    """A line that describes no frame; the text names the wrong word."""


def spec(line: str) -> dict[str, Any]:
    """Parse the words of a line. Raises SpecError."""
    words = re.findall(r"'[^']*'|\S+", line)
    if not words or words[0] not in _PROTOCOLS:
        raise SpecError(f"{line!r}: does not begin with one of {', '.join(sorted(_PROTOCOLS))}")
    s: dict[str, Any] = {"kind": words[0]}
    for w in words[1:]:
        name, _, value = w.partition("=")
        if w[0] == "'":
            s["body"] = w[1:-1].encode()
        elif re.fullmatch(r"\d+:\d+", w):
            a, b = map(int, w.split(":"))
            s["at"], s["body"] = a, STREAM[a:b]
        elif w == "v6":
            s["v6"] = True
        elif re.fullmatch(r"[FSRPAUEC]+", w):
            s["flags"] = sum(FLAGS[c] for c in w)
        elif value and name in _TEXT:
            s[name] = value
        elif value and (name in DEFAULTS or name in _OTHER):
            try:
                s[name] = int(value, 0)
            except ValueError:
                raise SpecError(f"{line!r}: {w}: not a number") from None
        else:
            raise SpecError(f"{line!r}: {w!r} is unknown")
    return s


def checksum(data: bytes) -> int:
    """Return the Internet checksum (RFC 1071)."""
    data += b"\0" * (len(data) & 1)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return 0xFFFF & ~total


def _body(s: dict[str, Any]) -> bytes:
    body = bytearray(s.get("body", b"") or bytes.fromhex(s.get("hex", "")))
    if "len" in s:
        body = bytearray(b"A" * s["len"])
    for i in str(s.get("flip", "")).split(","):
        if i:
            body[int(i)] ^= 0x55
    return bytes(body)


def _tcp(g: Callable[[str], Any], s: dict[str, Any], pseudo: Callable[[int, int], bytes]) -> bytes:
    body = _body(s)
    opt = bytes.fromhex(g("opt"))
    opt += b"\1" * (-len(opt) % 4)
    seq = s.get("seq", g("isn") + 1 + s.get("at", 0)) & 0xFFFFFFFF
    head = struct.pack(
        "!HHIIBBHHH", g("sport"), g("dport"), seq, g("ack") & 0xFFFFFFFF,
        (s.get("doff", 5 + len(opt) // 4) & 15) << 4 | g("ae"),
        s.get("flags", 0x18 if body else 0x10),
        g("win"), 0, g("urg"),
    )  # fmt: skip
    seg = head + opt + body
    total = checksum(pseudo(6, len(seg)) + seg) ^ g("badsum")
    return seg[:16] + struct.pack("!H", total) + seg[18:]


def _l4(s: dict[str, Any], pseudo: Callable[[int, int], bytes]) -> tuple[int, bytes]:
    def g(name: str) -> Any:
        return s.get(name, DEFAULTS[name])

    kind, body = s["kind"], _body(s)
    if kind == "tcp":
        return 6, _tcp(g, s, pseudo)
    if kind == "udp":
        seg = struct.pack("!HHHH", g("sport"), g("dport"), 8 + len(body), 0) + body
        total = checksum(pseudo(17, len(seg)) + seg) ^ g("badsum")
        return 17, seg[:6] + struct.pack("!H", total or 0xFFFF) + seg[8:]
    if kind in ("icmp", "icmp6"):
        if "quote" in s:  # an error: it quotes the packet that the line after `quote=` describes
            body = build(spec(s["quote"].replace("_", " ")))[14:][:64]
        seg = struct.pack("!BBHHH", g("type"), g("code"), 0, g("eid"), g("eseq")) + body
        number = 58 if kind == "icmp6" else 1
        total = checksum((pseudo(58, len(seg)) if number == 58 else b"") + seg)
        return number, seg[:2] + struct.pack("!H", total) + seg[4:]
    return g("num"), body


def _ipv4(s: dict[str, Any]) -> bytes:
    def g(name: str) -> Any:
        return s.get(name, DEFAULTS[name])

    ends = bytes(map(int, g("src").split("."))) + bytes(map(int, g("dst").split(".")))
    number, seg = _l4(s, lambda proto, n: ends + struct.pack("!BBH", 0, proto, n))
    place = 0x4000
    if "frag" in s:  # offset:length:more
        off, n, more = map(int, s["frag"].split(":"))
        seg, place = seg[off : off + n], off // 8 | more << 13
    opt = bytes.fromhex(g("ipopt"))
    head = struct.pack(
        "!BBHHHBBH", 0x40 | s.get("ihl", 5 + len(opt) // 4), g("tos"),
        (20 + len(opt) + len(seg) + g("iplen")) & 0xFFFF, g("id"), place, g("ttl"), number, 0,
    )  # fmt: skip
    head += ends + opt
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + seg


def _ipv6(s: dict[str, Any]) -> bytes:
    ends = bytes.fromhex("fd00" + "00" * 13 + "01" + "fd00" + "00" * 13 + "02")
    if s.get("src") == "10.0.0.2":
        ends = ends[16:] + ends[:16]
    number, seg = _l4(s, lambda proto, n: ends + struct.pack("!IHBB", n, 0, 0, proto))
    if "frag" in s:
        off, n, more = map(int, s["frag"].split(":"))
        ident = s.get("id", DEFAULTS["id"])
        seg = struct.pack("!BBHI", number, 0, off | more, ident) + seg[off : off + n]
        number = 44
    for ext in reversed(s.get("ext", "").split(",")):
        if ext:  # 8 bytes of padding each: 0 hop-by-hop, 43 routing, 60 destination options
            pad = b"\0" * 6 if ext == "43" else b"\1\4\0\0\0\0"
            seg, number = bytes([number, 0]) + pad + seg, int(ext)
    ttl = s.get("ttl", DEFAULTS["ttl"])
    return struct.pack("!IHBB", 6 << 28, len(seg), number, ttl) + ends + seg


def build(s: dict[str, Any]) -> bytes:
    """Build the frame of a spec()."""
    kind = s["kind"]
    macs = GUEST + CLIENT if s.get("src") == "10.0.0.2" else CLIENT + GUEST
    if kind == "raw":
        return _body(s)
    if kind == "arp":
        ends = GUEST + bytes([10, 0, 0, 1]), CLIENT + bytes([10, 0, 0, s.get("id", 2)])
        proto = 0x0806
        packet = struct.pack("!HHBBH", 1, 0x0800, 6, 4, s.get("type", 2)) + ends[0] + ends[1]
    elif kind == "ether":
        proto, packet = s.get("type", 0x88CC), _body(s)
    elif s.get("v6"):
        proto, packet = 0x86DD, _ipv6(s)
    else:
        proto, packet = 0x0800, _ipv4(s)
    tags = b"".join(
        struct.pack("!HH", kind, s[name])
        for name, kind in (("qinq", 0x88A8), ("vlan", 0x8100))
        if name in s
    )
    frame = macs + tags + struct.pack("!H", proto) + packet
    frame = frame.ljust(s.get("pad", 0), bytes([s.get("padbyte", 0)]))
    return frame[: s["cut"]] if "cut" in s else frame
