# SPDX-License-Identifier: GPL-2.0-or-later
"""Record the metrics of real pairs during incidents, for tests/deploy/test_alerts.py.

    python -m tests.deploy.record [NAME ...]    (make incidents; as root, about a minute each)

A pair of the laboratory runs as two hosts would, with its control channel on a network of its own.
Both controllers are scraped each second over HTTP, as Prometheus does it. All that was scraped goes
to build/incidents; what the rules read goes to tests/deploy/incidents. `--write` does the latter
alone, after a rule has come to read another metric.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from colo_xdp.lab.client import EchoStream
from colo_xdp.lab.net import PEER_P, PEER_S, LabError, in_ns, sh, stop_process, wait_for
from colo_xdp.lab.pair import NBD_PORT, PAIR, Lab

from . import series
from .rules import rule_metrics

ROOT = Path(__file__).parents[2]
BUILD, RAW, OUT = ROOT / "build", ROOT / "build/incidents", Path(__file__).parent / "incidents"
#: where compiled programs are kept, as on no other pair
CACHE = RAW / "cache"
#: what the recordings call the pair and its hosts
NAME, INSTANCES = "web1", {"primary": "host-a:9847", "secondary": "host-b:9847"}
MANAGEMENT = {"primary": "10.97.0.1", "secondary": "10.97.0.2"}
WITNESS = "10.98.0.9"
ROLES = ("primary", "secondary")
CALM_S = 20.0
#: for which a machine is away that boots
REBOOT_S = 120.0
DIGITS = 2
SAMPLE = re.compile(r"^(colo_xdp_\w+)\{(.*)\} (\S+)$", re.M)
LABEL = re.compile(r'(\w+)="([^"]*)"')
#: of the counted frames, those that rules read
READ = re.compile('reason="(drop_|note_mac|note_address|offload_|punt)')


class Recorder:
    """Scrapes both hosts each second, in a thread of its own."""

    def __init__(self, lab: Lab, store: subprocess.Popen[bytes] | None) -> None:
        self.lab = lab
        self.store = store  # of the leases
        self.scrapes: list[dict[str, str]] = []  # host -> what it answered
        self.marks: dict[str, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def mark(self, name: str) -> None:
        """Note that something is done now, that is before the next scrape."""
        self.marks[name] = len(self.scrapes)
        print(f"  {len(self.scrapes):4d} s  {name}", flush=True)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def calm(self, seconds: float = CALM_S) -> None:
        """Let time pass, with requests of a client."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.5)
            with suppress(LabError, OSError):
                self.lab.client.http("index.html", timeout=2)

    def _run(self) -> None:
        begin = time.monotonic()
        with ThreadPoolExecutor(len(ROLES)) as pool:
            while not self._stop.wait(max(0.0, begin + len(self.scrapes) - time.monotonic())):
                texts = dict(zip(ROLES, pool.map(self._scrape, ROLES), strict=True))
                # a busy machine makes this one late; what it has seen was true until now
                for _ in range(max(1, int(time.monotonic() - begin) - len(self.scrapes))):
                    self.scrapes.append(texts)

    def _scrape(self, host: str) -> str:
        url = f"http://127.0.0.1:{9847 if host == 'primary' else 9848}/metrics"

        def get() -> str:
            with urllib.request.urlopen(url, timeout=2) as r:
                text: str = r.read().decode()
            return text

        try:
            return in_ns(self.lab.ns(host), get)
        except OSError:
            return ""

    def rows(self) -> Iterator[dict[str, float]]:
        """Return the samples of each second."""
        for scrape in self.scrapes:
            row: dict[str, float] = {}
            for host, text in scrape.items():
                target = {"instance": INSTANCES[host], "job": "colo-xdp"}
                row[_name("up", target)] = float(bool(text))
                for m in SAMPLE.finditer(text):
                    labels = dict(LABEL.findall(m[2]))
                    if labels["pair"] and "le" not in labels:
                        row[_name(m[1], labels | target | {"pair": NAME})] = float(m[3])
            yield row


