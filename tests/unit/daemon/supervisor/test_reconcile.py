# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A supervisor that finds what an earlier one has left."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sqlite3
import subprocess

import pytest

from api.errors import NotFound
from api.models.vms import VmAction, VmState
from daemon.supervisor.service import Supervisor
from tests.support.supervisor import CALL, Harness


async def nothing(_: Supervisor) -> None:
    """A life in which nothing happens."""


def rewrite(harness: Harness, sql: str, *params: object) -> None:
    """Change the database while no supervisor runs, as one that was killed would have left it."""
    with contextlib.closing(sqlite3.connect(harness.layout.database)) as db, db:
        db.execute(sql, params)


def set_state(harness: Harness, state: str) -> None:
    rewrite(harness, "UPDATE vms SET state = ?1, doc = json_set(doc, '$.state', ?1)", state)


def start_one(harness: Harness, *moods: str) -> int:
    """Start VM a in a first life, and return its worker's pid."""
    pids: list[int] = []

    async def first(_: Supervisor) -> None:
        vm = await harness.start("a", *moods)
        assert vm.pid is not None
        pids.append(vm.pid)

    harness.run(first)
    return pids[0]


def end(pid: int) -> None:
    """Kill a worker and wait until the kernel has let go of it."""
    pidfd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    poller.poll(10_000)
    os.close(pidfd)


def test_a_running_vm_is_adopted(harness: Harness) -> None:
    pid = start_one(harness)

    async def second(supervisor: Supervisor) -> None:
        assert harness.report.adopted == ["a"]
        vm = await supervisor.get_vm("a")
        assert (vm.state, vm.pid) == (VmState.RUNNING, pid)
        assert (await harness.act(VmAction.PAUSE)).state is VmState.PAUSED

    harness.run(second)

    async def third(supervisor: Supervisor) -> None:
        assert (await supervisor.get_vm("a")).state is VmState.PAUSED
        assert (await harness.act(VmAction.RESUME)).state is VmState.RUNNING
        assert (await harness.act(VmAction.STOP)).state is VmState.STOPPED

    harness.run(third)
    assert harness.worker_pids() == []


def test_the_death_of_an_adopted_worker_is_noticed(harness: Harness) -> None:
    pid = start_one(harness)

    async def second(supervisor: Supervisor) -> None:
        os.kill(pid, signal.SIGKILL)
        vm = await harness.until("a", lambda vm: vm.state is VmState.CRASHED)
        assert vm.reason is not None
        # By its signal where the kernel tells it (Linux 6.15), without one elsewhere.
        assert vm.reason.code in ("worker_killed", "worker_lost")

    harness.run(second)


def test_a_crash_that_nobody_saw_is_adopted_with_its_reason(harness: Harness) -> None:
    start_one(harness, "crashed")
    set_state(harness, "running")

    async def second(supervisor: Supervisor) -> None:
        vm = await supervisor.get_vm("a")
        assert vm.state is VmState.CRASHED
        assert vm.reason is not None
        assert vm.reason.code == "triple_fault"

    harness.run(second)


def test_a_worker_that_died_meanwhile_is_told(harness: Harness) -> None:
    end(start_one(harness))

    async def second(supervisor: Supervisor) -> None:
        vm = await supervisor.get_vm("a")
        assert vm.state is VmState.CRASHED
        assert vm.reason is not None
        assert vm.reason.code == "worker_lost"
        assert not harness.layout.vm_runtime(vm.id).exists()

    harness.run(second)


def test_last_words_tell_of_a_guest_that_powered_off_meanwhile(harness: Harness) -> None:
    pid = start_one(harness)
    (runtime,) = (harness.layout.runtime / "vms").iterdir()
    words = f'{{"state":"stopped","vm_id":"x","pid":{pid},'
    words += '"reason":{"code":"guest_poweroff","message":"off","detail":{}}}'
    (runtime / "last_words").write_text(words)
    end(pid)

    async def second(supervisor: Supervisor) -> None:
        vm = await supervisor.get_vm("a")
        assert vm.state is VmState.STOPPED
        assert vm.reason is not None
        assert vm.reason.code == "guest_poweroff"

    harness.run(second)


