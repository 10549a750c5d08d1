# SPDX-License-Identifier: GPL-2.0-or-later
"""Store the lease in etcd, over its JSON gateway: the only module that imports etcd3gw.

Everything that decides is a transaction, so the cluster's quorum has agreed to it. The library
blocks, so it runs in a thread; a thread that does not return is abandoned with its connection.
make_store() (failover/arbiter.py) creates the store; the doctor calls probe().
"""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests
from etcd3gw.client import Etcd3Client
from etcd3gw.exceptions import Etcd3Exception

from .lease import GIVEN_UP, StoreError, StoreView, ours_to_take

log = logging.getLogger("colo_xdp.failover.etcd")

PREFIX = "/colo-xdp/"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Etcd:
    """Location of the cluster, and paths of PEM files; "" for none."""

    endpoints: tuple[str, ...]
    ca: str = ""
    cert: str = ""
    key: str = ""


def _b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _text(value: str) -> str:
    return base64.b64decode(value).decode(errors="replace")


class _Attempt:
    """One connection; `over` is set once nobody waits for its answers any more."""

    def __init__(self, etcd: Etcd, endpoint: str, timeout: float) -> None:
        where = urlsplit(endpoint)
        self.client = Etcd3Client(
            host=where.hostname or "", port=where.port or 2379, protocol=where.scheme,
            ca_cert=etcd.ca or None, cert_cert=etcd.cert or None, cert_key=etcd.key or None,
            timeout=timeout, api_path="/v3/",  # etcd 3.4 and newer
        )  # fmt: skip
        # an environment's proxy must not get between host and store
        self.client.session.trust_env = False
        self.pool = ThreadPoolExecutor(1, "colo-xdp-lease")
        self.over = False

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if self.over:
            raise ValueError("given up")
        answer: dict[str, Any] = self.client.post(self.client.get_url(path), json=body)
        return answer

    def txn(
        self, compare: list[dict[str, Any]], success: list[Any], failure: list[Any]
    ) -> tuple[bool, list[dict[str, Any]]]:
        body = {"compare": compare, "success": success, "failure": failure}
        answer = self.post("/kv/txn", body)
        return bool(answer.get("succeeded")), answer.get("responses", [])

    def end(self) -> None:
        self.over = True
        self.pool.shutdown(wait=False, cancel_futures=True)