def _name(metric: str, labels: dict[str, str]) -> str:
    return metric + "{" + ",".join(f'{k}="{v}"' for k, v in sorted(labels.items())) + "}"


class Host:
    """What happens to one host of the laboratory."""

    def __init__(self, lab: Lab, role: str) -> None:
        self.lab, self.role, self.ns = lab, role, lab.ns(role)

    def links(self, state: str) -> None:
        for dev in ("uplink", "peer0", "mgmt0"):
            sh("ip", "-n", self.ns, "link", "set", dev, state)

    def loses_power(self) -> None:
        """End all at once; nothing says goodbye."""
        self.links("down")
        self.lab.controllers[self.role].kill()
        self.lab.controllers[self.role].wait()
        self.lab.vm[self.role].kill9()

    def shuts_down(self) -> None:
        """End as a machine does that reboots: the controller first."""
        stop_process(self.lab.controllers[self.role])
        self.lab.vm[self.role].stop()
        self.links("down")

    def boots(self) -> None:
        """Start what a boot starts. The pins are gone, as the memory of the machine is."""
        sh("rm", "-rf", f"/sys/fs/bpf/{PAIR}.{self.role}", check=False)
        self.links("up")
        self.lab.start_controller(self.role)
        time.sleep(3)
        self.lab.start_vm(self.role, incoming=True)


def protected(lab: Lab, seconds: float = 90) -> None:
    for role in ROLES:
        lab.wait_state(role, "protected", seconds)


@contextmanager
def up(**options: Any) -> Iterator[Lab]:
    """Build a pair whose control channel is not on the peer link. No controller runs."""
    overrides = {"failover": {"automatic": True, "fence": ["true"]}, **options.pop("overrides", {})}
    lab = Lab(BUILD, tag="cxalr", overrides=overrides, **options)
    try:
        lab.up()
        p, s = lab.net.primary, lab.net.secondary
        sh(*f"ip -n {p} link add mgmt0 type veth peer name mgmt0 netns {s}".split())
        for role in ROLES:
            sh(*f"ip -n {lab.ns(role)} addr add {MANAGEMENT[role]}/30 dev mgmt0".split())
            sh(*f"ip -n {lab.ns(role)} link set mgmt0 up".split())
            text = lab.config_path(role).read_text()
            for old, new in ((PEER_P, "primary"), (PEER_S, "secondary")):
                text = text.replace(f"{old}:9846", f"{MANAGEMENT[new]}:9846")
            lab.config_path(role).write_text(text)
        yield lab
    finally:
        lab.down()


# ---- the incidents


def role_change(rec: Recorder, lab: Lab) -> None:
    """A switchover and the re-protection after it"""
    rec.mark("switchover")
    lab.ask("primary", "switchover")
    wait_for("the end of the old QEMU", lambda: not lab.vm["primary"].alive, 20)
    lab.start_vm("primary", incoming=True)
    protected(lab)
    rec.mark("protected")
    rec.calm()


def role_change_compiling(rec: Recorder, lab: Lab) -> None:
    """A switchover and the re-protection after it, with programs that have to be compiled"""
    shutil.rmtree(CACHE)
    role_change(rec, lab)


def controller_restart(rec: Recorder, lab: Lab) -> None:
    """The controller of the guest that transmits is killed, and started again 5 s later"""
    rec.mark("killed")
    lab.controllers["primary"].kill()
    lab.controllers["primary"].wait()
    rec.calm(5)
    lab.start_controller("primary")
    protected(lab)
    rec.mark("protected")
    rec.calm()


def standby_reboot(rec: Recorder, lab: Lab) -> None:
    """The standby's host reboots for two minutes, and hands over before"""
    rec.mark("demoted")
    lab.ask("secondary", "demote", why="reboot")
    lab.wait_state("primary", "solo", 20)
    _away(rec, lab)


def standby_stopped(rec: Recorder, lab: Lab) -> None:
    """The standby's host reboots for two minutes, and its controller was stopped before"""
    _away(rec, lab)


