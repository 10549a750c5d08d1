# SPDX-License-Identifier: GPL-2.0-or-later
"""Wrong, half and contradictory answers are named, all at once, and valid ones give valid files."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from colo_xdp.setup import ports, qemu_unit
from colo_xdp.setup.answers import ROLES, Answers
from colo_xdp.setup.files import configs, host_files
from colo_xdp.setup.flags import AnswersError, Flags, ask, missing
from colo_xdp.setup.guest import Guest, GuestDisk, GuestNic
from colo_xdp.setup.reader import answers

from .pairs import FLAGS, flags, made

GUEST = Guest(
    origin="QEMU 7", memory=512, nics=(GuestNic(mac="52:54:00:00:00:01", tap="tap-x"),),
    disks=(GuestDisk(name="virtio0", file="/d", format="raw"),),
    command=("qemu-system-x86_64",), qmp=("/run/a", "/run/b"),
)  # fmt: skip
UNKNOWN = flags(memory="", disk=())


def errors(given_flags: Flags, guest: Guest | None = None, taken: tuple[int, ...] = ()) -> str:
    with pytest.raises(AnswersError) as e:
        answers(given_flags, taken, guest)
    return str(e.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pair": "Web_1"}, "--pair Web_1: expected 1 to 10 of a-z, 0-9 and -"),
        ({"hosts": "hosta"}, "--hosts hosta: expected two values with / between"),
        ({"hosts": "hosta/hosta"}, "--hosts hosta/hosta: expected two different ones"),
        ({"addresses": "192.0.2.1"}, "--addresses 192.0.2.1: expected two values"),
        ({"addresses": "192.0.2.1/::2"}, "two of one family"),
        ({"addresses": "127.0.0.1/192.0.2.2"}, "that the other host reaches"),
        ({"addresses": "fe80::1/fe80::2"}, "that the other host reaches"),
        ({"addresses": "fd00::1%eth0/fd00::2"}, "of no single link"),
        ({"addresses": "fd00::1/FD00::1"}, "expected two different ones"),
        ({"addresses": "192.0.2.1/192.0.2.1"}, "expected two different ones"),
        ({"peer_link": "a device"}, "--peer-link a device: expected a network device"),
        ({"peer_link": "eth*"}, "--peer-link eth*: expected a network device"),
        ({"peer_link": "a/b/c"}, "expected one value, or two with / between"),
        ({"peer_link": "br0"}, "--bridge br0: it is the peer link of net0 already"),
        ({"tap": "eth1"}, "--peer-link eth1: it is the tap of net0 of the primary host already"),
        ({"mac": "01:00:5e:00:00:01"}, "--mac 01:00:5e:00:00:01: expected a unicast MAC"),
        ({"queues": "0"}, "--queues 0: expected a whole number from 1 to 256"),
        ({"memory": "lots"}, "--memory lots: expected MiB, or such as 4G"),
        ({"cpus": "two"}, "--cpus two: expected a whole number"),
        ({"accel": "xen"}, '--accel xen: expected "kvm" or "tcg"'),
        ({"machine": "pc accel"}, "--machine pc accel: expected a word"),
        ({"qemu": "/bin/sh -c"}, "--qemu /bin/sh -c: expected a program"),
        ({"qemu_arg": ("a\nb",)}, "--qemu-arg 'a\\nb': expected an argument without control"),
        ({"qemu_user": "Root!"}, "--qemu-user Root!: expected the name of a user"),
        ({"disk": ("file=web1.img",)}, "--disk file=web1.img: file: expected an absolute path"),
        ({"disk": ("file=/a,size=3",)}, "'size=3': expected KEY=VALUE of file, format"),
        ({"disk": ("file=/a,file=/b",)}, "file is there twice"),
        ({"disk": ("file=/a", "file=/a")}, "expected a file of its own for each"),
        ({"disk": ("file=/a,name=d", "file=/b,name=d")}, "expected a name of its own for each"),
        ({"disk": ("format=raw",)}, "file: expected an absolute path"),
        ({"disk": (), "overlays": "/x"}, "--overlays /x: expected only with a disk"),
        ({"overlays": "x"}, "--overlays x: expected an absolute path"),
        ({"arbiter": "lease"}, "--etcd is missing: required with --arbiter lease"),
        ({"arbiter": "lease"}, "--fence-primary /sbin/off a: not with --arbiter lease"),
        ({"arbiter": "manual"}, "--fence-secondary /sbin/off b: not with --arbiter manual"),
        ({"arbiter": "quorum"}, '--arbiter quorum: expected "fence" or "lease" or "manual"'),
        ({"fence_primary": ""}, "--fence-primary is missing: required with --arbiter fence"),
        ({"fence_primary": "off a"}, "expected the program by its absolute path"),
        ({"fence_primary": "/off 'a"}, "expected a command: No closing quotation"),
        ({"etcd": ("http://192.0.2.3:2379",)}, "--etcd http://192.0.2.3:2379: not with"),
        ({"etcd_cert": "/a"}, "--etcd-cert, --etcd-key: expected both or none"),
        ({"heartbeat": ("192.0.2.1/192.0.2.2",)}, "expected other addresses than --addresses"),
        ({"heartbeat": ("10.0.0.1/10.0.0.2",) * 5}, "--heartbeat: 5: expected 4 at most"),
        ({"migration_network": "eth2"}, "such as 20-eth2.network"),
        ({"base_port": "80"}, "--base-port 80: expected a whole number from 1024 to 65526"),
        ({"nic": ("peer-link=eth1",)}, "--peer-link: not with --nic, which has it as peer-link="),
        ({"vxlan": "10.99.0.1"}, "--vxlan 10.99.0.1: expected two values"),
    ],
)  # fmt: skip
def test_a_wrong_answer_is_named_by_its_flag(changes: dict[str, Any], said: str) -> None:
    assert said in errors(flags(**changes))


def test_all_mistakes_are_told_at_once() -> None:
    text = errors(Flags(hosts="x", accel="xen", cpus="0"))
    for part in ("--pair is missing", "--addresses is missing", "--peer-link is missing",
                 "--memory is missing", "--hosts x", "--accel xen", "--cpus 0"):  # fmt: skip
        assert part in text


@pytest.mark.parametrize(
    ("nics", "said"),
    [
        (("peer-link=eth1,bridge=br0", "peer-link=eth1,bridge=br1"), "eth1: it is the peer link"),
        (("bridge=br0",), "peer-link= or vxlan= is missing"),
        (("name=a,peer-link=e1", "name=a,peer-link=e2"), "expected a name of its own"),
        (("peer-link=e1", "peer-link=e2,bridge=e1"), "--bridge e1: it is the peer link of net0"),
        (("peer-link=e1,name=LAN",), "--nic LAN: expected a name"),
        (tuple(f"peer-link=e{i}" for i in range(9)), "9 network cards: expected 8 at most"),
    ],
)
def test_cards_that_contradict_each_other(nics: tuple[str, ...], said: str) -> None:
    assert said in errors(flags(nic=nics, peer_link="", bridge=""))


def test_what_a_running_guest_says_is_not_taken_from_flags() -> None:
    for name, value in (("memory", "1G"), ("disk", ("file=/x",)), ("mac", "52:54:00:00:00:09"),
                        ("tap", "tap-y"), ("queues", "2"), ("cpu", "max")):  # fmt: skip
        text = errors(flags(**{"memory": "", "disk": (), name: value}), GUEST)
        assert f"--{name}: not with a guest that exists" in text
    a = answers(UNKNOWN, guest=GUEST)
    assert a.nics[0].mac == "52:54:00:00:00:01" and a.nics[0].tap.primary == "tap-x"
    assert a.memory == 512 and a.disks[0].name == "virtio0"
    assert configs(a)["primary"].qemu.qmp_oob == "/run/b"


def test_each_card_of_a_running_guest_needs_its_link() -> None:
    two = Guest(origin="x", memory=1, nics=(*GUEST.nics, GuestNic(mac="52:54:00:00:00:02")))
    assert "1 described, and the guest has 2 network cards" in errors(UNKNOWN, two)


def test_what_is_missing_is_asked_for() -> None:
    said = {
        "--pair": "web1", "--hosts": "a/b", "--addresses": "192.0.2.1/192.0.2.2",
        "--peer-link": "eth1", "--memory": "1G", "--bridge": "br7", "--disk": "/d.qcow2",
    }  # fmt: skip
    asked: list[str] = []

    def question(text: str, default: str) -> str:
        asked.append(text.split(":")[0])
        return said[asked[-1]]

    a = answers(ask(Flags(), question))
    assert asked == list(said) and a.nics[0].bridge.primary == "br7"
    assert a.disks[0].format == "qcow2" and not missing(ask(Flags(), question))


def test_ports_are_those_that_no_other_pair_has() -> None:
    assert made().ports.base == ports.FIRST
    taken = {9846, 9860}
    assert answers(FLAGS, taken).ports.base == 9866
    assert answers(flags(base_port="20000"), taken).ports.base == 20000
    text = errors(flags(base_port="9855"), taken=(9860,))
    assert "--base-port 9855: 9855 to 9864: another pair here uses 9860" in text
    every = range(ports.FIRST, 65536, 10)
    assert "--base-port is missing: no 10 free ports" in errors(FLAGS, taken=tuple(every))


# ---- any valid answers


def _both(one: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.tuples(one, one).filter(lambda t: t[0] != t[1]).map("/".join)


_name = st.from_regex(r"[a-z0-9-]{1,10}", fullmatch=True)
_device = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,14}", fullmatch=True)
_host = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
_v4 = st.integers(1, 250).map(lambda n: f"192.0.2.{n}")
_v6 = st.integers(1, 250).map(lambda n: f"fd00::{n:x}")
_further = st.integers(1, 250).map(lambda n: f"198.51.100.{n}")
_path = st.text(
    st.characters(blacklist_categories=("Cc", "Cs"), blacklist_characters=",/="), min_size=1,
    max_size=20,
).map(lambda t: f"/srv/{t}")  # fmt: skip
_nic = st.tuples(_device, _device, st.none() | _device, st.integers(1, 64), st.booleans()).map(
    lambda t: (
        f"tap={t[0]},queues={t[3]},"
        + ("vxlan=10.99.0.1/10.99.0.2" if t[4] else f"peer-link={t[1]}")
        + (f",bridge={t[2]}" if t[2] else "")
    )
)
_disk = st.tuples(_path, st.sampled_from(("raw", "qcow2")), st.booleans()).map(
    lambda t: f"file={t[0]},format={t[1]}" + (",external" if t[2] else "")
)
_fence = _path.map(lambda p: f"/sbin/off '{p}'" if "'" not in p and "\\" not in p else "/sbin/off")


@st.composite
def valid(draw: st.DrawFn) -> Flags:
    arbiter = draw(st.sampled_from(("fence", "lease", "manual")))
    fences = {k: draw(_fence) for k in ("fence_primary", "fence_secondary")}
    return Flags(
        pair=draw(_name), hosts=draw(_both(_host)), addresses=draw(_both(_v4) | _both(_v6)),
        nic=tuple(draw(st.lists(_nic, min_size=1, max_size=4))), memory=draw(
            st.integers(16, 1 << 20).map(str) | st.integers(1, 64).map(lambda n: f"{n}G")),
        disk=tuple(draw(st.lists(_disk, max_size=3))), arbiter=arbiter,
        **(fences if arbiter == "fence" else {}),
        etcd=("https://192.0.2.3:2379",) if arbiter == "lease" else (),
        heartbeat=tuple(draw(st.lists(_both(_further), max_size=4))),
        migration=draw(st.just("") | _both(_further)),
        migration_network=draw(st.just("") | _host.map(lambda n: f"20-{n}.network")),
        qemu_user=draw(st.sampled_from(("", "libvirt-qemu"))),
        qemu_arg=tuple(draw(st.lists(_path, max_size=2))),
        accel=draw(st.sampled_from(("", "kvm", "tcg"))), cpus=draw(st.sampled_from(("", "8"))),
    )  # fmt: skip


def _made(f: Flags, taken: set[int]) -> Answers | None:
    try:
        return answers(f, taken)
    except AnswersError as e:
        # devices and files that were drawn twice
        assert all("already" in x or "of its own" in x for x in e.errors), e.errors
        return None


@settings(max_examples=60, deadline=None)
@given(valid())
def test_any_valid_answers_give_files_that_both_controllers_read(f: Flags) -> None:
    a = _made(f, set())
    assume(a is not None)
    assert a is not None
    both = configs(a)
    p, s = both["primary"], both["secondary"]
    assert (p.pair, p.role, s.role) == (f.pair, "primary", "secondary")
    assert (p.peer.local, p.peer.remote) == (s.peer.remote, s.peer.local)
    assert (p.nbd.local, p.nbd.remote) == (s.nbd.remote, s.nbd.local)
    assert p.qemu.migrate_uri == s.qemu.migrate_uri and s.qemu.reverse_uri
    assert [n.name for n in p.networks] == [n.name for n in s.networks]
    assert [n.guest_mac for n in p.networks] == [n.guest_mac for n in s.networks]
    assert [n.vxlan_local for n in p.networks] == [n.vxlan_remote for n in s.networks]
    for x, y in zip(p.peer.heartbeat_links, s.peer.heartbeat_links, strict=True):
        assert x.split("->") == y.split("->")[::-1]
    for role in ROLES:
        files = {x.path: x.text for x in host_files(a, role, {}).files}
        assert len(files) == len(host_files(a, role, {}).files)
        # what a shell makes of the script is the command line
        text = files[f"/etc/colo-xdp/{f.pair}/qemu"].partition("\nexec ")[2]
        assert shlex.split(text.replace("\\\n", " ")) == [*qemu_unit.command(a, role), "$@"]


@settings(max_examples=40, deadline=None)
@given(valid(), valid())
def test_two_pairs_of_a_host_share_nothing(first: Flags, second: Flags) -> None:
    assume(first.pair != second.pair)
    a = _made(first, set())
    assume(a is not None)
    assert a is not None
    there = configs(a)["primary"]
    b = _made(second, {use.number for use in ports.uses(there)})
    assume(b is not None)
    assert b is not None
    paths = [{x.path for x in host_files(p, "primary", {}).files} for p in (a, b)]
    assert paths[0].isdisjoint(paths[1])
    others = configs(b)["secondary"]
    numbers = [{use.number for use in ports.uses(c)} - {0} for c in (there, others)]
    assert numbers[0].isdisjoint(numbers[1])
    # whatever is left in common was given twice, and is named
    mine = {n for net in there.networks for n in (net.tap, net.peer_link)}
    theirs = {n for net in others.networks for n in (net.tap, net.peer_link)}
    found = ports.conflicts(others, [there])
    assert len(found) == len(mine & theirs)
