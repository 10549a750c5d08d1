# SPDX-License-Identifier: GPL-2.0-or-later
"""[migration]: what each side's QEMU is told, and what it cannot do is said before it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from colo_xdp.config.file import ConfigError, parse
from colo_xdp.qemu.hardware import refusal
from colo_xdp.qemu.migration import MAX_BANDWIDTH, MigrationOptions, is_deferred
from colo_xdp.qemu.qmp import Qmp
from tests.unit.qemu.test_qmp import FakeQemu, Heard, caps, with_fake

ALL = MigrationOptions(100 << 20, 4, "c", "b.example", "tcp:10.0.0.2:4444")
OBJECTS = [
    {"name": "type", "type": "string"},
    {"name": "c", "type": "child<tls-creds-x509>"},
    {"name": "pc.ram", "type": "child<memory-backend-ram>"},
]
FILE = """
pair = "web1"
role = "{role}"
[network]
tap = "tap0"
peer_link = "peer0"
[qemu]
qmp = "/q"
migrate_uri = "{migrate_uri}"
reverse_uri = "{reverse_uri}"
[peer]
local = "127.0.0.1:1"
remote = "127.0.0.1:2"
[migration]
{migration}
"""


def answers(
    version: tuple[int, int] = (11, 1), *, migration: Any = None, endpoint: str = "client",
    multifd: bool = False,
) -> dict[str, Any]:  # fmt: skip
    return {
        "query-version": {"qemu": {"major": version[0], "minor": version[1], "micro": 3}},
        "query-migrate-capabilities": [
            *caps("x-colo", "events", "return-path"), {"capability": "multifd", "state": multifd},
        ],
        "query-migrate": migration or {},
        "qom-list": OBJECTS,
        "qom-get": endpoint,
        "migrate-set-capabilities": {}, "migrate-set-parameters": {}, "migrate-incoming": {},
    }  # fmt: skip


def turned_on(fake: FakeQemu) -> set[str]:
    said = fake.args["migrate-set-capabilities"]["capabilities"]
    return {c["capability"] for c in said if c["state"]}


def test_without_the_section_it_is_as_ever(tmp_path: Path) -> None:
    async def body(fake: FakeQemu, q: Qmp, heard: Heard) -> None:
        await q.prepare(primary=True)
        assert fake.args["migrate-set-parameters"] == {
            "x-checkpoint-delay": 3_600_000, "max-bandwidth": MAX_BANDWIDTH,
        }  # fmt: skip
        await q.prepare(primary=False)
        assert fake.args["migrate-set-parameters"] == {"announce-rounds": 0}
        assert "multifd" not in turned_on(fake) and "migrate-incoming" not in fake.said
        before = len(fake.said)
        assert await q.migration_trouble(MigrationOptions(listen="unix:/x"), primary=False) == ""
        assert len(fake.said) == before, "nothing is asked"

    with_fake(tmp_path, body, answers())


def test_what_the_sender_is_told(tmp_path: Path) -> None:
    async def body(fake: FakeQemu, q: Qmp, heard: Heard) -> None:
        await q.prepare(primary=True, migration=ALL)
        assert fake.args["migrate-set-parameters"] == {
            "x-checkpoint-delay": 3_600_000, "max-bandwidth": 100 << 20,
            "multifd-channels": 4, "multifd-compression": "none",
            "tls-creds": "c", "tls-hostname": "b.example", "tls-authz": "",
        }  # fmt: skip
        assert turned_on(fake) == {"x-colo", "events", "return-path", "multifd"}
        assert "migrate-incoming" not in fake.said

    with_fake(tmp_path, body, answers())


def test_what_the_receiver_is_told(tmp_path: Path) -> None:
    """Further channels before it listens: QEMU takes them at no other time."""

    async def body(fake: FakeQemu, q: Qmp, heard: Heard) -> None:
        await q.prepare(primary=False, migration=ALL)
        assert fake.args["migrate-set-parameters"] == {
            "announce-rounds": 0, "multifd-channels": 4, "multifd-compression": "none",
            "tls-creds": "c", "tls-hostname": "", "tls-authz": "",
        }  # fmt: skip
        assert "multifd" in turned_on(fake)
        assert fake.args["migrate-incoming"] == {"uri": "tcp:10.0.0.2:4444"}
        order = [fake.said.index(f"migrate-{x}") for x in ("set-capabilities", "incoming")]
        assert order == sorted(order) and fake.said[-1] == "migrate-incoming"
        fake.answers |= answers(migration={"status": "setup"}, multifd=True, endpoint="server")
        fake.said.clear()
        await q.prepare(primary=False, migration=ALL)  # once more, before `migrate`
        assert "multifd" in turned_on(fake) and "migrate-incoming" not in fake.said
        assert await q.migration_trouble(ALL, primary=False) == ""

    with_fake(tmp_path, body, answers(endpoint="server"))


LISTENS = {"socket-address": [{"type": "unix"}]}


@pytest.mark.parametrize(
    ("version", "primary", "migration", "listen", "says"),
    [
        ((7, 2), True, {}, "tcp:x:1", "multifd needs QEMU 11, this is 7.2.3"),
        ((10, 2), False, {}, "tcp:x:1", "multifd needs QEMU 11"),
        ((11, 0), True, {}, "", ""),
        ((11, 1), False, {"status": "setup"}, "tcp:x:1", "start it with `-incoming defer`"),
        ((11, 1), False, LISTENS, "tcp:x:1", "start it with `-incoming defer`"),
        ((11, 1), False, {}, "", "has to be told where to wait"),
        ((11, 1), False, {}, "tcp:x:1", ""),
    ],
)
def test_channels_that_a_qemu_does_not_take(
    tmp_path: Path, version: tuple[int, int], primary: bool, migration: Any, listen: str, says: str
) -> None:
    options = MigrationOptions(multifd=2, listen=listen)

    async def body(fake: FakeQemu, q: Qmp, heard: Heard) -> None:
        why = await q.migration_trouble(options, primary=primary)
        assert says in why if says else not why
        await q.prepare(primary=primary, migration=options)
        assert ("multifd" in turned_on(fake)) == (not says), "not even tried"

    with_fake(tmp_path, body, answers(version, migration=migration) | {"stop": {}})


@pytest.mark.parametrize(
    ("name", "endpoint", "primary", "says"),
    [
        ("c", "client", True, ""),
        ("c", "server", False, ""),
        ("c", "client", False, "a QEMU that receives the other guest's state needs endpoint=serv"),
        ("c", "server", True, "a QEMU that sends its guest's state needs endpoint=client"),
        ("d", "client", True, "this QEMU has no such object: -object tls-creds-x509,id=d,..."),
        ("pc.ram", "", True, "no such object"),
    ],
)
def test_credentials_are_looked_for(
    tmp_path: Path, name: str, endpoint: str, primary: bool, says: str
) -> None:
    async def body(fake: FakeQemu, q: Qmp, heard: Heard) -> None:
        why = await q.migration_trouble(MigrationOptions(tls_creds=name), primary=primary)
        assert says in why if says else not why

    with_fake(tmp_path, body, answers(endpoint=endpoint))


def test_both_hosts_must_want_the_same() -> None:
    mine, theirs = {"vCPUs": "1", **ALL.report()}, {"vCPUs": "2", "[migration] multifd": "2"}
    assert refusal(mine, theirs) == (
        "COLO is not entered: both hosts must have the same: [migration] multifd: 4 here, 2 there;"
        " [migration] tls_creds: set here, none there"
    )
    assert "vCPUs" in refusal(mine, {**mine, "vCPUs": "2"})
    assert MigrationOptions(5, listen="x", tls_hostname="h").report() == {}, "may differ"


def test_a_waiting_qemu_says_where() -> None:
    assert is_deferred({})
    assert not is_deferred({"status": "setup"}) and not is_deferred(LISTENS)


def text(
    migration: str, role: str = "primary", migrate_uri: str = "tcp:10.0.0.2:4444",
    reverse_uri: str = "",
) -> str:  # fmt: skip
    return FILE.format(
        role=role, migration=migration, migrate_uri=migrate_uri, reverse_uri=reverse_uri
    )


def test_credentials_are_those_of_the_guests_role() -> None:
    keys = 'tls_creds = "c"\ntls_creds_incoming = "s"\ntls_hostname = "h"\nmax_bandwidth = 3'
    for role, waits in (("primary", "tcp:10.0.0.1:5"), ("secondary", "tcp:10.0.0.2:4444")):
        c = parse(text(keys, role, reverse_uri="tcp:10.0.0.1:5"))
        p, s = (MigrationOptions(**c.migration_options(r)) for r in ("primary", "secondary"))
        assert (p.tls_creds, s.tls_creds, p.listen, s.listen) == ("c", "s", waits, waits)
        assert p.max_bandwidth == 3 << 20 and p.tls_hostname == "h" and p.multifd == 0


@pytest.mark.parametrize(
    ("migration", "uris", "says"),
    [
        ('tls_creds = "c"', {}, 'tls_creds_incoming = "": required with tls_creds'),
        ('tls_creds_incoming = "c"', {}, "expected only with tls_creds"),
        ('tls_creds = "c"\ntls_creds_incoming = "c"', {}, "expected another object"),
        ('tls_hostname = "h"', {}, 'tls_hostname = "h": expected only with tls_creds'),
        ('tls_creds = "c d"', {}, "the id of a QEMU object"),
        ("multifd = 256", {}, "from 0 to 255"),
        ("multifd = 2", {"migrate_uri": "exec:x"}, "expected tcp:, unix: or vsock: with multifd"),
        (
            "multifd = 2",
            {"role": "secondary", "migrate_uri": ""},
            "required with multifd: this host's QEMU is told where to wait",
        ),
        ("max_bandwidth = -1", {}, "MiB/s"),
    ],
)
def test_mistakes_in_the_section(migration: str, uris: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError) as e:
        parse(text(migration, **uris))
    assert says in str(e.value)