def _away(rec: Recorder, lab: Lab) -> None:
    standby = Host(lab, "secondary")
    rec.mark("away")
    standby.shuts_down()
    rec.calm(REBOOT_S / 2)
    rec.mark("held")
    rec.calm(REBOOT_S / 2)
    rec.mark("back")
    standby.boots()
    protected(lab)
    rec.mark("protected")
    rec.calm()


def primary_dies(rec: Recorder, lab: Lab) -> None:
    """The primary's host loses power; it is repaired later"""
    dead = Host(lab, "primary")
    rec.mark("died")
    dead.loses_power()
    lab.wait_state("secondary", "promoted", 40)
    rec.calm(10)
    rec.mark("held")
    rec.calm(10)
    rec.mark("repaired")
    dead.boots()
    protected(lab)
    rec.mark("protected")
    rec.calm()


def primary_dies_manual(rec: Recorder, lab: Lab) -> None:
    """The primary's host loses power, and failover is not automatic: a person decides"""
    dead = Host(lab, "primary")
    rec.mark("died")
    dead.loses_power()
    lab.wait_state("secondary", "degraded", 40)
    rec.calm(10)
    rec.mark("held")
    rec.calm(10)
    rec.mark("decided")
    lab.ask("secondary", "failover", force=True)
    lab.wait_state("secondary", "promoted", 20)
    dead.boots()
    protected(lab)
    rec.mark("protected")
    rec.calm()


def peer_link(rec: Recorder, lab: Lab) -> None:
    """The peer link is pulled; the control channel lives on a network of its own"""
    rec.mark("pulled")
    sh("ip", "-n", lab.net.primary, "link", "set", "peer0", "down")
    rec.calm(15)
    rec.mark("held")
    rec.calm(10)
    rec.mark("plugged")
    sh("ip", "-n", lab.net.primary, "link", "set", "peer0", "up")
    protected(lab)
    rec.mark("protected")
    rec.calm()


def control_channel(rec: Recorder, lab: Lab) -> None:
    """The network of the control channel is cut; the peer link lives"""
    rec.mark("cut")
    sh("ip", "-n", lab.net.primary, "link", "set", "mgmt0", "down")
    rec.calm(15)
    rec.mark("held")
    rec.calm(10)
    rec.mark("mended")
    sh("ip", "-n", lab.net.primary, "link", "set", "mgmt0", "up")
    protected(lab)
    rec.mark("protected")
    rec.calm()


def lease_store(rec: Recorder, lab: Lab) -> None:
    """The lease store is gone, and then the standby's host dies as well"""
    rec.mark("store gone")
    stop_process(rec.store)
    rec.calm(15)
    rec.mark("held")
    rec.calm(10)
    rec.mark("standby died")
    dead = Host(lab, "secondary")
    dead.loses_power()
    rec.calm(20)
    rec.mark("held silent")
    rec.calm(10)
    rec.mark("store back")
    _start_etcd(lab)
    wait_for("output", lambda: lab.status("primary")["active"]["transmitting"], 40)
    dead.boots()
    protected(lab)
    rec.mark("protected")
    rec.calm()


def sick_svm(rec: Recorder, lab: Lab) -> None:
    """A secondary guest that answers nothing, whatever checkpoint it is given"""
    rec.mark("silent")
    lab.vm["secondary"].ask("set_link", name="n0", up=False)

    def alone() -> bool:
        lab.client.http("index.html", timeout=5)
        return lab.status("primary").get("state") == "solo"

    wait_for("the PVM to go on alone", alone, 60)
    rec.calm(10)
    rec.mark("held")
    rec.calm(10)
    rec.mark("replaced")
    lab.vm["secondary"].stop()
    lab.start_vm("secondary", incoming=True)
    protected(lab)
    rec.mark("protected")
    rec.calm()


