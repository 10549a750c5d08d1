# SPDX-License-Identifier: GPL-2.0-or-later
"""Rules: which flow they fit, what is done with it, and changing them while running."""

from __future__ import annotations

import pytest

from colo_xdp.abi import UNMIRRORED_KEY
from colo_xdp.compare.limits import Limits
from colo_xdp.compare.policy import Policy, Rule, subject
from colo_xdp.config.file import ConfigError, as_toml, load, parse
from colo_xdp.net.flow_key import unmirrored_key
from colo_xdp.net.frame import Frame
from colo_xdp.net.packet import parse as packet
from tests.unit import frames as f
from tests.unit.compare.test_datagram import A, B, Pair
from tests.unit.controller.fakes import EXAMPLES

SYN_ACK = f.tcp(100, 1, b"", f.SYN | f.ACK, opts=f.SYN_OPTS)
SYN = f.tcp(100, 0, b"", f.SYN, opts=f.SYN_OPTS, sport=40000, dport=25)
DATA = f.tcp(101, 1, b"abc")
OTHER = f.tcp(101, 1, b"aXc")
ARP = f.ether(0x0806, bytes(28))


def rule(action: str = "pass", **what: str) -> Rule:
    return Rule(name="r", action=action, **what)


@pytest.mark.parametrize(
    ("what", "frame", "fits"),
    [
        ({}, DATA, True),
        ({"protocol": "tcp"}, DATA, True),
        ({"protocol": "udp"}, DATA, False),
        ({"protocol": "arp"}, ARP, True),
        ({"protocol": "other"}, ARP, False),
        ({"protocol": "other"}, f.ip4(47, b"gre"), True),
        ({"address": "10.9.0.0/24"}, DATA, True),
        ({"address": "10.9.0.2"}, DATA, False),  # the guest's own: the other end is meant
        ({"address": "::/0"}, DATA, False),
        ({"address": "::/0"}, f.tcp(1, 1, b"x", v6=True), True),
        ({"address": "10.0.0.0/8"}, ARP, False),
        ({"port": "80"}, DATA, True),
        ({"port": "81-90"}, DATA, False),
        ({"port": "1-65535"}, ARP, False),
        ({"peer_port": "4000"}, DATA, True),
        ({"peer_port": "80"}, DATA, False),
        ({"direction": "in"}, SYN_ACK, True),
        ({"direction": "out"}, SYN_ACK, False),
        ({"direction": "out"}, SYN, True),
        ({"direction": "in"}, DATA, True),  # no SYN: 80 is below 4000
        ({"direction": "out"}, f.udp(b"", sport=4000, dport=53), True),
        ({"direction": "in"}, ARP, False),
        ({"port": "80"}, f.tcp(1, 1, b"x", tags=b"\x81\0\0\5"), True),
    ],
)
def test_what_a_rule_fits(what: dict[str, str], frame: bytes, fits: bool) -> None:
    assert rule(**what).fits(subject(packet(frame))) is fits


def test_the_first_rule_that_fits_decides_and_defaults_come_last() -> None:
    first, second = Rule(name="a", action="pass", port="53"), Rule(name="b", action="compare")
    policy = Policy((first, second))
    assert policy.judge(subject(packet(A))).rule == "a"
    assert policy.judge(subject(packet(ARP))).rule == "b"
    plain = Policy()
    assert [plain.judge(subject(packet(x))).rule for x in (ARP, A, f.ip4(47, b""))] == [
        "default-arp", "default", "default-other",
    ]  # fmt: skip
    assert plain.judge(subject(packet(ARP))).action == "pass"


@pytest.mark.parametrize("action", ["pass", "drop-secondary"])
@pytest.mark.parametrize(("mine", "theirs"), [(A, B), (DATA, OTHER)])
def test_passed_flows_leave_at_once(action: str, mine: bytes, theirs: bytes) -> None:
    pair = Pair(policy=Policy((rule(action),)))
    pair.p(mine).is_now([mine]).s(theirs).wait(9000).is_now([mine])
    pair.e.begin_checkpoint()
    pair.p(mine).is_now([mine, mine])  # also while one is under way
    pair.e.commit_checkpoint(0, 1, pair.now)
    pair.is_now([mine, mine])
    assert pair.e.counters["uncompared"] == 2
    assert pair.e.counters["svm_uncompared_dropped"] == 1
    assert (pair.e.rules["r"].flows, pair.e.rules["r"].uncompared) == (1, 2)


