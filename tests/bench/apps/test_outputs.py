# SPDX-License-Identifier: GPL-2.0-or-later
"""Test what is read from the clients' outputs, as these versions of them print it."""

from __future__ import annotations

import struct
from dataclasses import astuple

import pytest

from tests.bench.apps import names, outputs
from tests.bench.apps.outputs import Outcome, OutputError, Transaction

AB = """Concurrency Level:      8
Time taken for tests:   1.749 seconds
Complete requests:      300
Failed requests:        2
   (Connect: 0, Receive: 0, Length: 2, Exceptions: 0)
Non-2xx responses:      1
Requests per second:    171.47 [#/sec] (mean)
Time per request:       46.655 [ms] (mean)
"""
PERCENTILES = "Percentage served,Time in ms\n0,20.101\n50,47.375\n90,60.2\n99,82.034\n"
REDIS = """WARNING: Could not fetch server CONFIG
"test","rps","avg_latency_ms","min_latency_ms","p50_latency_ms","p95_latency_ms","p99_latency_ms","max_latency_ms"
"SET","404.75","2.406","0.368","0.591","8.135","16.959","60.319"
"""
PGBENCH = """pgbench (15.20 (Debian 15.20-0+deb12u1))
transaction type: <builtin: TPC-B (sort of)>
number of transactions actually processed: 3
number of failed transactions: 0 (0.000%)
latency average = 131.8 ms
initial connection time = 51.5 ms
tps = 30.340042 (without initial connection time)
"""
LOG = """0 1 114460 0 1796000000 500000
1 1 359850 0 1796000001 20
0 2 failed 0 1796000001 25
0 3 90000 0 1796000000 999999
2 1 12
"""


def test_ab() -> None:
    assert outputs.read_ab(AB, PERCENTILES) == Outcome(171.47, 47.375, 82.034, 3)
    few = PERCENTILES.replace("99,82.034", "98,80.0\n99,0.257")
    assert outputs.read_ab(AB, few).p99 == 80.0
    with pytest.raises(OutputError, match="percentiles"):
        outputs.read_ab(AB, "")
    with pytest.raises(OutputError, match="Requests per second"):
        outputs.read_ab("Failed requests: 0\n", PERCENTILES)


def test_redis() -> None:
    assert outputs.read_redis(REDIS) == Outcome(404.75, 0.591, 16.959)
    with pytest.raises(OutputError, match="0 results"):
        outputs.read_redis("Could not connect to Redis at 10.9.0.2:6379: Connection refused\n")


def test_pgbench() -> None:
    read = outputs.read_pgbench(PGBENCH, LOG)
    assert astuple(read) == pytest.approx((30.340042, 114.46, 359.85, 0, False))
    assert outputs.read_log(LOG)[:2] == [
        Transaction(1796000000.5, 0.11446), Transaction(1796000000.999999, 0.09)
    ]  # fmt: skip
    gave_up = "pgbench: error: client 1 script 0 aborted in command 4 query 0: server closed\n"
    assert outputs.read_pgbench(gave_up + PGBENCH, LOG).errors == 1
    none = "duration: 10 s\nnumber of transactions actually processed: 0\n"
    assert outputs.read_pgbench(none, "") == Outcome.at_deadline(10.0)
    with pytest.raises(OutputError, match="no transaction"):
        outputs.read_pgbench(PGBENCH, "")


def test_what_hangs_counts_as_its_deadline() -> None:
    hung = Outcome.at_deadline(60.0, 5)
    assert hung == Outcome(0.1, 60_000.0, 60_000.0, 1, hung=True)


def test_operations_one_after_the_other() -> None:
    one_wrong = outputs.of_times([0.1, 0.3, 0.2], 1)
    assert astuple(one_wrong) == pytest.approx((5.0, 200.0, 300.0, 1, False))
    with pytest.raises(OutputError):
        outputs.of_times([])


def test_a_name_server_answers_with_what_the_name_says() -> None:
    question = b"\x06host17\x07example\x00" + struct.pack(">HH", names.A, names.IN)
    query = struct.pack(">HHHHHH", 0xBEEF, 0x0100, 1, 0, 0, 0) + question
    reply = names.answer(query + b"\x00\x00\x29 an option that is ignored")
    assert reply[:12] == struct.pack(">HHHHHH", 0xBEEF, 0x8580, 1, 1, 0, 0)
    assert reply[12:].startswith(question) and reply[-4:] == bytes((192, 0, 2, 18))
    assert names.address_of("host17.example") == "192.0.2.18"
    aaaa = query[:-4] + struct.pack(">HH", 28, names.IN)
    assert names.answer(aaaa)[6:8] == b"\0\0"
