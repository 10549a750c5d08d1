# SPDX-License-Identifier: GPL-2.0-or-later
"""TCP goodput (iperf3) of a real sender whose own frames, copied, play the SVM.

guest ns: e0 --- gv :host: bridge --- uplink --- c0 :client
          copies: e0 egress -> d0 - d1 -> s0 --- peer0 :host
The copy takes one hop more than the frame, so the PVM is ahead, as it is with real guests.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

from colo_xdp import abi, attach, cleanup, loader
from colo_xdp.abi import Cfg, Mode
from colo_xdp.fastmap import FastMap
from colo_xdp.inject import Injector
from colo_xdp.ring import open_reader
from tests.bench.held import PAIR, TierU
from tests.netns.conftest import inside, sh

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


def _index(ns: str, dev: str) -> int:
    return int(sh("ip", "netns", "exec", ns, "cat", f"/sys/class/net/{dev}/ifindex"))


@contextmanager
def network(offloads: bool) -> Iterator[None]:
    """The three namespaces."""
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
    bpf = loader.compile_text(text)

    def put(ns: str, dev: str, way: str, name: str) -> None:
        with inside(ns):
            f = SimpleNamespace(fd=bpf.load_func(name.encode(), 3).fd, name=name)
            attach.attach_tc(dev, way, f, PAIR, None)  # type: ignore[arg-type]

    put(GUEST, "e0", "egress", "copy")
    put(GUEST, "d1", "ingress", "pass_on")
    yield put


@contextmanager
def _proxy(uplink: bool) -> Iterator[TierU]:
    """Our programs on gv and peer0: a veth, so not by way of DataPath."""
    work = tempfile.mkdtemp(prefix="colo-bench.")
    with inside(HOST):
        cleanup.cleanup(PAIR, "/sys/fs/bpf", work)
        objects = loader.load("primary", PAIR, "/sys/fs/bpf", loader.Options(fast=True, stashes=64))
        config = objects.map("config")

        def write(slot: Cfg, value: int) -> None:
            config.set(slot.to_bytes(4, "little"), value.to_bytes(8, "little"))

        for slot, value in (
            (Cfg.TAP, attach.link_info("gv").index), (Cfg.PEER, attach.link_info("peer0").index),
            (Cfg.EPOCH, 1), (Cfg.MODE, Mode.RUN),
            (Cfg.UPLINK, attach.link_info("uplink").index if uplink else 0),
        ):  # fmt: skip
            write(slot, value)
        fast = FastMap(objects, 10**12, 0, lambda on: write(Cfg.FAST, on), lambda epoch: None)
        fast.enabled = True
        name = f"cxr-{PAIR}"
        fd = attach.make_tap(name)
        progs = objects.programs
        attach.attach_tc(name, "ingress", progs["pvm_release"], PAIR, None)
        attach.attach_tc("peer0", "ingress", progs["svm_arrival"], PAIR, None)
        attach.attach_tc("gv", "ingress", progs["pvm_out"], PAIR, None)
        reader = open_reader(objects)
        dp: Any = SimpleNamespace(
            injectors={"release": Injector(fd)}, drain=reader.drain, beat=lambda: None, fast=fast,
            reader=reader,
        )  # fmt: skip
        try:
            yield TierU(dp)
        finally:
            reader.close()
            os.close(fd)
            objects.close()
            cleanup.cleanup(PAIR, "/sys/fs/bpf", work)


def once(arm: str, offloads: bool, seconds: float = 2.0) -> dict[str, float]:
    """Gbit/s, retransmissions and CPU seconds of the whole machine, of one run."""
    with network(offloads), nullcontext() if arm == "plain" else _copies() as put:
        if arm == "mirror only":
            put(HOST, "peer0", "ingress", "sink")
        with _proxy(arm == "K direct") if arm.startswith("K") else nullcontext() as tier:
            server = subprocess.Popen(
                ["ip", "netns", "exec", CLIENT, "iperf3", "-s", "-1"],
                stdout=subprocess.DEVNULL,
            )
            try:
                _listening()
                before = _busy()
                p = subprocess.Popen(
                    ["ip", "netns", "exec", GUEST, "iperf3", "-c", CLIENT_IP, "-J", "-t",
                     str(seconds)],
                    stdout=subprocess.PIPE, text=True,
                )  # fmt: skip
                end = time.monotonic() + seconds + 10
                while p.poll() is None and time.monotonic() < end:
                    if tier is not None:
                        tier.wait(0.005)
                        tier()
                    else:
                        with_deadline(p)
                p.kill()
                out = json.loads(p.stdout.read() if p.stdout else "{}").get("end", {})
                busy = _busy() - before
            finally:
                server.kill()
                server.wait()
            if "sum_received" not in out:
                raise RuntimeError(f"{arm}: iperf3 did not finish; {tier and tier.asked[:3]}")
            return {
                "gbit": out["sum_received"]["bits_per_second"] / 1e9,
                "retransmits": out["sum_sent"]["retransmits"],
                "cpu": busy,
            }


def with_deadline(p: subprocess.Popen[str]) -> None:
    """Wait a little for its end."""
    try:
        p.wait(0.05)
    except subprocess.TimeoutExpired:
        return


def _listening() -> None:
    end = time.monotonic() + 5
    while ":5201 " not in sh("ip", "netns", "exec", CLIENT, "ss", "-ltn"):
        if time.monotonic() > end:
            raise RuntimeError("iperf3 does not listen")


def _busy() -> float:
    with open("/proc/stat") as f:
        fields = [int(x) for x in f.readline().split()[1:]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


ARMS = ("plain", "mirror only", "K", "K direct")


def measure(offloads: bool, repeats: int) -> dict[str, dict[str, float]]:
    """Medians by arm; the arms take turns."""
    runs: dict[str, list[dict[str, float]]] = {a: [] for a in ARMS}
    for _ in range(repeats):
        for arm in ARMS:
            runs[arm].append(once(arm, offloads))
    return {
        a: {
            "gbit": statistics.median(x["gbit"] for x in v),
            "low": min(x["gbit"] for x in v),
            "high": max(x["gbit"] for x in v),
            "cpu_per_gbit": statistics.median(x["cpu"] / x["gbit"] for x in v),
            "retransmits": statistics.median(x["retransmits"] for x in v),
        }
        for a, v in runs.items()
    }


if __name__ == "__main__":
    for on in (True, False):
        got = measure(on, 3)
        for a, v in got.items():
            ratio = v["gbit"] / got["plain"]["gbit"]
            print(f"offloads {on}: {a:12s} {v['gbit']:6.2f} Gbit/s {ratio:.2f}", v, flush=True)