@pytest.mark.parametrize(("mine", "theirs"), [(A, B), (DATA, OTHER)])
def test_watched_flows_leave_at_once_and_are_compared_behind(mine: bytes, theirs: bytes) -> None:
    pair = Pair(policy=Policy((rule("mirror-only"),)))
    pair.p(mine).is_now([mine]).s(mine).wait(9000).is_now([mine])
    assert not pair.found
    again = f.tcp(104, 1, b"def") if mine is DATA else mine
    other = f.tcp(104, 1, b"dXf") if mine is DATA else theirs
    pair.p(again).s(other).wait(9000).is_now([mine, again])  # nobody asks for a checkpoint
    assert len(pair.found) == 1 and not pair.found[0].asked and pair.found[0].rule == "r"
    assert pair.e.counters["differences_monitored"] == 1
    pair.p(again).s(other).wait(9000).is_now([mine, again, again])
    assert len(pair.found) == 1  # the guests have gone apart: no more is learnt
    assert (pair.e.held_packets, pair.e.held_bytes, pair.e.svm_packets) == (0, 0, 0)
    pair.checkpoint().p(again).s(other).wait(9000)
    assert pair.out == [mine, again, again, again]


def test_a_watched_flow_goes_by_the_name_of_the_rule_in_force() -> None:
    pair = Pair(policy=Policy((rule("mirror-only"),)))
    pair.p(DATA).s(DATA)
    pair.e.set_policy(Policy((Rule(name="new", action="mirror-only"),)))
    pair.checkpoint().p(f.tcp(104, 1, b"def")).s(f.tcp(104, 1, b"dXf"))
    assert pair.found[-1].rule == "new"
    assert (pair.e.rules["r"].differences, pair.e.rules["new"].differences) == (0, 1)


def log_line(i: int) -> bytes:
    return f.udp(b"line %d" % i)


def test_watched_flows_have_a_budget_of_their_own() -> None:
    """What is kept to compare them with holds nobody up: a compared frame is neither dropped nor
    delayed for it, and no checkpoint asked for."""
    limits = Limits(max_queue_size=8, compare_timeout_ns=9_000_000_000)
    pair = Pair(limits, policy=Policy((rule("mirror-only", protocol="udp"),)))
    lines = [log_line(i) for i in range(9)]
    pair.p(*lines[:8]).is_now(lines[:8])
    assert (pair.e.held_packets, pair.e.held_bytes) == (0, 0)
    pair.p(DATA).s(DATA).is_now([*lines[:8], DATA])
    assert not pair.e.counters["monitor_given_up"]
    pair.p(lines[8]).wait(100).is_now([*lines[:8], DATA, lines[8]])
    assert pair.e.counters["monitor_given_up"] == 1 and not pair.found
    assert not pair.e.counters["queue_full_dropped"]
    pair.checkpoint().p(lines[0]).s(f.udp(b"other")).wait(100)  # compared again
    assert len(pair.found) == 1 and not pair.found[0].asked
    for i in range(20):  # and so of what the SVM alone says
        pair.s(log_line(i))
    pair.checkpoint().s(*(log_line(i) for i in range(20))).wait(100)
    assert pair.e.counters["monitor_given_up"] == 2 and len(pair.found) == 1
    pair.s(f.tcp(104, 1, b"def")).p(f.tcp(104, 1, b"def"))
    assert pair.out[-1] == f.tcp(104, 1, b"def")
    assert not pair.e.counters["svm_queue_full_dropped"]


def test_a_checkpoint_holds_no_watched_flow_up() -> None:
    limits = Limits(max_queue_size=4, compare_timeout_ns=9_000_000_000)
    pair = Pair(limits, policy=Policy((rule("mirror-only", protocol="udp"),)))
    lines = [log_line(i) for i in range(8)]
    pair.p(lines[0]).e.begin_checkpoint()
    pair.p(lines[1]).is_now(lines[:2])
    stop = pair.now
    pair.wait(1).p(lines[2]).is_now(lines[:3])
    for line in lines[2:4]:  # of the epoch that begins
        pair.e.from_svm(Frame(line, pair.now), 1, pair.now)
    pair.e.commit_checkpoint(stop, 1, pair.now)
    pair.p(lines[3]).wait(100).is_now(lines[:4])  # equal, also what came in between
    assert not pair.found and not pair.e.counters["monitor_given_up"]
    pair.p(lines[4]).e.begin_checkpoint()
    pair.p(*lines[:4]).is_now(lines[:5] + lines[:4])  # more than can be kept
    for line in lines:  # nor do the SVM's take the place of others in the next epoch
        pair.e.from_svm(Frame(line, pair.now), 2, pair.now)
    pair.e.from_svm(Frame(DATA, pair.now), 2, pair.now)
    pair.e.commit_checkpoint(0, 2, pair.now)
    pair.p(DATA).wait(100).is_now([*lines[:5], *lines[:4], DATA])
    assert pair.e.counters["monitor_given_up"] == 1 and not pair.found
    pair.checkpoint().p(lines[0]).s(f.udp(b"other")).wait(100)
    assert len(pair.found) == 1