def test_after_a_restart_of_the_host_a_running_vm_is_stopped_and_says_why(
    harness: Harness,
) -> None:
    end(start_one(harness))
    shutil.rmtree(harness.layout.runtime)
    rewrite(harness, "UPDATE meta SET value = 'another boot' WHERE key = 'boot_id'")

    async def second(supervisor: Supervisor) -> None:
        vm = await supervisor.get_vm("a")
        assert vm.state is VmState.STOPPED
        assert vm.reason is not None
        assert vm.reason.code == "host_restarted"

    harness.run(second)


@pytest.mark.parametrize("state", ["starting", "stopping"])
def test_a_vm_on_its_way_is_taken_for_what_its_worker_says(harness: Harness, state: str) -> None:
    pid = start_one(harness)
    set_state(harness, state)

    async def second(supervisor: Supervisor) -> None:
        vm = await supervisor.get_vm("a")
        assert (vm.state, vm.pid) == (VmState.RUNNING, pid)

    harness.run(second)


def test_a_start_without_a_worker_is_undone(harness: Harness) -> None:
    end(start_one(harness))
    set_state(harness, "starting")

    async def second(supervisor: Supervisor) -> None:
        vm = await supervisor.get_vm("a")
        assert vm.state is VmState.STOPPED
        assert vm.reason is not None
        assert vm.reason.code == "start_interrupted"
        assert (await harness.act(VmAction.START)).state is VmState.RUNNING

    harness.run(second)


def test_a_worker_of_a_stopped_vm_is_ended(harness: Harness) -> None:
    start_one(harness)
    set_state(harness, "stopped")

    async def second(supervisor: Supervisor) -> None:
        assert harness.report.leftovers == ["a"]
        vm = await supervisor.get_vm("a")
        assert (vm.state, vm.pid) == (VmState.STOPPED, None)

    harness.run(second)
    assert harness.worker_pids() == []


@pytest.mark.parametrize("has_disk", [False, True])
def test_a_worker_without_vm_is_ended_and_its_disks_stay(harness: Harness, has_disk: bool) -> None:
    start_one(harness)
    rewrite(harness, "DELETE FROM vms")
    (state,) = (harness.layout.state / "vms").iterdir()
    if has_disk:
        (state / "disks").mkdir()
    harness.run(nothing)
    assert harness.report.leftovers == [state.name]
    assert harness.worker_pids() == []
    assert state.exists() == has_disk


def test_a_delete_is_finished(harness: Harness) -> None:
    start_one(harness)
    set_state(harness, "deleting")

    async def second(supervisor: Supervisor) -> None:
        assert harness.report.finished == ["a"]
        with pytest.raises(NotFound):
            await supervisor.get_vm("a")
        assert (await harness.event_types())[-1] == "vm.deleted"

    harness.run(second)
    assert harness.worker_pids() == []
    assert list((harness.layout.state / "vms").iterdir()) == []


def test_a_creation_is_rolled_back(harness: Harness) -> None:
    async def first(_: Supervisor) -> None:
        await harness.image("base")
        await harness.create("a", disks=[{"id": "root", "image": "base"}])

    harness.run(first)
    set_state(harness, "creating")

    async def second(_: Supervisor) -> None:
        assert (await harness.event_types())[-1] == "vm.create_failed"
        await harness.create("a")

    harness.run(second)
    assert list((harness.layout.state / "vms").iterdir()) == []


