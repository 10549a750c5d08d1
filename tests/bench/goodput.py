# SPDX-License-Identifier: GPL-2.0-or-later
"""Measure TCP goodput (iperf3) of a real sender whose own frames, copied, play the SVM.

    guest ns: e0 --- gv :host: bridge --- uplink --- c0 :client
              copies: e0 egress -> d0 - d1 -> s0 --- peer0 :host

The copy takes one hop more than the frame, so the PVM is ahead, as with real guests.

Steering (RPS) determines on which CPU everything that the sender's side and the host receive is
processed: on one, or spread over all by the hash of the flow. Without it the sender's moves from
CPU to CPU would reorder the copies and the acks, which no wire does. The client stays as it is.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from colo_xdp import abi
from colo_xdp.abi import Cfg, Mode, Prog, Reason
from colo_xdp.datapath import attach, compiler, devices, loader
from colo_xdp.datapath.inject import Injector
from colo_xdp.datapath.offload_maps import BpfKernelPath
from colo_xdp.datapath.ring import open_reader
from colo_xdp.datapath.source import Options
from colo_xdp.tools import cleanup
from tests.netns.conftest import inside, sh

from . import held
from .held import PAIR, SlowPath
from .report import Part, Spread, cpu_seconds
from .stats import child

HOST, GUEST, CLIENT = "cxgh", "cxgg", "cxgc"
GUEST_IP, CLIENT_IP = "10.9.0.2", "10.9.0.1"

_COPY = """
#include <uapi/linux/bpf.h>
#include <uapi/linux/pkt_cls.h>
int copy(struct __sk_buff *skb)
{
    if (skb->protocol != bpf_htons(0x0800) ||
        bpf_skb_vlan_push(skb, bpf_htons(TPID), TCI))
        return TC_ACT_OK;
    bpf_clone_redirect(skb, D0, 0);
    bpf_skb_vlan_pop(skb);
    return TC_ACT_OK;
}
int pass_on(struct __sk_buff *skb) { return bpf_redirect(S0, 0); }
int sink(struct __sk_buff *skb) { return TC_ACT_SHOT; }
"""


def _sys(ns: str, dev: str, what: str) -> str:
    return sh("ip", "netns", "exec", ns, "cat", f"/sys/class/net/{dev}/{what}").strip()


def _index(ns: str, dev: str) -> int:
    return int(_sys(ns, dev, "ifindex"))


@contextmanager
def network(offloads: bool) -> Iterator[None]:
    """Create the three namespaces."""
    close()
    try:
        for ns in (HOST, GUEST, CLIENT):
            sh("ip", "netns", "add", ns)
        for ns, text in (
            (HOST, "link add br0 type bridge"),
            (HOST, f"link add gv type veth peer name e0 netns {GUEST}"),
            (HOST, f"link add uplink type veth peer name c0 netns {CLIENT}"),
            (HOST, f"link add peer0 mtu 1600 type veth peer name s0 mtu 1600 netns {GUEST}"),
            (GUEST, "link add d0 mtu 1600 type veth peer name d1 mtu 1600"),
            (HOST, "link set gv master br0"), (HOST, "link set uplink master br0"),
            (GUEST, f"addr add {GUEST_IP}/24 dev e0"),
            (CLIENT, f"addr add {CLIENT_IP}/24 dev c0"),
        ):  # fmt: skip
            sh("ip", "-n", ns, *text.split())
        for ns, devs in ((HOST, "br0 gv uplink peer0"), (GUEST, "e0 d0 d1 s0"), (CLIENT, "c0")):
            for dev in devs.split():
                sh("ip", "-n", ns, "link", "set", dev, "up")
        if not offloads:
            for ns, dev in ((GUEST, "e0"), (CLIENT, "c0")):
                off = f"ethtool -K {dev} tso off gso off gro off"
                sh("ip", "netns", "exec", ns, *off.split())
        yield
    finally:
        close()


def close() -> None:
    """Remove what a former run may have left."""
    for ns in (HOST, GUEST, CLIENT):
        subprocess.run(["ip", "netns", "del", ns], capture_output=True, check=False)


@contextmanager
def _copies() -> Iterator[Any]:
    text = _COPY.replace("TPID", hex(abi.TPID))
    text = text.replace("TCI", str(abi.KIND_SVM << abi.KIND_SHIFT | 1))
    text = text.replace("D0", str(_index(GUEST, "d0"))).replace("S0", str(_index(GUEST, "s0")))
    bpf = compiler.compile_text(text)

    def put(ns: str, dev: str, way: str, name: str) -> None:
        with inside(ns):
            f = SimpleNamespace(fd=bpf.load_func(name.encode(), 3).fd, name=name)
            attach.attach_tc(dev, way, f, PAIR, None)  # type: ignore[arg-type]

    put(GUEST, "e0", "egress", "copy")
    put(GUEST, "d1", "ingress", "pass_on")
    yield put


@contextmanager
def _proxy(bridge: bool) -> Iterator[SlowPath]:
    """Attach our programs to gv and peer0: a veth, so not through DataPath.

    pvm_in mirrors the client's acks as in a pair; nobody receives them behind s0. The fast path is
    told where the client is, as nothing looks at this bridge.
    """
    work = tempfile.mkdtemp(prefix="colo-bench.")
    with inside(HOST):
        cleanup.cleanup(PAIR, "/sys/fs/bpf", work, force=True)
        objects = loader.load("primary", PAIR, "/sys/fs/bpf", Options(fast=True, buffers=64))
        config = objects.map("config")

        def write(slot: Cfg, value: int) -> None:
            config.set(slot.to_bytes(4, "little"), value.to_bytes(8, "little"))

        for slot, value in (
            (Cfg.TAP, devices.link_info("gv").index), (Cfg.PEER, devices.link_info("peer0").index),
            (Cfg.EPOCH, 1), (Cfg.MODE, Mode.RUN),
            (Cfg.UPLINK, abi.UPLINK_BRIDGE if bridge else abi.UPLINK_LEARNED),
        ):  # fmt: skip
            write(slot, value)
        mac = bytes.fromhex(_sys(CLIENT, "c0", "address").replace(":", ""))
        held.tell_port(objects, mac, devices.link_info("uplink").index)
        fast = BpfKernelPath(
            objects, 10**12, 0, lambda on: write(Cfg.OFFLOAD, on), lambda epoch: None
        )
        fast.enabled = True
        name = f"cxr-{PAIR}"
        fd = devices.make_tap(name)
        progs = objects.programs
        attach.attach_tc(name, "ingress", progs["pvm_release"], PAIR, None)
        attach.attach_tc("peer0", "ingress", progs["svm_arrival"], PAIR, None)
        attach.attach_tc("gv", "ingress", progs["pvm_out"], PAIR, None)
        attach.attach_tc("gv", "egress", progs["pvm_in"], PAIR, None)
        reader = open_reader(objects)
        dp: Any = SimpleNamespace(
            injectors={"release": Injector(fd)}, drain=reader.drain, beat=lambda: None, fast=fast,
            reader=reader, objects=objects,
        )  # fmt: skip
        try:
            yield SlowPath(dp)
        finally:
            reader.close()
            os.close(fd)
            objects.close()
            cleanup.cleanup(PAIR, "/sys/fs/bpf", work, force=True)


def _steer(cpus: int) -> None:
    """Set the mask of the CPUs that process what these devices receive."""
    for ns, dev in ((HOST, "gv"), (HOST, "peer0"), (HOST, "uplink"), (GUEST, "d1"), (GUEST, "e0")):
        path = f"/sys/class/net/{dev}/queues/rx-0/rps_cpus"
        sh("ip", "netns", "exec", ns, "sh", "-c", f"echo {cpus:x} > {path}")


def once(arm: str, offloads: bool, seconds: int, flows: int = 1, cpus: int = 1) -> dict[str, float]:
    """Return Gbit/s, retransmitted segments and the machine's CPU seconds; `cpus`: see _steer()."""
    with network(offloads), nullcontext() if arm == "plain" else _copies() as put:
        _steer(cpus)
        if arm == "mirror only":
            put(HOST, "peer0", "ingress", "sink")
        with (
            _proxy(arm == "fast path, bridge")
            if arm.startswith("fast path")
            else nullcontext() as slow
        ):
            server_cmd = ["ip", "netns", "exec", CLIENT, "iperf3", "-s", "-1"]
            client_cmd = [
                "ip", "netns", "exec", GUEST, "iperf3", "-c", CLIENT_IP, "-J", "-t", str(seconds),
                "-P", str(flows),
            ]  # fmt: skip
            with (
                tempfile.TemporaryFile("w+") as answer,
                child(server_cmd, stdout=subprocess.DEVNULL),
            ):
                _listening()
                before, dropped = cpu_seconds(), _dropped()
                with child(client_cmd, stdout=answer) as p:
                    end = time.monotonic() + seconds + 10
                    while p.poll() is None and time.monotonic() < end:
                        if slow is not None:
                            slow.wait(0.005)
                            slow()
                        else:
                            with_deadline(p)
                busy = cpu_seconds() - before
                answer.seek(0)
                out = json.loads(answer.read() or "{}").get("end", {})
            if "sum_received" not in out:
                raise RuntimeError(f"{arm}: iperf3 did not finish; {slow and slow.asked[:3]}")
            return _offsets_sent(slow) | {
                DROPPED: float(_dropped() - dropped),
                "gbit": out["sum_received"]["bits_per_second"] / 1e9,
                "retransmits": out["sum_sent"]["retransmits"],
                "cpu": busy,
            }