def test_new_rules_take_force_with_a_checkpoint() -> None:
    pair = Pair().p(DATA).is_now([])
    pair.e.set_policy(Policy((rule("pass"),)))
    pair.is_now([], "policy").p(A).is_now([], "policy")
    pair.checkpoint().is_now([DATA, A], "policy")
    pair.p(DATA, A).is_now([DATA, A, DATA, A], "policy")
    pair.e.set_policy(Policy())
    pair.is_now([DATA, A, DATA, A], "policy", "policy").checkpoint()
    pair.p(f.tcp(104, 1, b"def")).is_now([DATA, A, DATA, A], "policy", "policy")
    assert pair.e.held_packets == 1
    pair.s(f.tcp(104, 1, b"def")).wait(9000)
    assert len(pair.out) == 5 and pair.e.held_packets == 0


def test_shadow_mode_holds_nothing_and_asks_as_often() -> None:
    pair = Pair()
    pair.e.set_shadow(True, 0)
    pair.p(DATA).is_now([DATA]).s(OTHER).is_now([DATA], "payload_differs")
    pair.checkpoint().p(A).is_now([DATA, A], "payload_differs").s(A)
    pair.is_now([DATA, A], "payload_differs")
    pair.p(B)
    pair.e.set_shadow(False, 0)  # what left is not released again, what comes is held
    pair.p(f.udp(b"new")).s(B).is_now([DATA, A, B], "payload_differs")
    pair.s(f.udp(b"new"))
    assert pair.out[-1] == f.udp(b"new") and pair.e.held_packets == 0
    assert pair.e.counters["released"] == len(pair.out) == 4
    pair.p(A)
    assert pair.out[-1] != A
    pair.e.set_shadow(True, 0)  # what was held leaves
    assert pair.out[-1] == A
    pair.s(A)
    assert pair.e.held_packets == 0 and len(pair.out) == 5


def test_flows_under_drop_secondary_are_kept_from_the_svm_until_the_rule_goes() -> None:
    drop = Policy((rule("drop-secondary", port="80"), rule("drop-secondary", port="53")))
    pair = Pair(policy=drop)
    told = pair.unmirrored
    web, dns = f.tcp(101, 1, b"abc", tags=b"\x81\0\xe0\5"), f.udp(b"x")
    pair.p(web, web, dns, ARP).is_now([web, web, dns, ARP])
    keys = [unmirrored_key(packet(x).key, x is web) for x in (web, dns)]
    assert told == keys and unmirrored_key(packet(ARP).key, False) is None
    assert keys[0] == UNMIRRORED_KEY.pack(
        bytes(10) + b"\xff\xff" + web[30:34], bytes(10) + b"\xff\xff" + web[34:38],
        web[38:40], web[40:42], 5, 6,
    )  # fmt: skip
    pair.e.set_policy(Policy(drop.rules[:1]))
    pair.checkpoint().p(web, dns)
    assert told == [*keys, None, keys[0]]  # judged anew, and only one of them still falls under it
    assert pair.e.held_packets == 1


TEXT = (EXAMPLES / "primary.toml").read_text()


def test_rules_of_a_file_round_trip() -> None:
    text = (
        TEXT
        + """
[[rule]]
name = "dns"
action = "pass"
protocol = "udp"
port = "53"
[[rule]]
name = "backup"
action = "drop-secondary"
address = "10.1.0.0/16"
"""
    )
    c = parse(text)
    assert [r.name for r in c.rules] == ["dns", "backup"]
    assert parse(as_toml(c)).rules == c.rules
    assert c.policy().order[0].name == "dns"
    assert not c.differences(parse(TEXT))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('name = "x"', "[rule 1] action is missing"),
        ('name = "default-x"\naction = "pass"', "not beginning with default"),
        ('name = "x"\naction = "pass"\nport = 53', "as text"),
        ('name = "x"\naction = "pass"\nport = "0"', "expected a port or a range"),
        ('name = "x"\naction = "pass"\naddress = "10.0.0.1/8"', "has host bits set"),
        ('name = "x"\naction = "pass"\nprotocol = "icmp"\nport = "5"', "icmp has no ports"),
        ('name = "x"\naction = "pass"\nprots = "5"', "did you mean 'port"),
        ('name = "x"\naction = "pass"\n[[rule]]\nname = "x"\naction = "pass"', "of its own"),
    ],
)
def test_wrong_rules_are_named(body: str, words: str) -> None:
    with pytest.raises(ConfigError) as e:
        parse(TEXT + "[[rule]]\n" + body)
    assert words in str(e.value), str(e.value)


def test_only_the_policy_can_change_while_running(tmp_path: object) -> None:
    c = load(EXAMPLES / "primary.toml")
    assert c.path and not c.differences(load(c.path))
    other = parse(
        TEXT.replace("[compare]", "[compare]\nmax_flows = 17", 1)
        if "[compare]" in TEXT
        else TEXT + "\n[compare]\nmax_flows = 17\narp = 'compare'"
    )
    assert c.differences(other) == ["compare.max_flows"]