def checkpoint_storm(rec: Recorder, lab: Lab) -> None:
    """Sixteen clients ask for a page on which the two guests never agree"""
    end = time.monotonic() + 50

    def provoke() -> None:
        while time.monotonic() < end:
            lab.client.uptime_page()

    rec.mark("began")
    threads = [threading.Thread(target=provoke) for _ in range(16)]
    for t in threads:
        t.start()
    time.sleep(10)
    rec.mark("held")
    time.sleep(30)
    rec.mark("held to")
    for t in threads:
        t.join()
    protected(lab)
    rec.mark("ended")
    rec.calm(30)


def mirror_silent(rec: Recorder, lab: Lab) -> None:
    """Writes to a replicated disk are not answered by the secondary; everything else lives"""
    rec.mark("cut")
    with lab.net.port_cut(NBD_PORT):
        with suppress(LabError, OSError):
            lab.client.run("dd if=/dev/urandom of=/mnt/vda/fill bs=1M count=2 conv=fsync")
        lab.wait_state("primary", "solo", 40)
        rec.calm(10)
        rec.mark("held")
        rec.calm(10)
        rec.mark("mended")
    lab.vm["secondary"].stop()
    lab.start_vm("secondary", incoming=True)
    protected(lab)
    rec.mark("protected")
    rec.calm()


def mirror_behind(rec: Recorder, lab: Lab) -> None:
    """The copy of the disks to a new secondary is slow"""
    _copy(rec, lab, "4mbit")


def mirror_given_up(rec: Recorder, lab: Lab) -> None:
    """The copy of the disks to a new secondary is so slow that it is given up and begun anew"""
    _copy(rec, lab, "128kbit")


def _copy(rec: Recorder, lab: Lab, rate: str) -> None:
    lab.client.run("dd if=/dev/urandom of=/mnt/vda/fill bs=1M count=24 conv=fsync")
    lab.vm["secondary"].kill9()
    lab.wait_state("primary", "solo", 40)
    with lab.net.port_slow(NBD_PORT, rate):
        rec.mark("copying")
        lab.start_vm("secondary", incoming=True)
        wait_for("a copy", lambda: lab.status("primary")["disks"]["copying"], 60)
        rec.calm(10)
        rec.mark("held")
        rec.calm(40 if rate == "128kbit" else 10)
        rec.mark("mended")
    if rate == "128kbit" and not lab.vm["secondary"].alive:
        lab.start_vm("secondary", incoming=True)
    protected(lab)
    rec.mark("protected")
    rec.calm()


def qemu_lost(rec: Recorder, lab: Lab) -> None:
    """The QEMU of the standby dies, and nothing starts another one"""
    rec.mark("died")
    lab.vm["secondary"].kill9()
    lab.wait_state("primary", "solo", 40)
    rec.calm(10)
    rec.mark("held")
    rec.calm(10)
    rec.mark("started")
    lab.start_vm("secondary", incoming=True)
    protected(lab)
    rec.mark("protected")
    rec.calm()


def _start_etcd(lab: Lab) -> subprocess.Popen[bytes]:
    url = f"http://{WITNESS}:2379"
    return lab.procs.start(
        ["etcd", "--data-dir", str(lab.work / "etcd"), "--unsafe-no-fsync", "--name", "e1",
         "--listen-client-urls", url, "--advertise-client-urls", url],
        lab.work / "etcd.log", lab.net.client,
    )  # fmt: skip


def _store(lab: Lab) -> subprocess.Popen[bytes]:
    """Give both hosts a link to a store of leases, in the client's namespace, and start it."""
    c = lab.net.client
    shutil.rmtree(lab.work / "etcd", ignore_errors=True)
    sh(*f"ip -n {c} addr add {WITNESS}/32 dev lo".split())
    for n, role in enumerate(ROLES, 1):
        ns = lab.ns(role)
        for line in (
            f"-n {ns} link add wit0 type veth peer name host{n} netns {c}",
            f"-n {ns} addr add 10.98.{n}.2/30 dev wit0",
            f"-n {c} addr add 10.98.{n}.1/30 dev host{n}",
            f"-n {ns} link set wit0 up",
            f"-n {c} link set host{n} up",
            f"-n {ns} route add {WITNESS} via 10.98.{n}.1",
        ):
            sh("ip", *line.split())
    return _start_etcd(lab)


