# SPDX-License-Identifier: GPL-2.0-or-later
"""The keys of what a QEMU is asked for: [qemu], [migration], [[disk]] and [nbd].

QEMU migrates memory and replicates disks; here is where, how fast, and how long it may take.
"""

from __future__ import annotations

from dataclasses import dataclass

from .. import validate

_DAY_MS = 86_400_000
_QOM_ID = validate.pattern(r"[A-Za-z][A-Za-z0-9._-]{0,254}", "the id of a QEMU object")


@dataclass(frozen=True, slots=True, kw_only=True)
class Qemu:
    """[qemu]: QMP and migration. Times in ms."""

    qmp: str = validate.key(
        validate.socket_path,
        "unix socket of this host's QEMU (QMP)",
    )
    qmp_oob: str = validate.key(
        validate.or_empty(validate.socket_path, "the same socket as qmp"),
        "second QMP socket, for the out-of-band `yank` that frees a QEMU whose main loop hangs",
        default="",
    )
    migrate_uri: str = validate.key(
        validate.or_empty(
            validate.pattern(
                r"(tcp|unix|rdma|fd|exec|vsock):.+", "a migration URI such as tcp:10.0.0.2:4444"
            ),
            "on the secondary",
        ),
        "where the secondary's QEMU waits (its -incoming); required on the primary, and on the "
        "secondary with multifd",
        default="",
    )
    reverse_uri: str = validate.key(
        validate.or_empty(
            validate.pattern(
                r"(tcp|unix|rdma|fd|exec|vsock):.+", "a migration URI such as tcp:10.0.0.1:4444"
            ),
            "a survivor on this host stays alone",
        ),
        "where the primary host's QEMU waits (its -incoming) after a takeover, to become the "
        "new secondary; needed on the secondary",
        default="",
    )
    incoming: tuple[str, ...] = validate.key(
        validate.argv,
        "command (argv, no shell) that restarts this host's QEMU with -incoming and ends what "
        "is left of the old one; run when the other host's guest serves the clients and this host "
        "has no usable copy of it: its own guest is outdated, or the copy's QEMU has exited",
        default=(),
    )
    qmp_timeout: int = validate.key(
        validate.integer(1, _DAY_MS, "ms"),
        "deadline of one QMP command",
        default=5000,
        unit="ms",
    )
    enter_timeout: int = validate.key(
        validate.integer(1, _DAY_MS, "ms"),
        "deadline of the first synchronization, which copies all of the guest's memory",
        default=120_000,
        unit="ms",
    )
    enter_stop: int = validate.key(
        validate.integer(100, 600_000, "ms"),
        "how long the first synchronization may stop the guest; after that it is abandoned "
        "and the guest runs on",
        default=5000,
        unit="ms",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """[migration]: parameters of QEMU's migration channel, which checkpoints use too."""

    max_bandwidth: int = validate.key(
        validate.integer(0, 1 << 20, "MiB/s"),
        "upper limit of the rate at which QEMU sends the guest's memory; 0: none",
        default=0,
        unit="MiB/s",
    )
    multifd: int = validate.key(
        validate.integer(0, 255, "channels"),
        "number of further connections that carry the guest's memory (QEMU's multifd), the same "
        "on both hosts; 0: off; needs QEMU 11, and `-incoming defer`",
        default=0,
        unit="channels",
    )
    tls_creds: str = validate.key(
        validate.or_empty(_QOM_ID, "those that QEMU has been given otherwise, if any"),
        "id of the TLS credentials (`-object tls-creds-...,endpoint=client`) with which this "
        "host's QEMU sends its guest's state",
        default="",
    )
    tls_creds_incoming: str = validate.key(
        validate.or_empty(_QOM_ID, "without tls_creds"),
        "id of those with which it receives the other guest's (endpoint=server); required with "
        "tls_creds, since the guests may change places",
        default="",
    )
    tls_hostname: str = validate.key(
        validate.or_empty(
            validate.pattern(r"[!-~]{1,255}", "a host name"), "the host in the migration URI"
        ),
        "name that the certificate of the other host's QEMU must carry",
        default="",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """[[disk]]: a writable disk of the guest."""

    name: str = validate.key(
        validate.pattern(r"[!-~]{1,255}", "a name (1 to 255 printable characters)"),
        "QEMU's name of the disk, the same on both hosts: drive id, node name or device id; also "
        "the name of its NBD export",
    )
    overlays: str = validate.key(
        validate.or_empty(validate.directory, "with external = true"),
        "directory of this host in which QEMU may make files, for the overlays (active and hidden "
        "disk) that the secondary guest needs; they grow by what is written between two "
        "checkpoints",
        default="",
    )
    overlay_limit: int = validate.key(
        validate.integer(1, 1 << 24, "MiB"),
        "size of an overlay at which a checkpoint is requested, which empties both overlays of "
        "the disk",
        default=256,
        unit="MiB",
    )
    external: bool = validate.key(
        validate.boolean,
        "you guarantee that something else keeps the two copies of the disk identical, and "
        "nothing is done for it",
        default=False,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Nbd:
    """[nbd]: how the primary's writes reach the secondary's disks; needed with a [[disk]]."""

    local: str = validate.key(
        validate.or_empty(validate.address, "no disk is replicated"),
        "address where this host's QEMU serves its images while its guest is the secondary",
        default="",
    )
    remote: str = validate.key(
        validate.or_empty(validate.address, "no disk is replicated"),
        "the same of the other host's QEMU",
        default="",
    )
    speed: int = validate.key(
        validate.integer(0, 1 << 20, "MiB/s"),
        "upper limit of the rate at which a disk is copied before the pair is protected; 0: none",
        default=0,
        unit="MiB/s",
    )
    write_timeout: int = validate.key(
        validate.integer(100, 600_000, "ms"),
        "how long writes of the guest may wait for the secondary's image, none of them ending, "
        "before the secondary is given up; 15 s at least while a disk is copied",
        default=2000,
        unit="ms",
    )
