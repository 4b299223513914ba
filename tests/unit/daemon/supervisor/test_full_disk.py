# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A state directory that is full, and has room again."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from api.errors import NoSpace, NotFound
from api.models.vms import VmAction, VmPatch, VmState
from daemon.supervisor import dirs, vm_table
from daemon.supervisor.service import Supervisor
from tests.support.supervisor import CALL, Harness


@pytest.fixture
def small(harness: Harness) -> Iterator[Harness]:
    """A harness whose state directory is a file system of 4 MiB."""
    mount, state = shutil.which("mount"), harness.layout.state
    if os.geteuid() != 0 or mount is None:
        pytest.skip("mounting a tmpfs needs root")
    state.mkdir()
    options = ["-t", "tmpfs", "-o", "size=4M,mode=700", "none"]
    if subprocess.run([mount, *options, state], check=False).returncode != 0:
        pytest.skip("this process may not mount")
    try:
        yield harness
    finally:
        harness.end()
        subprocess.run(["umount", "-l", state], check=True)


def fill(directory: Path) -> Path:
    """Fill a file system to the last byte."""
    ballast = directory / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return ballast


def use_up_log(harness: Harness) -> None:
    """SQLite reuses the space of its log: shorten that, so that the next commit needs new space."""
    import sqlite3

    with contextlib.closing(sqlite3.connect(harness.layout.database)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def test_what_is_asked_on_a_full_disk_is_refused_and_changes_nothing(small: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        before = await small.create("a")
        use_up_log(small)
        ballast = fill(small.layout.state)
        with pytest.raises(NoSpace, match="the file system is full"):
            await small.create("b")
        with pytest.raises(NoSpace):
            await supervisor.patch_vm("a", VmPatch(vcpus=2), CALL)
        with pytest.raises(NoSpace):
            await small.act(VmAction.START)
        assert await supervisor.get_vm("a") == before
        with pytest.raises(NotFound):
            await supervisor.get_vm("b")
        ballast.unlink()
        await small.create("b")
        assert (await small.act(VmAction.START)).state is VmState.RUNNING

    small.run(scenario)


def test_a_delete_works_on_a_full_disk(small: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await small.create("a")
        use_up_log(small)
        fill(small.layout.state)
        assert await supervisor.delete_vm("a", False, CALL) is None

    small.run(scenario)


def test_what_happens_on_a_full_disk_is_shown_and_kept_later(
    small: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vm_table, "RETRY_S", 0.05)

    async def first(supervisor: Supervisor) -> None:
        await small.start("a")
        use_up_log(small)
        ballast = fill(small.layout.state)
        assert (await small.act(VmAction.PAUSE)).state is VmState.PAUSED
        assert (await small.act(VmAction.KILL)).state is VmState.STOPPED
        known = await supervisor.list_events(0, 100)
        news = supervisor.follow_events(known[-1].id)
        ballast.unlink()
        assert [(await anext(news)).type for _ in range(2)] == ["vm.paused", "vm.stopped"]

    async def second(supervisor: Supervisor) -> None:
        assert (await supervisor.get_vm("a")).state is VmState.STOPPED

    small.run(first)
    small.run(second)


def test_a_state_directory_without_room_for_the_reserve_still_works(
    small: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dirs.Reserve, "SIZE_BYTES", 1 << 30)

    async def scenario(supervisor: Supervisor) -> None:
        await small.create("a")
        await supervisor.delete_vm("a", False, CALL)
        assert not (small.layout.state / "reserve").exists()

    small.run(scenario)