LEASE = {"failover": {"automatic": True, "arbiter": "lease", "etcd": [f"http://{WITNESS}:2379"],
                      "lease_ttl": 3000}}  # fmt: skip
#: name -> what happens, and the laboratory it needs
INCIDENTS: dict[str, tuple[Callable[[Recorder, Lab], None], dict[str, Any]]] = {
    "role-change": (role_change, {}),
    "role-change-compiling": (role_change_compiling, {}),
    "controller-restart": (controller_restart, {}),
    "standby-reboot": (standby_reboot, {}),
    "standby-stopped": (standby_stopped, {}),
    "primary-dies": (primary_dies, {}),
    "primary-dies-manual": (
        primary_dies_manual,
        {"overrides": {"failover": {"automatic": False, "arbiter": "manual"}}},
    ),
    "peer-link-pulled": (peer_link, {}),
    "control-channel-cut": (control_channel, {}),
    "lease-store-gone": (lease_store, {"overrides": LEASE}),
    "sick-svm": (sick_svm, {}),
    "checkpoint-storm": (checkpoint_storm, {}),
    "mirror-silent": (mirror_silent, {"disks": 1}),
    "mirror-behind": (mirror_behind, {"disks": 1}),
    "mirror-given-up": (mirror_given_up, {"disks": 1}),
    "qemu-lost": (qemu_lost, {}),
}


def record(name: str) -> None:
    """Run one incident on a pair of its own and write what was scraped."""
    happens, options = INCIDENTS[name]
    print(f"{name}: {happens.__doc__}", flush=True)
    os.environ["COLO_XDP_CACHE"] = str(CACHE)
    with up(**options) as lab:
        store = _store(lab) if options.get("overrides") is LEASE else None
        lab.protect()
        stream = EchoStream(lab.net.client)
        rec = Recorder(lab, store)
        try:
            rec.calm()
            happens(rec, lab)
        finally:
            rec.stop()
            stream.stop()
        qemu = lab.qemu_version
    commit = sh("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD").strip()
    origin = (
        f"Recorded {datetime.now(UTC):%Y-%m-%d} at commit {commit}: QEMU {qemu}, Linux "
        f"{platform.release().split('-')[0]}, by tests/deploy/record.py."
    )
    raw = {"title": happens.__doc__, "origin": origin, "marks": rec.marks, "rows": list(rec.rows())}
    RAW.mkdir(parents=True, exist_ok=True)
    (RAW / f"{name}.json").write_text(json.dumps(raw))
    write(name)


def write(name: str) -> None:
    """Write the file of an incident from all that was scraped."""
    raw = json.loads((RAW / f"{name}.json").read_text())
    names = sorted({s for row in raw["rows"] for s in row})
    every = {
        s: [None if (v := row.get(s)) is None else round(v, DIGITS) for row in raw["rows"]]
        for s in names
    }
    origin = raw["origin"] + (
        f"\nOne sample a second, rounded to {DIGITS} digits. Only what the rules read;"
        "\ncounters that stayed zero are left out."
    )
    kept = {
        s: v
        for s, v in series.trimmed(every.items(), rule_metrics())
        if "packets_total" not in s or READ.search(s)
    }
    text = series.dump(series.Recording(raw["title"] + ".", origin, raw["marks"], kept))
    OUT.mkdir(exist_ok=True)
    (OUT / f"{name}.yaml").write_text(text)
    print(f"{name}: {len(raw['rows'])} s, {len(kept)} of {len(every)} series, {len(text)} bytes")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    p.add_argument("names", nargs="*", help=", ".join(INCIDENTS))
    p.add_argument("--write", action="store_true", help="record nothing")
    args = p.parse_args()
    for name in args.names or INCIDENTS:
        if args.write:
            write(name)
        else:
            record(name)


if __name__ == "__main__":
    main()