def test_a_silent_worker_is_reported_kept_and_taken_back(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemon.supervisor.reconcile.STATUS_TIMEOUT_S", 0.2)
    monkeypatch.setattr("daemon.supervisor.reconcile.PROBE_INTERVAL_S", 0.05)
    pid = start_one(harness)
    os.kill(pid, signal.SIGSTOP)

    async def second(supervisor: Supervisor) -> None:
        assert harness.report.silent == ["a"]
        vm = await supervisor.get_vm("a")
        assert (vm.state, vm.pid) == (VmState.RUNNING, pid)
        assert vm.reason is not None
        assert vm.reason.code == "worker_unresponsive"
        os.kill(pid, signal.SIGCONT)
        await harness.until("a", lambda vm: vm.reason is None)
        assert (await harness.act(VmAction.PAUSE)).state is VmState.PAUSED

    harness.run(second)


def test_a_silent_worker_can_be_killed(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daemon.supervisor.reconcile.STATUS_TIMEOUT_S", 0.2)
    os.kill(start_one(harness), signal.SIGSTOP)

    async def second(supervisor: Supervisor) -> None:
        assert (await harness.act(VmAction.KILL)).state is VmState.STOPPED
        await supervisor.delete_vm("a", False, CALL)

    harness.run(second)
    assert harness.worker_pids() == []


def test_an_operation_that_was_running_has_failed(harness: Harness) -> None:
    harness.run(nothing)
    doc = (
        '{"id":"op","kind":"vm.stop","object":{"kind":"vm","id":"x","name":"a"},"state":"running",'
        '"progress":null,"result":null,"error":null,"log":[],"may_cancel":true,'
        '"created_at":"2024-01-01T00:00:00Z","finished_at":null}'
    )
    rewrite(harness, "INSERT INTO operations (id, doc) VALUES ('op', ?)", doc)

    async def second(supervisor: Supervisor) -> None:
        operation = await supervisor.get_operation("op", 0)
        assert operation.state.value == "failed"
        assert operation.error is not None
        assert operation.error.code == "daemon_restarted"

    harness.run(second)


def test_a_guest_whose_files_were_removed_is_kept_told_of_and_can_be_deleted(
    harness: Harness,
) -> None:
    pid = start_one(harness)
    shutil.rmtree(harness.layout.runtime)

    async def second(supervisor: Supervisor) -> None:
        vm = await supervisor.get_vm("a")
        assert (vm.state, vm.pid) == (VmState.RUNNING, pid)
        assert vm.reason is not None
        assert "cannot be reached" in vm.reason.message
        assert "No such file" in vm.reason.message
        await supervisor.delete_vm("a", True, CALL)

    harness.run(second)
    assert harness.worker_pids() == []


def bystander() -> subprocess.Popen[bytes]:
    """A process that has nothing to do with it."""
    return subprocess.Popen(["sleep", "600"])


def test_a_worker_that_names_another_process_gets_only_itself_killed(harness: Harness) -> None:
    with bystander() as other:
        try:
            pid = start_one(harness, f"lie={other.pid}")

            async def second(supervisor: Supervisor) -> None:
                vm = await supervisor.get_vm("a")
                assert (vm.state, vm.pid) == (VmState.RUNNING, pid)
                assert vm.reason is not None
                assert f"process {other.pid} answers" in vm.reason.message
                await harness.act(VmAction.KILL)

            harness.run(second)
            assert harness.worker_pids() == []
            assert other.poll() is None
        finally:
            other.kill()


def test_a_process_that_only_a_worker_names_is_never_killed(harness: Harness) -> None:
    with bystander() as other:
        try:
            start_one(harness, f"lie={other.pid}")
            rewrite(harness, "DELETE FROM vms")
            harness.run(nothing)
            # It was asked to quit, and did.
            assert harness.worker_pids() == []
            assert other.poll() is None
        finally:
            other.kill()


def test_a_worker_without_a_known_identity_is_adopted_and_ended_in_good_order(
    harness: Harness,
) -> None:
    pid = start_one(harness)
    rewrite(harness, "UPDATE vms SET doc = json_set(doc, '$.worker', json('null'))")

    async def second(supervisor: Supervisor) -> None:
        vm = await supervisor.get_vm("a")
        assert (vm.state, vm.pid) == (VmState.RUNNING, pid)
        assert (await harness.act(VmAction.KILL)).state is VmState.STOPPED

    harness.run(second)
    assert harness.worker_pids() == []