SHARE = "left by the fast path, % of the bytes"
#: prefix of the names of what explains a figure
HANDED, ASKED, DROPPED = (
    "handed to the slow path: ",
    "asked for a checkpoint: ",
    "dropped by the CPUs' queues",
)


def _offsets_sent(slow: SlowPath | None) -> dict[str, float]:
    """Return how often the fast path punted a connection and the slow path requested a checkpoint.

    Both by reason.
    """
    if slow is None:
        return {}
    out = {ASKED + cause: float(n) for cause, n in Counter(slow.asked).items()}
    counters = slow.dp.objects.map("counters")

    def count(prog: Prog, reason: Reason) -> tuple[int, int]:
        raw = counters.get((prog * Reason.MAX + reason).to_bytes(4, "little")) or b""
        both = list(abi.COUNT.iter_unpack(raw))
        return sum(n for n, _ in both), sum(b for _, b in both)

    for reason in Reason:
        if reason.name.startswith("PUNT_"):
            out[HANDED + reason.name.lower()] = float(count(Prog.OFFLOAD, reason)[0])
    by_k = sum(
        count(prog, reason)[1]
        for prog in (Prog.PVM_OUT, Prog.SVM_ARRIVAL)
        for reason in (Reason.OFFLOAD_PASSED, Reason.OFFLOAD_RELEASED, Reason.OFFLOAD_REBUILT)
    )
    by_u = count(Prog.PVM_OUT, Reason.PUNT)[1]
    out[SHARE] = 100 * by_k / max(1, by_k + by_u)
    return out


