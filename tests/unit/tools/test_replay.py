# SPDX-License-Identifier: GPL-2.0-or-later
"""Two captures through the engine: numbers translated, time virtual, the report true."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from colo_xdp.cli import DIFFER, FAILED, USAGE, app
from colo_xdp.tools import replay as module
from colo_xdp.tools.corpus import craft
from colo_xdp.tools.pcap import PcapError, Writer, read
from colo_xdp.tools.replay import MS, Capture, Replay, ReplayError, ReplayOptions, guest_mac, text

MAC = craft.GUEST
run = CliRunner().invoke


def replay(pvm: Capture, svm: Capture, o: ReplayOptions | None = None, mac: bytes = MAC) -> Replay:
    return module.replay(pvm, svm, o, mac)


def frames(*lines: str, start: float = 0.0, step: float = 1.0) -> list[tuple[int, bytes]]:
    """One a millisecond; "c ..." is of the client."""
    out = []
    for i, line in enumerate(lines):
        s = craft.spec(line.removeprefix("c "))
        if line.startswith("c "):
            s |= {"src": "10.0.0.2", "dst": "10.0.0.1", "sport": 40000, "dport": 80}
        out.append((10**18 + int((start + i * step) * MS), craft.build(s)))
    return out


def session(isn: int, *more: str, flip: str = "") -> list[tuple[int, bytes]]:
    """A handshake and two segments, in the numbers of a guest with this ISN."""
    return frames(
        "c tcp seq=4999 ack=0 S",
        f"tcp seq={isn} ack=5000 SA opt=020405b4",
        f"c tcp seq=5000 ack={isn + 1} A",
        f"tcp 0:100 isn={isn}",
        f"tcp 100:300 isn={isn}{flip}",
        *more,
    )


def test_equal_guests_with_unlike_isns_need_no_checkpoint() -> None:
    r = replay(session(1000), session(4294967200)).report()
    assert r["checkpoints"] == 0 and r["released"] == r["pvm_frames"] == 3
    assert r["connections"] == 1 and r["held_at_the_end"] == r["not_judged"] == 0


def test_a_difference_is_found_and_what_follows_is_not_judged() -> None:
    more = ("tcp 300:400 isn=1000", "udp 'x'")
    r = replay(
        session(1000, *more), session(7000, "tcp 300:400 isn=7000", "udp 'x'", flip=" flip=7")
    )
    doc = r.report()
    assert doc["by_cause"] == {"payload_differs": 1}
    d = doc["differences"][0]
    assert d["offset"] == 107 and d["port"] == 80 and d["at_index"] == 7
    assert bytes.fromhex(d["pvm"])[7] ^ bytes.fromhex(d["svm"])[7] == 0x55
    assert doc["not_judged"] == 2 and doc["released"] == 4  # the UDP datagram is still compared
    assert "payload_differs" in text(doc) and "not judged   2" in text(doc)


def test_a_silent_svm_times_out_and_the_rest_of_the_connection_is_still_judged() -> None:
    a = session(1000) + frames("tcp 300:400 isn=1000", start=5000)
    b = session(7000)[:-1] + frames("tcp 100:300 isn=7000", "tcp 300:400 isn=7000", start=5000)
    doc = replay(a, b).report()
    assert doc["by_cause"] == {"compare_timeout": 1}
    assert doc["released"] == 4 and doc["not_judged"] == 0
    assert 3000 <= doc["wait_ms"]["max"] <= 3100


def test_what_the_svm_said_ahead_outlives_a_checkpoint_of_another_flow() -> None:
    ahead = frames("tcp 0:500 dport=50000", start=0) + frames("udp 'a'", start=1)
    behind = (
        frames("tcp 0:100 dport=50000", start=0)
        + frames("udp 'b'", start=2)
        + frames("tcp 100:500 dport=50000", start=200)
    )
    doc = replay(behind, ahead).report()
    assert doc["by_cause"] == {"datagram_differs": 1} and doc["held_at_the_end"] == 0


def test_connections_seen_from_their_middle() -> None:
    same = replay(frames("tcp 0:100"), frames("tcp 0:100")).report()
    assert not same["aligned_by_first_frame"] and not same["checkpoints"]
    far = replay(frames("tcp 0:100"), frames("tcp 0:100 isn=900000000")).report()
    assert len(far["aligned_by_first_frame"]) == 1 and not far["checkpoints"]


def test_a_port_used_again_has_other_numbers() -> None:
    def twice(a: int, b: int) -> list[tuple[int, bytes]]:
        again = [f"tcp seq={b} ack=9000 SA opt=020405b4", f"tcp 0:100 isn={b}"]
        return session(a, f"tcp seq={a + 301} ack=5000 RA", *again)

    assert replay(twice(1000, 500_000), twice(77, 4_000_000_000)).report()["checkpoints"] == 0


def test_clocks_that_differ() -> None:
    late = [(ts + 60_000 * MS, f) for ts, f in session(7000)]
    assert replay(session(1000), late).report()["by_cause"]["compare_timeout"] >= 1
    fixed = replay(session(1000), late, ReplayOptions(offset_ns=-60_000 * MS)).report()
    assert fixed["checkpoints"] == 0


def test_the_guest_is_found_or_asked_for() -> None:
    client = frames("c tcp 0:10")
    with pytest.raises(ReplayError, match=r"--guest-mac.*52:54:00:00:00:01"):
        guest_mac(session(1), session(1))
    with pytest.raises(ReplayError, match="no source address is in both"):
        guest_mac(client, frames("tcp 0:10"))
    other = [(ts, f[:6] + craft.GUEST[:5] + b"\x09" + f[12:]) for ts, f in client]
    assert guest_mac(session(1) + other, session(1) + other) == MAC
    with pytest.raises(ReplayError, match="sent nothing in the PVM"):
        replay(client, client, mac=MAC)


def write(path: Path, capture: list[tuple[int, bytes]]) -> Path:
    with Writer(path) as w:
        for ts, f in capture:
            w.put("x", ts, f)
    return path


def test_the_command(tmp_path: Path) -> None:
    p, s = write(tmp_path / "p", session(1000)), write(tmp_path / "s", session(7000))
    bad = write(tmp_path / "bad", session(7000, flip=" flip=7"))
    ask = ["--guest-mac", MAC.hex(":")]
    r = run(app, ["replay", str(p), str(s), *ask])
    assert r.exit_code == 0 and "checkpoints  0" in r.output
    out = tmp_path / "out.pcapng"
    r = run(app, ["replay", str(p), str(bad), *ask, "-w", str(out)])
    assert r.exit_code == DIFFER and "payload_differs" in r.output and "^^" in r.output
    pair = [f.data for f in read(out)]
    assert len(pair) == 2 and pair[0] == session(1000)[4][1]
    assert b"payload_differs: tcp 10.0.0.1:80" in out.read_bytes()  # the comment
    r = run(app, ["replay", str(p), str(bad), *ask, "--json"])
    assert json.loads(r.output)["checkpoints"] == 1
    r = run(app, ["replay", str(p), str(s)])
    assert r.exit_code == FAILED and "--guest-mac" in r.output
    assert run(app, ["replay", str(p)]).exit_code == USAGE
    assert run(app, ["replay", str(p), str(s), "--guest-mac", "zz"]).exit_code == USAGE
    r = run(app, ["replay", str(p), str(tmp_path / "none"), *ask])
    assert r.exit_code == FAILED and "none" in r.output


def test_the_corpus_by_command() -> None:
    r = run(app, ["replay", "--corpus"])
    assert r.exit_code == 0 and "tcp-one-byte-differs" in r.output and "FAIL" not in r.output


def test_captures_round_trip_to_the_nanosecond(tmp_path: Path) -> None:
    shots = [(1_700_000_000_123_456_789, b"a" * 60), (1_700_000_001_000_000_001, b"b" * 1514)]
    back = list(read(write(tmp_path / "x.pcapng", shots)))
    assert [f.data for f in back] == [f for _, f in shots]
    assert all(abs(f.ts_ns - ts) < 2000 for f, (ts, _) in zip(back, shots, strict=True))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "not a capture"),
        (b"not a capture at all, but long enough to look at", "not a capture"),
        (bytes.fromhex("d4c3b2a1020004000000000000000000ffff000071000000"), ""),
    ],
)
def test_bad_captures_are_named(tmp_path: Path, content: bytes, what: str) -> None:
    path = tmp_path / "bad.pcap"
    path.write_bytes(content)
    if what:
        with pytest.raises(PcapError, match=f"bad.pcap.*{what}"):
            list(read(path))
    else:
        assert list(read(path)) == []


def test_a_cut_or_foreign_frame_is_refused(tmp_path: Path) -> None:
    head = bytes.fromhex("d4c3b2a1020004000000000000000000ffff0000")
    one = (0).to_bytes(8, "little") + (4).to_bytes(4, "little")
    path = tmp_path / "x.pcap"
    path.write_bytes(head + (1).to_bytes(4, "little") + one + (9).to_bytes(4, "little") + b"abcd")
    with pytest.raises(PcapError, match="cut to 4 of 9"):
        list(read(path))
    path.write_bytes(head + (113).to_bytes(4, "little") + one + (4).to_bytes(4, "little") + b"abcd")
    with pytest.raises(PcapError, match="link type 113"):
        list(read(path))


def test_a_file_that_is_not_finished_does_not_appear(tmp_path: Path) -> None:
    path = tmp_path / "x.pcapng"
    with pytest.raises(KeyError), Writer(path) as w:
        w.put("pvm", 1, b"x" * 60)
        raise KeyError
    assert list(tmp_path.iterdir()) == []
