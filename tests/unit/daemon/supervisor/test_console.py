# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Console logs: read with a dropped beginning, followed as they grow."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from api.errors import Conflict
from api.models.vms import VmAction
from api.ports import ConsoleChunk
from daemon.supervisor.console import read_log
from daemon.supervisor.service import Supervisor
from kvm_ffi.host_process import punch_hole
from tests.support.supervisor import CALL, Harness

BLOCK = 4096


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "console.log"
    path.write_bytes(b"a" * BLOCK + b"b" * BLOCK + b"c" * 10)
    return path


def test_a_log_is_read_from_an_offset_up_to_a_limit(log: Path) -> None:
    assert read_log(log, BLOCK - 1, 2) == ConsoleChunk(BLOCK - 1, b"ab", 2 * BLOCK + 10)


def test_a_negative_offset_counts_from_the_end(log: Path) -> None:
    assert read_log(log, -3, 100) == ConsoleChunk(2 * BLOCK + 7, b"ccc", 2 * BLOCK + 10)
    assert read_log(log, -(10**9), 1) == ConsoleChunk(0, b"a", 2 * BLOCK + 10)


def test_an_offset_behind_the_end_is_the_end(log: Path) -> None:
    assert read_log(log, 10**9, 100) == ConsoleChunk(2 * BLOCK + 10, b"", 2 * BLOCK + 10)


def test_reading_starts_where_the_kept_part_begins(log: Path) -> None:
    fd = os.open(log, os.O_RDWR)
    punch_hole(fd, 0, BLOCK)
    os.close(fd)
    chunk = read_log(log, 5, 3)
    assert (chunk.offset, chunk.data) == (BLOCK, b"bbb")


def test_a_log_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert read_log(tmp_path / "none", 0, 10) == ConsoleChunk(0, b"", 0)


async def collect(supervisor: Supervisor, offset: int, text: bytes) -> int:
    """Follow the console until it has shown so much; return the number of chunks."""
    seen, count = b"", 0
    async with asyncio.timeout(20):
        async for chunk in supervisor.follow_console("a", offset):
            seen, count = seen + chunk.data, count + 1
            if seen == text:
                break
            assert text.startswith(seen)
    return count


def test_several_followers_see_all_and_a_late_one_the_past(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a")
        text = b"".join(b"line %d\n" % number for number in range(50))
        early = [asyncio.create_task(collect(supervisor, 0, text)) for _ in range(3)]
        for number in range(50):
            assert await supervisor.write_console("a", b"line %d\n" % number) > 0
        counts = await asyncio.gather(*early)
        assert max(counts) <= 50
        await collect(supervisor, 0, text)
        await collect(supervisor, -8, b"line 49\n")

    harness.run(scenario)


def test_following_ends_with_the_vm(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a")

        async def follow() -> list[ConsoleChunk]:
            return [chunk async for chunk in supervisor.follow_console("a", 0)]

        follower = asyncio.create_task(follow())
        await supervisor.write_console("a", b"last")
        await supervisor.delete_vm("a", True, CALL)
        async with asyncio.timeout(20):
            await follower

    harness.run(scenario)


def test_a_console_can_be_followed_before_the_first_start(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.create("a")
        follower = asyncio.create_task(collect(supervisor, 0, b"hello"))
        await asyncio.sleep(0)
        await harness.act(VmAction.START)
        await supervisor.write_console("a", b"hello")
        await follower

    harness.run(scenario)


def test_a_slow_guest_takes_less_than_was_typed(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a", "slow-console")
        assert await supervisor.write_console("a", b"x" * 40_000) == 16 * 1024

    harness.run(scenario)


def test_a_stopped_vm_takes_no_input(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.create("a")
        with pytest.raises(Conflict, match="takes no input") as caught:
            await supervisor.write_console("a", b"x")
        assert caught.value.allowed == ["start"]

    harness.run(scenario)


def test_without_inotify_the_log_is_polled(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        supervisor._consoles._watcher.close()
        await harness.start("a")
        follower = asyncio.create_task(collect(supervisor, 0, b"hello"))
        await asyncio.sleep(0)
        await supervisor.write_console("a", b"hello")
        await follower

    harness.run(scenario)