def _dropped() -> int:
    """Return the frames that met a full CPU queue (net.core.netdev_max_backlog), on any device."""
    text = Path("/proc/net/softnet_stat").read_text()
    return sum(int(line.split()[1], 16) for line in text.splitlines())


def with_deadline(p: subprocess.Popen[str]) -> None:
    """Wait a limited time for its end."""
    try:
        p.wait(0.05)
    except subprocess.TimeoutExpired:
        return


def _listening() -> None:
    end = time.monotonic() + 5
    while ":5201 " not in sh("ip", "netns", "exec", CLIENT, "ss", "-ltn"):
        if time.monotonic() > end:
            raise RuntimeError("iperf3 does not listen")


ALL = ("plain", "mirror only", "fast path", "fast path, bridge")


def measure(
    part: Part,
    name: str,
    arms: tuple[str, ...],
    repeats: int,
    seconds: int,
    *,
    offloads: bool = True,
    flows: int = 1,
    cpus: int = 1,
) -> dict[str, float]:
    """Return ratios by arm; the arms take turns. Empty if it could not be measured."""
    runs: dict[str, list[dict[str, float]]] = {a: [] for a in arms}
    try:
        for _ in range(repeats):
            for a in arms:
                runs[a].append(once(a, offloads, seconds, flows, cpus))
    except (RuntimeError, OSError) as e:
        part.error(name, str(e))
        return {}
    gbit = {a: Spread.of(x["gbit"] for x in v) for a, v in runs.items()}
    part.add(name, "Gbit/s", gbit, base="plain", higher_is_better=True)
    part.add(
        f"{name}: CPU of the machine", "s per Gbit",
        {a: Spread.of(x["cpu"] / x["gbit"] / seconds for x in v) for a, v in runs.items()},
        base="plain",
    )  # fmt: skip
    part.add(f"{name}: sent again", "segments",
             {a: Spread.of(x["retransmits"] for x in v) for a, v in runs.items()})  # fmt: skip
    notes = {k for v in runs.values() for x in v for k in x} - {"gbit", "cpu", "retransmits"}
    for what in sorted(notes):
        counts = {a: [x.get(what, 0.0) for x in v] for a, v in runs.items()}
        if any(max(v) for v in counts.values()):
            part.add(
                f"{name}: {what}",
                "%" if what == SHARE else "times",
                {a: Spread.of(v) for a, v in counts.items()},
            )
    return {a: s.median for a, s in gbit.items()}