class EtcdStore:
    """Implement lease.Store with etcd. `timeout`: the longest that one request may take, s.

    A request that was given up can still change the key, but only against the revision that it had
    read. Afterwards a new lease is used, which writes the key and thereby changes its revision, so
    the late request has no effect from then on. Without this it could tie the key to its older
    lease.
    """

    def __init__(self, etcd: Etcd, pair: str, timeout: float) -> None:
        self._etcd, self._timeout = etcd, timeout
        self._leader_key, self._standalone_key, self._last = (
            _b64(f"{PREFIX}{pair}/{n}") for n in ("holder", "standalone", "last")
        )
        self._at = 0
        self._lease = 0
        self._attempt: _Attempt | None = None

    # ---- in the event loop

    async def hold(self, holder: str, ttl_ms: int, steal: str, claim: bool) -> StoreView:
        last = self._lease
        self._lease, seen = await self._run(
            lambda a: self._hold(a, last, holder, ttl_ms, steal, claim)
        )
        return seen

    async def look(self) -> StoreView:
        return await self._run(self._look)

    async def record(self, holder: str, standalone: str) -> bool:
        return await self._run(lambda a: self._record(a, holder, standalone))

    async def release(self) -> None:
        lease, self._lease = self._lease, 0  # never used again, however late it is revoked
        if lease:
            await self._run(lambda a: self._release(a, lease))

    async def close(self) -> None:
        self._give_up()

    def _give_up(self) -> None:
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            attempt.end()

    async def _run(self, work: Callable[[_Attempt], T]) -> T:
        endpoint = self._etcd.endpoints[self._at]
        done = False
        try:
            if self._attempt is None:
                self._attempt = _Attempt(self._etcd, endpoint, self._timeout)
            attempt = self._attempt
            loop = asyncio.get_running_loop()
            result = await loop.run_in_executor(attempt.pool, work, attempt)
            done = True
            return result
        except (Etcd3Exception, requests.RequestException, OSError, ValueError, KeyError,
                TypeError) as e:  # fmt: skip
            raise StoreError(f"etcd {endpoint}: {str(e) or type(e).__name__:.200}") from e
        finally:
            if not done:  # also when cancelled: the thread may still be running
                self._lease = 0
                self._at = (self._at + 1) % len(self._etcd.endpoints)
                self._give_up()

    # ---- in the thread

    @staticmethod
    def _get(key: str) -> dict[str, Any]:
        return {"request_range": {"key": key}}

    @staticmethod
    def _value(response: dict[str, Any]) -> tuple[str, int]:
        """Return value and revision; ("", 0) if there is no such key."""
        kvs = response.get("response_range", {}).get("kvs", [])
        return (_text(kvs[0].get("value", "")), int(kvs[0]["mod_revision"])) if kvs else ("", 0)

    @staticmethod
    def _alive(a: _Attempt, lease: int, ttl_ms: int) -> int:
        """Return a lease of at least the ttl: the renewed one, or a new one."""
        seconds = -(-ttl_ms // 1000)
        if lease:
            r = a.post("/lease/keepalive", {"ID": lease})
            if int(r.get("result", {}).get("TTL", 0)) >= seconds:
                return lease
        r = a.post("/lease/grant", {"TTL": seconds, "ID": 0})
        if int(r["TTL"]) < seconds:
            raise ValueError(f"etcd granted a lease of {r['TTL']} s, {seconds} s were requested")
        return int(r["ID"])

    def _read(self) -> list[dict[str, Any]]:
        return [self._get(k) for k in (self._standalone_key, self._leader_key, self._last)]

    def _seen(self, found: list[dict[str, Any]]) -> tuple[StoreView, int]:
        """Return what _read() found, and the revision of the key."""
        (standalone, _), (now, revision), (last, since) = (self._value(r) for r in found[:3])
        return StoreView(now, standalone, last, since), revision

    def _hold(
        self, a: _Attempt, last: int, holder: str, ttl_ms: int, steal: str, claim: bool
    ) -> tuple[int, StoreView]:
        """Return the lease to renew next time, and the contents of the store."""
        read = self._read()
        seen, revision = self._seen(a.txn([], read, [])[1])
        if not ours_to_take(seen, holder, steal, claim):
            return 0, seen
        lease = self._alive(a, last, ttl_ms)
        key = self._leader_key
        if lease == last:
            mine: list[dict[str, Any]] = [
                {"key": key, "target": "VALUE", "result": "EQUAL", "value": _b64(holder)},
                {"key": key, "target": "LEASE", "result": "EQUAL", "lease": lease},
            ]
            ok, found = a.txn(mine, read, read)
            if ok:
                return lease, self._seen(found)[0]
        same: list[dict[str, Any]] = [
            {"key": k, "target": "MOD", "result": "EQUAL", "mod_revision": n}
            for k, n in ((key, revision), (self._last, seen.since))
        ]
        put: list[dict[str, Any]] = [
            {"request_put": {"key": key, "value": _b64(holder), "lease": lease}},
            {"request_put": {"key": self._last, "value": _b64(holder)}},
        ]
        ok, found = a.txn(same, [*put, *read], read)
        if not ok:
            raise ValueError("the key has just changed")
        return lease, self._seen(found[len(put) :])[0]

    def _look(self, a: _Attempt) -> StoreView:
        return self._seen(a.txn([], self._read(), [])[1])[0]

    def _release(self, a: _Attempt, lease: int) -> None:
        """Delete the key and record that it was given up, so that nobody waits.

        The transaction does nothing to a key that another lease holds by now.
        """
        mine = {"key": self._leader_key, "target": "LEASE", "result": "EQUAL", "lease": lease}
        said = {"request_put": {"key": self._last, "value": _b64(GIVEN_UP)}}
        a.txn([mine], [{"request_delete_range": {"key": self._leader_key}}, said], [])
        a.post("/lease/revoke", {"ID": lease})

    def _record(self, a: _Attempt, holder: str, standalone: str) -> bool:
        mine = {
            "key": self._leader_key,
            "target": "VALUE",
            "result": "EQUAL",
            "value": _b64(holder),
        }
        put: dict[str, Any] = {
            "request_put": {"key": self._standalone_key, "value": _b64(standalone)}
        }
        if not standalone:
            put = {"request_delete_range": {"key": self._standalone_key}}
        return a.txn([mine], [put], [])[0]


def probe(etcd: Etcd, timeout: float) -> str:
    """Return why the cluster does not answer a request that needs its quorum; "" if it does."""
    attempt = _Attempt(etcd, etcd.endpoints[0], timeout)
    try:
        attempt.txn([], [EtcdStore._get(_b64(PREFIX))], [])
    except (Etcd3Exception, requests.RequestException, OSError, ValueError) as e:
        return f"etcd {etcd.endpoints[0]}: {str(e) or type(e).__name__:.200}"
    finally:
        attempt.end()
    return ""
