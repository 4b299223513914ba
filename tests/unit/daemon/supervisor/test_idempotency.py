# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Idempotency-Key: once done is done."""

from __future__ import annotations

import pytest

from api.errors import Conflict, Invalid
from api.ports import StoredReply
from daemon.supervisor.service import Supervisor
from tests.support.supervisor import Harness

REPLY = StoredReply(201, {"ETag": '"1"'}, b"{}")


def test_a_settled_reply_comes_again_also_after_a_restart(harness: Harness) -> None:
    async def first(supervisor: Supervisor) -> None:
        assert await supervisor.claim_key("k", "print") is None
        await supervisor.settle_key("k", REPLY)
        assert await supervisor.claim_key("k", "print") == REPLY

    async def second(supervisor: Supervisor) -> None:
        assert await supervisor.claim_key("k", "print") == REPLY

    harness.run(first)
    harness.run(second)


def test_a_key_of_a_running_request_is_refused(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await supervisor.claim_key("k", "print")
        with pytest.raises(Conflict, match="still running"):
            await supervisor.claim_key("k", "print")

    harness.run(scenario)


def test_a_key_of_another_request_is_refused(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await supervisor.claim_key("k", "print")
        with pytest.raises(Invalid, match="another request"):
            await supervisor.claim_key("k", "other")
        await supervisor.settle_key("k", REPLY)
        with pytest.raises(Invalid, match="another request"):
            await supervisor.claim_key("k", "other")

    harness.run(scenario)


def test_a_key_that_was_given_back_is_free(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await supervisor.claim_key("k", "print")
        await supervisor.settle_key("k", None)
        assert await supervisor.claim_key("k", "other") is None

    harness.run(scenario)


def test_a_reply_is_forgotten_after_its_time(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        monkeypatch.setattr("daemon.supervisor.idempotency.time.time", lambda: 1000.0)
        await supervisor.claim_key("k", "print")
        await supervisor.settle_key("k", REPLY)
        monkeypatch.setattr("daemon.supervisor.idempotency.time.time", lambda: 1000.0 + 86401)
        assert await supervisor.claim_key("k", "other") is None

    harness.run(scenario)