#: the goals set no number for this one
TOGETHER = 0.95


def run(part: Part, quick: bool, _build: Path) -> None:
    """Measure one flow with and without offloads; several on one CPU and on all."""
    n, t = (1, 1) if quick else (5, 2)
    got = {
        on: measure(part, f"one flow, offloads {'on' if on else 'off'}", ALL, n, t, offloads=on)
        for on in (True, False)
    }
    everybody = (1 << (os.cpu_count() or 1)) - 1
    pair = ("plain", "fast path", "fast path, bridge")
    one = measure(part, "4 flows, steered to one CPU", pair, n, t, flows=4, cpus=1)
    many = measure(part, "4 flows, spread over all CPUs", pair, n, t, flows=4, cpus=everybody)
    part.goal("goodput to plain, offloads on", _per(got[True], "fast path", "plain"), 0.95)
    part.goal(
        "goodput to mirror only, offloads off", _per(got[False], "fast path", "mirror only"), 0.85
    )
    spread, single = _per(many, "fast path", "plain"), _per(one, "fast path", "plain")
    value = spread / single if spread and single else None
    part.goal("goodput of 4 flows on all CPUs to 4 on one, each to plain", value, TOGETHER)


#: a run is as good as another: the worst of so many, to their median
STEADY_RUNS, STEADY = 20, 0.8


def run_steady(part: Part, quick: bool, _build: Path) -> None:
    """Look for runs in which a connection stays in user space: the worst of many, to the median.

    The arm `mirror only` shows by how much this machine's own runs differ, and the share of the
    fast path whether user space has anything to do with it.
    """
    for offloads in (True, False):
        name = f"one flow, offloads {'on' if offloads else 'off'}"
        gbit: dict[str, list[float]] = {"mirror only": [], "fast path": []}
        shares: list[float] = []
        try:
            for _ in range(2 if quick else STEADY_RUNS):
                for arm, values in gbit.items():
                    found = once(arm, offloads, 2)
                    values.append(found["gbit"])
                    if SHARE in found:
                        shares.append(found[SHARE])
        except (RuntimeError, OSError) as e:
            part.error(name, str(e))
            continue
        rates = {arm: Spread.of(x) for arm, x in gbit.items()}
        part.add(f"{name}: {SHARE}", "%", {"fast path": Spread.of(shares)})
        part.add(name, "Gbit/s", rates, base="mirror only", higher_is_better=True)
        worst = {arm: min(x) / Spread.of(x).median for arm, x in gbit.items()}
        ratios = {arm: Spread.of([x]) for arm, x in worst.items()}
        part.add(f"{name}: the worst run to the median", "", ratios)
        part.goal(f"{name}: the worst of many runs to the median", worst["fast path"], STEADY)


def _per(got: dict[str, float], a: str, b: str) -> float | None:
    return got[a] / got[b] if got.get(b) else None
