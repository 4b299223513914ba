# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A zygote that dies, and one that cannot be had."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable

import pytest

from daemon.errors import WorkerError
from daemon.supervisor import zygotes
from daemon.supervisor.tasks import Tasks
from daemon.supervisor.zygotes import ZygoteClient
from tests.support.supervisor import spawn_fake_zygote


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(4000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("not in time")


def spawn_mortal() -> tuple[socket.socket, int]:
    """Start a zygote that ends at once."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    return ours, os.posix_spawn("/bin/true", ["true"], {})


def test_a_zygote_that_dies_again_and_again_is_left_alone_until_it_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(zygotes, "FIRST_BACKOFF_S", 0.001)
    spawned = []

    def respawn() -> tuple[socket.socket, int]:
        spawned.append(1)
        return spawn_mortal()

    async def scenario() -> None:
        tasks = Tasks()
        client = ZygoteClient(*spawn_mortal(), tasks, respawn)
        await until(lambda: len(spawned) == zygotes.MAX_RESTARTS and client._is_down)
        await asyncio.sleep(0.05)
        assert len(spawned) == zygotes.MAX_RESTARTS
        with pytest.raises(WorkerError):
            await client.fork("vm", ())
        assert len(spawned) == zygotes.MAX_RESTARTS + 1
        await client.close()
        await tasks.finish(1)

    asyncio.run(scenario())


def test_a_zygote_that_cannot_be_started_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zygotes, "FIRST_BACKOFF_S", 0.001)

    def respawn() -> tuple[socket.socket, int]:
        raise OSError(11, "Resource temporarily unavailable")

    async def scenario() -> None:
        tasks = Tasks()
        client = ZygoteClient(*spawn_mortal(), tasks, respawn)
        await until(lambda: client._is_down)
        with pytest.raises(WorkerError, match="Resource temporarily unavailable"):
            await client.fork("vm", ())
        await client.close()
        await tasks.finish(1)

    asyncio.run(scenario())


def test_a_zygote_says_hello_when_it_can_fork() -> None:
    async def scenario() -> None:
        tasks = Tasks()
        client = ZygoteClient(*spawn_mortal(), tasks, spawn_fake_zygote)
        await client.wait_hello()  # the replacement's
        await client.close()
        await tasks.finish(1)

    asyncio.run(scenario())


def test_zygotes_that_never_say_hello_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zygotes, "FIRST_BACKOFF_S", 0.001)

    async def scenario() -> None:
        tasks = Tasks()
        client = ZygoteClient(*spawn_mortal(), tasks, spawn_mortal)
        with pytest.raises(WorkerError, match="no zygote starts"):
            await client.wait_hello()
        await client.close()
        await tasks.finish(1)

    asyncio.run(scenario())


def test_a_fork_that_the_zygote_refuses_is_an_error() -> None:
    async def scenario() -> None:
        tasks = Tasks()
        client = ZygoteClient(*spawn_fake_zygote(), tasks, spawn_fake_zygote)
        with pytest.raises(WorkerError, match="four fds"):
            await client.fork("vm", ())
        await client.close()
        await tasks.finish(1)

    asyncio.run(scenario())
