# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Replies under their Idempotency-Key: the same request again gets the same reply.

A key that is claimed lives in memory: if hosteld dies before the reply is kept, the client finds
out by sending it again, and is told of the object that exists by then (name_taken).
"""

from __future__ import annotations

import json
import logging
import time

from api.errors import Conflict, Invalid
from api.ports import StoredReply

from .store import Statement, Store, StoreFull

log = logging.getLogger(__name__)


class IdempotencyKeys:
    """Claims and settles keys.

    Args:
        store: where replies are kept.
        ttl_s: for how long.

    Threads: the event loop's.
    """

    def __init__(self, store: Store, ttl_s: float) -> None:
        self._store = store
        self._ttl_s = ttl_s
        self._claims: dict[str, str] = {}

    async def claim(self, key: str, fingerprint: str) -> StoredReply | None:
        """Claim a key; a reply means that the work was done before.

        Raises:
            Conflict: a request with this key is running.
            Invalid: the key was used for another request.
            StoreFull: the database cannot be read.
        """
        running = self._claims.get(key)
        if running is not None:
            _check_same(key, running, fingerprint)
            raise Conflict(
                "idempotency_key_in_use",
                f"a request with Idempotency-Key {key} is still running; ask again in a moment",
            )
        # Before the first await, so that a twin that comes meanwhile sees it.
        self._claims[key] = fingerprint
        try:
            rows = await self._store.fetch(
                "SELECT fingerprint, status, headers, body FROM idempotency"
                " WHERE key = ? AND at > ?",
                (key, time.time() - self._ttl_s),
            )
            if not rows:
                return None
            _check_same(key, rows[0][0], fingerprint)
        except BaseException:
            del self._claims[key]
            raise
        del self._claims[key]
        _, status, headers, body = rows[0]
        return StoredReply(status, json.loads(headers), body)

    async def settle(self, key: str, reply: StoredReply | None) -> None:
        """Keep the reply of a claimed key, or with None give the key back."""
        fingerprint = self._claims.get(key)
        try:
            if fingerprint is not None and reply is not None:
                await self._store.commit(*self._statements(key, fingerprint, reply))
        except StoreFull as err:
            log.warning("reply not kept under its key error=%s", err)
        finally:
            self._claims.pop(key, None)

    def _statements(
        self, key: str, fingerprint: str, reply: StoredReply
    ) -> tuple[Statement, Statement]:
        at = time.time()
        return (
            Statement("DELETE FROM idempotency WHERE at <= ?", (at - self._ttl_s,)),
            Statement(
                "INSERT OR REPLACE INTO idempotency (key, fingerprint, at, status, headers, body)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (key, fingerprint, at, reply.status, json.dumps(reply.headers), reply.body),
            ),
        )


def _check_same(key: str, known: str, fingerprint: str) -> None:
    if known != fingerprint:
        raise Invalid(
            "idempotency_key_reused",
            f"Idempotency-Key {key} was used for another request; choose a new one",
            field="Idempotency-Key",
        )
