# SPDX-License-Identifier: GPL-2.0-or-later
"""The Debian guest with real servers: nginx (with and without TLS), Redis, PostgreSQL, OpenSSH.

They are Debian's packages with Debian's units, and no more settings than a guest needs that is
reached over its network. PostgreSQL keeps fsync: its root is the replicated disk. The clients come
from the same directory of packages (tools.py), so the host needs none.

Unlike the plain Debian guest's, this image is not the same byte for byte wherever it is made: keys
and the identifier of a database are random by their nature.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from colo_xdp.lab import debian, guest
from colo_xdp.lab.net import sh

HTTP, HTTPS, REDIS, SQL, SSH, RESOLVE = 8000, 443, 6379, 5432, 22, 5300
NAME = "apps"
CLIENT_FILES = "client"  # in the directory of packages: what clients there need (tools.py)
SIZE_MIB, MEMORY_MIB = 1024, 448
BOOT_S = 400.0  # two guests start six servers, under TCG, maybe on a busy machine
CLUSTER = "15/main"
DATABASE_S = 60.0
CLIENTS = ("apache2-utils", "openssh-client")  # the others come with their servers
PACKAGES = debian.Packages(
    (*debian.GUEST.names, "nginx", "redis-server", "postgresql-15", "openssh-server", "openssl",
     *CLIENTS),
    variant=debian.GUEST.variant,
    # what only just-in-time compilation of SQL needs, which is off
    left_out=(*debian.LEFT_OUT, "/usr/lib/llvm*", "/usr/lib/*/libLLVM*",
              "/usr/lib/postgresql/*/lib/bitcode/*"),
)  # fmt: skip
NGINX = f"""server {{
    listen {HTTP};
    listen {HTTPS} ssl;
    ssl_certificate /etc/nginx/guest.crt;
    ssl_certificate_key /etc/nginx/guest.key;
    access_log off;
    root /www;
}}
"""
REDIS_CONF = """bind 0.0.0.0
protected-mode no
save ""
"""
#: without TLS, which nginx and ssh have
POSTGRES = """listen_addresses = '*'
ssl = off
jit = off
shared_buffers = 32MB
"""
TRUSTED = "host all all 10.9.0.0/24 trust\n"
#: The guest asks for a name: its resolver draws a port and an id, each copy others.
ASK = """#!/bin/sh
read -r name
getent ahostsv4 "$name" | sed -n '1s/ .*//p'
"""
#: after these the lab's services say that the guest is ready
SERVERS = ("nginx", "redis-server", "postgresql@15-main", "ssh", "asks")
ASKS = f"""[Unit]
Description=Names that clients have this guest look up

[Service]
ExecStart=/usr/local/bin/nc -ll -p {RESOLVE} -e /usr/local/bin/ask

[Install]
WantedBy=multi-user.target
"""
#: nothing here should run by its clock while it is measured
WITHOUT = (
    "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer",
    "fstrim.timer", "systemd-tmpfiles-clean.timer", "e2scrub_reap.service",
)  # fmt: skip


def keys(directory: Path) -> Path:
    """Return the directory of the client's key and the web server's, made once."""
    where = directory / f"{NAME}-keys"
    if not where.exists():
        part = where.with_name(f"{where.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        new = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3650"
        files = ["-keyout", f"{part}/guest.key", "-out", f"{part}/guest.crt"]
        sh("openssl", *new.split(), "-subj", "/CN=guest", *files)
        sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "client", "-f", f"{part}/id")
        part.rename(where)
    return where


def variant(directory: Path) -> debian.Variant:
    """Return what the laboratory is to build (pair.Lab) in a directory."""
    known = keys(directory)

    def add(root: Path) -> None:
        shutil.rmtree(root / CLIENT_FILES, ignore_errors=True)
        for name in ("guest.crt", "guest.key"):
            shutil.copy(known / name, root / "etc/nginx" / name)
        sites = root / "etc/nginx/sites-enabled"
        (sites / "default").unlink()
        (sites / "guest").write_text(NGINX)
        with (root / "etc/redis/redis.conf").open("a") as f:
            f.write(REDIS_CONF)
        cluster = root / "etc/postgresql" / CLUSTER
        (cluster / "conf.d").mkdir(exist_ok=True)
        (cluster / "conf.d/guest.conf").write_text(POSTGRES)
        with (cluster / "pg_hba.conf").open("a") as f:
            f.write(TRUSTED)
        authorized = root / "root/.ssh"
        authorized.mkdir(mode=0o700, exist_ok=True)
        shutil.copy(known / "id.pub", authorized / "authorized_keys")
        (authorized / "authorized_keys").chmod(0o600)
        _units(root)
        _database(root)

    inputs = [p.read_bytes() for p in sorted(known.iterdir())]
    return debian.Variant(
        NAME, PACKAGES, SIZE_MIB, MEMORY_MIB, BOOT_S, add,
        b"".join([Path(__file__).read_bytes(), *inputs]),
    )  # fmt: skip


def _database(root: Path) -> None:
    """Create pgbench's tables here, where it takes seconds: scale 1, so one hot row of branches."""
    where = f"/usr/lib/postgresql/{CLUSTER.split('/')[0]}/bin"
    settings = f"-c config_file=/etc/postgresql/{CLUSTER}/postgresql.conf -c listen_addresses="
    data = f"/var/lib/postgresql/{CLUSTER}"

    def inside(command: str) -> None:
        as_postgres = ("su", "postgres", "-s", "/bin/sh", "-c", command)
        sh("chroot", str(root), *as_postgres, timeout=DATABASE_S)

    sockets = root / "run/postgresql"
    sockets.mkdir(exist_ok=True)
    sockets.chmod(0o777)
    (root / "dev/shm").chmod(0o1777)
    # With no pipe of ours: it would be the server's, too.
    inside(f"{where}/pg_ctl -D {data} -w -l /tmp/pg.log -o '{settings}' start > /dev/null 2>&1")
    try:
        inside(f"{where}/pgbench -q -i -s 1 postgres")
    finally:
        inside(f"{where}/pg_ctl -D {data} -w -m fast stop")
    (root / "tmp/pg.log").unlink()
    shutil.rmtree(sockets)


def _units(root: Path) -> None:
    guest.script(root / debian.PROGRAMS / "ask", ASK)
    units = root / "etc/systemd/system"
    (units / "asks.service").write_text(ASKS)
    (units / "multi-user.target.wants/asks.service").symlink_to("../asks.service")
    (units / "lab.service.d").mkdir()
    names = " ".join(f"{s}.service" for s in SERVERS)
    (units / "lab.service.d/apps.conf").write_text(f"[Unit]\nWants={names}\nAfter={names}\n")
    for name in WITHOUT:
        (units / name).unlink(missing_ok=True)
        (units / name).symlink_to("/dev/null")
