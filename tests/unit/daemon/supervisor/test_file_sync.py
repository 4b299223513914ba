# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Syncs that hang; a program that can be told to is in the place of sync(1)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from api.errors import HostFailure
from daemon.supervisor.file_sync import FileSyncs

End = asyncio.Future[None]


def run(scenario: Callable[[FileSyncs, End], Awaitable[None]], timeout_s: float = 30.0) -> None:
    async def life() -> None:
        await scenario(FileSyncs(timeout_s), asyncio.get_running_loop().create_future())

    asyncio.run(life())


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A FIFO: whoever syncs waits until it is written to, and says so in the file "begun"."""
    tool, gate = tmp_path / "sync", tmp_path / "gate"
    os.mkfifo(gate)
    tool.write_text(f"#!/bin/sh\necho x >> {tmp_path}/begun\nread line < {gate}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(os, "defpath", f"{tmp_path}:{os.defpath}")
    yield gate
    with contextlib.suppress(OSError):  # ENXIO: nobody is left waiting
        os.close(os.open(gate, os.O_WRONLY | os.O_NONBLOCK))


def begun(gate: Path) -> int:
    path = gate.with_name("begun")
    return len(path.read_text().splitlines()) if path.exists() else 0


def let_go(gate: Path, count: int = 1) -> None:
    for _ in range(count):
        gate.write_text("go\n")


def let_nth_go(gate: Path, number: int) -> None:
    """Let the nth one go, and not another that is about to end."""
    deadline = time.monotonic() + 30
    while begun(gate) < number:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    let_go(gate)


def test_a_file_is_synced_and_what_fails_is_told(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x")

    async def scenario(syncs: FileSyncs, end: End) -> None:
        assert await syncs.sync(str(path), end) is None
        fd = os.open(path, os.O_RDONLY)
        assert await syncs.sync(str(path), end, fd=fd) is None
        os.close(fd)
        assert await syncs.sync(str(tmp_path / "none"), end) == "No such file or directory"

    run(scenario)


def test_one_that_hangs_is_left_behind_and_not_begun_again(gate: Path) -> None:
    async def scenario(syncs: FileSyncs, end: End) -> None:
        for _ in range(3):
            with pytest.raises(HostFailure, match="not synced within") as told:
                await syncs.sync("/disk", end)
            assert told.value.code == "disk_hangs"
        assert begun(gate) == 1
        # Another file is none of its business.
        with pytest.raises(HostFailure):
            await syncs.sync("/other", end)
        assert begun(gate) == 2
        let_go(gate, 2)

    run(scenario, timeout_s=0.3)


def test_once_it_has_ended_the_next_one_syncs_for_itself(gate: Path) -> None:
    async def scenario(syncs: FileSyncs, end: End) -> None:
        asked = [asyncio.create_task(syncs.sync("/disk", end)) for _ in range(2)]
        for count in (1, 2):
            await asyncio.to_thread(let_nth_go, gate, count)
        assert await asyncio.gather(*asked) == [None, None]
        assert begun(gate) == 2

    run(scenario)


def test_it_is_not_waited_for_when_the_vm_has_ended(gate: Path) -> None:
    async def scenario(syncs: FileSyncs, end: End) -> None:
        asyncio.get_running_loop().call_later(0.1, end.set_result, None)
        with pytest.raises(HostFailure) as told:
            await syncs.sync("/disk", end)
        assert told.value.code == "worker_gone"
        let_go(gate)

    run(scenario)
