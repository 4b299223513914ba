# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""VMs from create to delete, with workers that have no VM."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3

import pytest

from api.errors import Conflict, HostFailure, Invalid, NotFound, PreconditionFailed
from api.models.resources import Operation, OperationState
from api.models.vms import StopRequest, Vm, VmAction, VmPatch, VmState
from api.ports import Call
from daemon.supervisor.service import Supervisor
from tests.support.supervisor import CALL, Harness


def stopped(vm: Vm) -> bool:
    return vm.state is VmState.STOPPED


def crashed(vm: Vm) -> bool:
    return vm.state is VmState.CRASHED


def test_a_vm_is_created_started_and_deleted(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        vm = await harness.create("a")
        assert (vm.state, vm.pid, vm.version) == (VmState.STOPPED, None, 1)
        vm = await harness.act(VmAction.START)
        assert vm.state is VmState.RUNNING
        assert vm.pid is not None
        assert vm.started_at is not None
        await supervisor.delete_vm("a", True, CALL)
        with pytest.raises(NotFound):
            await supervisor.get_vm("a")
        assert await harness.event_types() == ["vm.created", "vm.started", "vm.deleted"]
        assert not harness.layout.vm_state(vm.id).exists()
        assert not harness.layout.vm_runtime(vm.id).exists()

    harness.run(scenario)
    assert harness.worker_pids() == []


def test_create_with_start_needs_two_commits(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        vm = await harness.start("a")
        assert vm.state is VmState.RUNNING
        assert vm.version == 2

    harness.run(scenario)


def test_the_boot_time_is_taken_over(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a", "booted")
        vm = await harness.until("a", lambda vm: vm.boot_time_us is not None)
        assert vm.boot_time_us == 4321
        assert "vm.booted" in await harness.event_types()

    harness.run(scenario)


def test_pause_and_resume(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a")
        assert (await harness.act(VmAction.PAUSE)).state is VmState.PAUSED
        assert (await harness.act(VmAction.RESUME)).state is VmState.RUNNING
        assert (await harness.event_types())[2:] == ["vm.paused", "vm.resumed"]

    harness.run(scenario)


def test_keys_that_the_guest_lost_are_refused(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a")
        assert (await harness.act(VmAction.CTRL_ALT_DEL)).state is VmState.RUNNING
        await harness.start("b", "ignore-keys")
        with pytest.raises(Conflict, match="VM b: ctrl_alt_del: the guest has not read") as refused:
            await harness.act(VmAction.CTRL_ALT_DEL, "b")
        assert (refused.value.code, refused.value.state) == ("guest_ignores_keys", "running")

    harness.run(scenario)


def test_a_guest_that_obeys_the_power_button_is_stopped_without_a_reason(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a")
        vm = await harness.act(VmAction.STOP)
        assert (vm.state, vm.reason, vm.pid) == (VmState.STOPPED, None, None)
        assert (await harness.event_types())[2:] == ["vm.stopping", "vm.stopped"]

    harness.run(scenario)


def test_a_deaf_guest_is_killed_after_its_time(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a", "ignore-button")
        vm = await harness.act(VmAction.STOP, stop=StopRequest(timeout_s=0.1))
        assert vm.state is VmState.STOPPED
        assert vm.reason is not None
        assert vm.reason.code == "stop_forced"

    harness.run(scenario)


def test_a_deaf_guest_runs_on_when_it_must_not_be_killed(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a", "ignore-button")
        with pytest.raises(HostFailure, match="did not power off within"):
            await harness.act(VmAction.STOP, stop=StopRequest(timeout_s=0.1, force=False))
        assert (await supervisor.get_vm("a")).state is VmState.RUNNING
        assert "vm.stop_failed" in await harness.event_types()

    harness.run(scenario)


def test_a_long_stop_becomes_an_operation_and_a_kill_ends_it(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a", "ignore-button")
        operation = await supervisor.act_on_vm(
            "a", VmAction.STOP, StopRequest(timeout_s=600.0), Call("test", wait_s=0.05)
        )
        assert isinstance(operation, Operation)
        assert (await supervisor.get_vm("a")).state is VmState.STOPPING
        with pytest.raises(Conflict) as caught:
            await harness.act(VmAction.PAUSE)
        assert (caught.value.state, caught.value.allowed) == ("stopping", ["kill"])
        assert (await harness.act(VmAction.KILL)).state is VmState.STOPPED
        done = await harness.finished(operation)
        assert done.state is OperationState.SUCCEEDED
        assert done.result is not None
        assert done.result["state"] == "stopped"

    harness.run(scenario)


def test_kill_stops_at_once_and_without_a_reason(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a", "ignore-button")
        vm = await harness.act(VmAction.KILL)
        assert (vm.state, vm.reason) == (VmState.STOPPED, None)

    harness.run(scenario)


def test_a_worker_killed_from_outside_is_told_with_its_signal(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        vm = await harness.start("a")
        assert vm.pid is not None
        os.kill(vm.pid, signal.SIGKILL)
        vm = await harness.until("a", crashed)
        assert vm.reason is not None
        assert (vm.reason.code, vm.reason.detail["signal"]) == ("worker_killed", "SIGKILL")
        assert vm.actions == [VmAction.START, VmAction.KILL]

    harness.run(scenario)


def test_a_worker_that_ends_by_itself_is_told_with_its_last_words(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a", "exit-3")
        vm = await harness.until("a", crashed)
        assert vm.reason is not None
        assert vm.reason.code == "worker_failed"
        assert vm.reason.detail["exit_status"] == 3
        assert "out of luck" in vm.reason.message

    harness.run(scenario)


def test_a_crashed_guest_keeps_its_worker_and_can_be_started_again(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a", "crashed")
        vm = await harness.until("a", crashed)
        assert vm.reason is not None
        assert (vm.reason.code, vm.reason.detail) == ("triple_fault", {"rip": 16})
        first_pid = vm.pid
        assert first_pid is not None
        await supervisor.patch_vm("a", VmPatch(cmdline=""), CALL)
        vm = await harness.act(VmAction.START)
        assert vm.state is VmState.RUNNING
        assert vm.reason is None
        assert vm.pid != first_pid

    harness.run(scenario)
    assert len(harness.worker_pids()) == 1


def test_a_panic_that_is_kept_leaves_the_vm_running_with_the_reason(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a", "panicked")
        vm = await harness.until("a", lambda vm: vm.reason is not None)
        assert vm.state is VmState.RUNNING
        assert "vm.panicked" in await harness.event_types()

    harness.run(scenario)


def test_a_reboot_of_the_guest_is_an_event(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a", "rebooted")
        await harness.until("a", lambda vm: vm.reason is not None)
        assert (await harness.event_types()).count("vm.reset") == 1

    harness.run(scenario)


def test_every_reset_is_an_event(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a")
        for _ in range(2):
            assert (await harness.act(VmAction.RESET)).state is VmState.RUNNING
        events = await supervisor.list_events(0, 100)
        assert [e.actor for e in events if e.type == "vm.reset"] == ["test", "test"]

    harness.run(scenario)


def test_a_refused_launch_leaves_a_stopped_vm_with_the_reason(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        with pytest.raises(HostFailure, match="no such luck"):
            await harness.start("a", "refuse-launch")
        vm = await supervisor.get_vm("a")
        assert vm.state is VmState.STOPPED
        assert vm.reason is not None
        assert vm.reason.code == "start_failed"

    harness.run(scenario)
    assert harness.worker_pids() == []


def test_a_worker_killed_while_starting_is_told(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        with pytest.raises(HostFailure, match="killed by SIGKILL"):
            await harness.start("a", "die-on-launch")
        vm = await supervisor.get_vm("a")
        assert vm.state is VmState.CRASHED
        assert vm.reason is not None
        assert vm.reason.code == "worker_killed"

    harness.run(scenario)


def test_a_worker_killed_while_pausing_is_told(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a", "die-on-pause")
        with pytest.raises(HostFailure, match="killed by SIGKILL"):
            await harness.act(VmAction.PAUSE)
        assert crashed(await harness.until("a", crashed))

    harness.run(scenario)


def test_a_start_can_be_killed(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.create("a", "hang-on-launch")
        operation = await supervisor.act_on_vm("a", VmAction.START, None, Call("test", wait_s=0.05))
        assert isinstance(operation, Operation)
        await harness.until("a", lambda vm: vm.state is VmState.STARTING)
        vm = await harness.act(VmAction.KILL)
        assert (vm.state, vm.reason) == (VmState.STOPPED, None)
        done = await harness.finished(operation)
        assert done.state is OperationState.FAILED
        assert done.error is not None
        assert done.error.code == "killed"

    harness.run(scenario)
    assert harness.worker_pids() == []


def test_a_wedged_worker_is_reported_and_not_killed(harness: Harness) -> None:
    harness.set(request_timeout_s=0.2)

    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a", "hang-on-pause")
        with pytest.raises(HostFailure, match=r"no answer to pause within 0\.2 s"):
            await harness.act(VmAction.PAUSE)
        vm = await supervisor.get_vm("a")
        assert vm.state is VmState.RUNNING
        assert vm.pid in harness.worker_pids()
        assert (await harness.act(VmAction.KILL)).state is VmState.STOPPED

    harness.run(scenario)


def test_two_starts_at_once_start_one_worker(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.create("a")
        results = await asyncio.gather(
            harness.act(VmAction.START), harness.act(VmAction.START), return_exceptions=True
        )
        assert sorted(type(result).__name__ for result in results) == ["Conflict", "Vm"]

    harness.run(scenario)
    assert len(harness.worker_pids()) == 1


def test_many_vms_start_at_once(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.kernel()
        vms = await asyncio.gather(*(harness.start(f"vm-{number}") for number in range(20)))
        assert len({vm.pid for vm in vms}) == 20

    harness.run(scenario)


def test_a_change_of_a_version_that_has_passed_is_refused(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        vm = await harness.create("a")
        call = Call("test", wait_s=30.0, if_match=vm.version)
        await supervisor.patch_vm("a", VmPatch(labels={"env": "test"}), call)
        for attempt in (
            supervisor.patch_vm("a", VmPatch(labels={}), call),
            supervisor.act_on_vm("a", VmAction.START, None, call),
            supervisor.delete_vm("a", False, call),
        ):
            with pytest.raises(PreconditionFailed, match="has version 2, not 1"):
                await attempt

    harness.run(scenario)


def test_a_running_vm_is_deleted_only_with_force(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a")
        with pytest.raises(Conflict, match="delete with force"):
            await supervisor.delete_vm("a", False, CALL)
        assert await supervisor.delete_vm("a", True, CALL) is None

    harness.run(scenario)
    assert harness.worker_pids() == []


def test_a_client_that_goes_away_does_not_stop_its_job(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.create("a")
        request = asyncio.create_task(harness.act(VmAction.START))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        request.cancel()
        vm = await harness.until("a", lambda vm: vm.state is VmState.RUNNING)
        assert vm.pid is not None

    harness.run(scenario)


def test_a_dead_zygote_is_replaced_and_its_workers_live_on(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        before = await harness.start("a")
        old_pid = harness.zygote.pid
        os.kill(old_pid, signal.SIGKILL)
        after = await harness.start("b")
        assert after.state is VmState.RUNNING
        assert harness.zygote.pid != old_pid
        assert (await harness.act(VmAction.PAUSE, "a")).pid == before.pid

    harness.run(scenario)


def test_without_kvm_nothing_is_left_behind(harness: Harness) -> None:
    harness.set(kvm_device=str(harness.path / "no-kvm"))

    async def scenario(supervisor: Supervisor) -> None:
        with pytest.raises(HostFailure, match="modprobe kvm_intel"):
            await harness.start("a")
        with pytest.raises(NotFound):
            await supervisor.get_vm("a")
        assert (await harness.create("a")).state is VmState.STOPPED

    harness.run(scenario)


def test_a_kvm_without_permission_says_how_to_get_it(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, flags: int) -> int:
        raise PermissionError(13, "Permission denied", path)

    async def scenario(supervisor: Supervisor) -> None:
        await harness.create("a")
        monkeypatch.setattr("daemon.supervisor.launch.os.open", refuse)
        with pytest.raises(HostFailure, match="usermod -a -G kvm"):
            await harness.act(VmAction.START)
        monkeypatch.undo()
        assert (await supervisor.get_vm("a")).state is VmState.STOPPED

    harness.run(scenario)


def test_a_worker_that_hangs_up_and_lives_is_connected_to_again(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        vm = await harness.start("a", "hang-up-on-stats")
        with pytest.raises(HostFailure) as caught:
            await supervisor.vm_stats("a")
        assert caught.value.code == "worker_gone"
        async with asyncio.timeout(20):
            while True:
                with contextlib.suppress(HostFailure):
                    await supervisor.vm_stats("a")
                    break
                await asyncio.sleep(0.01)
        assert (await supervisor.get_vm("a")).pid == vm.pid
        assert (await harness.act(VmAction.STOP)).state is VmState.STOPPED

    harness.run(scenario)


def test_a_request_right_behind_a_hang_up_waits_for_the_next_connection(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a", "hang-up-on-stats")
        worker = supervisor._table.get("a").worker
        assert worker is not None
        first = asyncio.create_task(supervisor.vm_stats("a"))
        async with asyncio.timeout(20):
            while worker.unreachable is None:  # noqa: ASYNC110 - no event tells it
                await asyncio.sleep(0)
        assert (await supervisor.vm_stats("a")).vcpu_exits == {"hlt": 1}
        with pytest.raises(HostFailure):
            await first

    harness.run(scenario)


def test_an_id_wins_over_an_old_name_that_is_the_same(
    harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    ids: dict[str, str] = {}

    async def first(_: Supervisor) -> None:
        ids.update({name: (await harness.create(name)).id for name in ("a", "b")})

    async def second(supervisor: Supervisor) -> None:
        assert "rename it" in caplog.text
        assert (await supervisor.get_vm(ids["a"])).name == "a"
        twin = await supervisor.get_vm(ids["b"])
        assert twin.name == ids["a"]
        renamed = await supervisor.patch_vm(ids["b"], VmPatch(name="b"), CALL)
        assert (await supervisor.get_vm("b")).id == renamed.id == ids["b"]

    harness.run(first)
    with contextlib.closing(sqlite3.connect(harness.layout.database)) as db, db:
        db.execute(
            "UPDATE vms SET name = ?1, doc = json_set(doc, '$.name', ?1) WHERE id = ?2",
            (ids["a"], ids["b"]),
        )
    harness.run(second)


def test_a_stop_that_meets_a_hang_up_leaves_the_guest_running(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a", "hang-up-on-power_button")
        with pytest.raises(HostFailure, match="power button cannot be pressed"):
            await harness.act(VmAction.STOP, stop=StopRequest(timeout_s=60, force=False))
        assert (await supervisor.get_vm("a")).state is VmState.RUNNING

    harness.run(scenario)


def test_many_requests_for_counters_are_all_answered(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a")
        stats = await asyncio.gather(*(supervisor.vm_stats("a") for _ in range(300)))
        assert {one.console_dropped_bytes for one in stats} == {7}

    harness.run(scenario)


def test_a_reason_that_is_no_text_can_be_shown(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a", "surrogate")
        vm = await harness.until("a", lambda vm: vm.reason is not None)
        assert vm.reason is not None
        assert vm.reason.message == "?"
        assert vm.model_dump_json()

    harness.run(scenario)


def test_counters_of_the_wrong_type_are_the_workers_failure(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a", "bad-stats")
        with pytest.raises(HostFailure) as caught:
            await supervisor.vm_stats("a")
        assert caught.value.code == "worker_protocol"
        assert b"hostel_scrape_failures 1.0" in await supervisor.metrics()

    harness.run(scenario)


@pytest.mark.parametrize("is_link", [False, True])
def test_a_disk_within_hostelds_own_directory_is_refused(harness: Harness, is_link: bool) -> None:
    async def scenario(_: Supervisor) -> None:
        path = harness.layout.database
        if is_link:
            path = harness.path / "link"
            path.symlink_to(harness.layout.database)
        with pytest.raises(Invalid) as caught:
            await harness.create("a", disks=[{"id": "root", "path": str(path)}])
        assert caught.value.code == "disk_in_state_dir"

    harness.run(scenario)


def test_a_change_that_a_stop_under_way_forbids_is_refused_at_once(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a", "ignore-button")
        stop = StopRequest(timeout_s=600, force=False)
        await supervisor.act_on_vm("a", VmAction.STOP, stop, Call("test", wait_s=0))
        await harness.until("a", lambda vm: vm.state is VmState.STOPPING)
        with pytest.raises(Conflict):
            await supervisor.patch_vm("a", VmPatch(vcpus=2), CALL)
        await harness.act(VmAction.KILL)

    harness.run(scenario)
