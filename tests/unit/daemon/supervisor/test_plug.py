# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Devices that come and go, with workers that have no VM; and what a killed hosteld leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from api.errors import Conflict, HostFailure, Invalid, NoSpace, NotFound
from api.models.resources import Operation
from api.models.vms import DiskCreate, NicCreate, Vm, VmAction, VmState
from api.ports import Call, DetachQuery
from daemon.protocol import DISK_SLOTS, NIC_SLOTS
from daemon.supervisor.records import VmRecord
from daemon.supervisor.service import Supervisor
from daemon.supervisor.store import StoreFull
from tests.support.hostel import is_locked
from tests.support.supervisor import CALL, Harness

SOON = DetachQuery(timeout_s=0.05)
FORCE = DetachQuery(force=True)


@pytest.fixture
def path(harness: Harness) -> Path:
    path = harness.path / "data.raw"
    path.write_bytes(bytes(4096))
    return path


def disk(path: Path, name: str = "data", **options: Any) -> DiskCreate:  # noqa: ANN401
    return DiskCreate(id=name, path=str(path), **options)


async def attach(supervisor: Supervisor, wanted: DiskCreate | NicCreate) -> Vm:
    vm = await supervisor.attach("a", wanted, CALL)
    assert isinstance(vm, Vm)
    return vm


async def detach(supervisor: Supervisor, name: str = "data", how: DetachQuery = SOON) -> Vm:
    vm = await supervisor.detach("a", ("disk", name), how, CALL)
    assert isinstance(vm, Vm)
    return vm


def record_of(supervisor: Supervisor) -> VmRecord:
    return supervisor._table.get("a").record


def worker_has(supervisor: Supervisor) -> tuple[str, ...] | None:
    worker = supervisor._table.get("a").worker
    assert worker is not None
    assert worker.status is not None
    return worker.status.devices


def own_files(harness: Harness, vm: Vm) -> list[str]:
    disks = harness.layout.vm_state(vm.id) / "disks"
    return sorted(path.name for path in disks.iterdir()) if disks.exists() else []


async def nothing(_: Supervisor) -> None:
    """A life in which nothing happens."""


def test_a_disk_comes_to_a_running_vm_and_goes(harness: Harness, path: Path) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a")
        vm = await attach(supervisor, disk(path))
        assert [found.id for found in vm.disks] == ["data"]
        assert worker_has(supervisor) == ("data",)
        assert is_locked(path)
        assert (await detach(supervisor)).disks == []
        assert worker_has(supervisor) == ()
        types = await harness.event_types()
        assert types[-2:] == ["vm.disk_attached", "vm.disk_detached"]

    harness.run(scenario)
    assert path.exists()


def test_a_disk_of_a_vm_at_rest_is_a_matter_of_its_record(harness: Harness, path: Path) -> None:
    async def first(supervisor: Supervisor) -> None:
        await harness.create("a")
        await attach(supervisor, disk(path))
        assert not is_locked(path)

    async def second(supervisor: Supervisor) -> None:
        assert [found.id for found in (await harness.act(VmAction.START)).disks] == ["data"]
        assert worker_has(supervisor) == ("data",)
        await harness.act(VmAction.STOP)
        assert (await detach(supervisor)).disks == []

    harness.run(first)
    harness.run(second)


def test_an_attached_disk_is_there_after_a_restart_of_the_vm(harness: Harness, path: Path) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a")
        await attach(supervisor, disk(path))
        await harness.act(VmAction.STOP)
        await harness.act(VmAction.START)
        assert worker_has(supervisor) == ("data",)

    harness.run(scenario)


@pytest.mark.parametrize("start", [True, False])
def test_a_copy_of_an_image_comes_and_is_deleted_with_its_disk(
    harness: Harness, start: bool
) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.image("i", 4096)
        await harness.create("a", start=start)
        vm = await attach(supervisor, DiskCreate(id="data", image="i", size_mib=1))
        assert os.stat(vm.disks[0].path).st_size == vm.disks[0].size_bytes == 1 << 20  # noqa: PTH116
        assert own_files(harness, vm) == [Path(vm.disks[0].path).name]
        again = await attach(supervisor, DiskCreate(id="more", image="i"))
        assert len(own_files(harness, again)) == 2
        await detach(supervisor)
        assert own_files(harness, vm) == [Path(again.disks[1].path).name]
        assert record_of(supervisor).doomed == ()

    harness.run(scenario)


def test_slots_stay_with_their_devices(harness: Harness, path: Path) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.create("a", disks=[{"id": "root", "path": str(path), "read_only": True}])
        for name in ("b", "c"):
            await attach(supervisor, disk(path, name, read_only=True))
        await detach(supervisor, "b")
        await attach(supervisor, disk(path, "d", read_only=True))
        slots = {found.id: found.slot for found in record_of(supervisor).disks}
        assert slots == {"root": 1, "c": 3, "d": 2}

    harness.run(scenario)


@pytest.mark.parametrize("force", [False, True])
def test_a_guest_that_does_not_let_go_keeps_its_disk_unless_forced(
    harness: Harness, path: Path, force: bool
) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a", "keep-devices")
        await attach(supervisor, disk(path))
        if force:
            assert (await detach(supervisor, how=FORCE)).disks == []
            return
        with pytest.raises(Conflict, match="force") as caught:
            await detach(supervisor)
        assert (caught.value.code, caught.value.state) == ("guest_keeps_device", "running")
        assert [found.id for found in (await supervisor.get_vm("a")).disks] == ["data"]

    harness.run(scenario)


def test_a_guest_that_lets_go_in_the_last_moment_has_let_go(harness: Harness, path: Path) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a", "late-eject")
        await attach(supervisor, disk(path))
        assert (await detach(supervisor)).disks == []

    harness.run(scenario)


def test_what_the_worker_refuses_changes_nothing(harness: Harness, path: Path) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.image("i", 4096)
        await harness.start("a", "refuse-attach")
        for wanted in (disk(path), DiskCreate(id="data", image="i")):
            with pytest.raises(HostFailure, match="no such luck"):
                await attach(supervisor, wanted)
        vm = await supervisor.get_vm("a")
        assert (vm.disks, own_files(harness, vm)) == ([], [])
        assert not is_locked(path)

    harness.run(scenario)


def test_an_attach_that_was_given_up_on_is_undone(harness: Harness, path: Path) -> None:
    harness.set(request_timeout_s=0.3)

    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a", "mute-attach")
        with pytest.raises(HostFailure, match="no answer"):
            await attach(supervisor, disk(path))
        assert (await supervisor.get_vm("a")).disks == []
        async with asyncio.timeout(20):
            while worker_has(supervisor) != ():  # noqa: ASYNC110 - no event tells it
                await asyncio.sleep(0.01)

    harness.run(scenario)


def test_a_worker_that_dies_over_it_leaves_nothing_half_done(harness: Harness, path: Path) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a", "die-on-attach")
        with pytest.raises(HostFailure):
            await attach(supervisor, disk(path))
        await harness.until("a", lambda vm: vm.state is VmState.CRASHED)
        assert (await supervisor.get_vm("a")).disks == []

    harness.run(scenario)


def test_a_guest_that_ends_meanwhile_has_let_go(harness: Harness, path: Path) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a", "keep-devices")
        await attach(supervisor, disk(path))
        detaching = asyncio.create_task(detach(supervisor, how=DetachQuery(timeout_s=60)))
        await asyncio.sleep(0.1)
        await harness.act(VmAction.KILL)
        assert (await detaching).disks == []
        assert (await supervisor.get_vm("a")).state is VmState.STOPPED

    harness.run(scenario)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"name": "root"}, "device_taken"),
        ({"name": "net0"}, "device_taken"),
        ({"name": "rng0"}, "device_taken"),
        ({"path": "/nowhere"}, "disk_missing"),
        ({"path": "/"}, "disk_kind"),
        ({}, "disk_twice"),
    ],
)
def test_a_disk_that_cannot_be_is_refused(
    harness: Harness, path: Path, options: dict[str, Any], code: str
) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.create(
            "a", disks=[{"id": "root", "path": str(path)}], nics=[{"id": "net0", "tap": "ht-n0"}]
        )
        wanted = DiskCreate(id=options.get("name", "data"), path=options.get("path", str(path)))
        with pytest.raises((Conflict, Invalid)) as caught:
            await attach(supervisor, wanted)
        assert caught.value.code == code
        assert caught.value.field in ("path", "id")
        assert record_of(supervisor).version == 1

    harness.run(scenario)


def test_a_disk_in_use_is_refused(harness: Harness, path: Path) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("b", disks=[{"id": "root", "path": str(path)}])
        await harness.start("a")
        with pytest.raises(Conflict) as caught:
            await attach(supervisor, disk(path))
        assert (caught.value.code, caught.value.field) == ("disk_in_use", "path")
        assert (await supervisor.get_vm("a")).disks == []

    harness.run(scenario)


def test_there_is_an_end_to_disks(harness: Harness, path: Path) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.create("a")
        for number in range(len(DISK_SLOTS)):
            await attach(supervisor, disk(path, f"d{number}", read_only=True))
        with pytest.raises(Conflict) as caught:
            await attach(supervisor, disk(path, "more", read_only=True))
        assert caught.value.code == "too_many_devices"

    harness.run(scenario)


def test_a_paused_vm_is_left_alone(harness: Harness, path: Path) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a")
        await attach(supervisor, disk(path))
        await harness.act(VmAction.PAUSE)
        with pytest.raises(Conflict, match="while it is running or at rest") as caught:
            await detach(supervisor)
        assert caught.value.allowed == ["stopped", "running", "crashed"]

    harness.run(scenario)


def test_an_old_worker_cannot_and_says_so(harness: Harness, path: Path) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a", "old-worker", disks=[{"id": "data", "path": str(path)}])
        with pytest.raises(Conflict, match="stop it and start it again"):
            await detach(supervisor)
        with pytest.raises(Conflict, match="stop it and start it again"):
            await attach(supervisor, NicCreate(id="net0", tap="ht-n0"))
        assert len((await supervisor.get_vm("a")).disks) == 1

    harness.run(scenario)


def test_a_device_that_is_not_there_is_not_found(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.create("a")
        for kind in ("disk", "nic"):
            with pytest.raises(NotFound) as caught:
                await supervisor.detach("a", (kind, "x"), SOON, CALL)
            assert caught.value.code == f"{kind}_not_found"

    harness.run(scenario)


def test_nics_get_taps_of_their_own(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        vm = await harness.create("a", nics=[{"id": "net0"}, {"id": "net1"}])
        await supervisor.detach("a", ("nic", "net0"), SOON, CALL)
        await attach(supervisor, NicCreate(id="net2"))
        vm = await attach(supervisor, NicCreate(id="net3"))
        assert [nic.tap[-2:] for nic in vm.nics] == ["n1", "n0", "n2"]
        slots = [nic.slot for nic in record_of(supervisor).nics]
        assert slots == [NIC_SLOTS[1], NIC_SLOTS[0], NIC_SLOTS[2]]

    harness.run(scenario)


def test_a_full_state_directory_changes_nothing(
    harness: Harness, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.create("a")

        async def full(*_: object, **__: object) -> None:
            raise StoreFull("no space")

        with monkeypatch.context() as patched:
            patched.setattr(supervisor._store, "commit", full)
            with pytest.raises(NoSpace):
                await attach(supervisor, disk(path))
        assert (await supervisor.get_vm("a")).disks == []

    harness.run(scenario)


def test_a_cancelled_copy_leaves_nothing(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(*_: object, cancelled: Any, **__: object) -> None:  # noqa: ANN401
        from daemon.images.errors import Cancelled

        while not cancelled():
            pass
        raise Cancelled

    async def scenario(supervisor: Supervisor) -> None:
        await harness.image("i", 4096)
        await harness.start("a")
        monkeypatch.setattr("daemon.supervisor.vm_make.clone_disk", endless)
        wanted = DiskCreate(id="data", image="i")
        operation = await supervisor.attach("a", wanted, Call("test", wait_s=0.05))
        assert isinstance(operation, Operation)
        await supervisor.cancel_operation(operation.id, CALL)
        assert (await harness.finished(operation)).state.value == "cancelled"
        vm = await supervisor.get_vm("a")
        assert (vm.disks, own_files(harness, vm)) == ([], [])
        assert record_of(supervisor).doomed == ()

    harness.run(scenario)


# --- what a hosteld that was killed leaves behind


def rewrite(harness: Harness, sql: str, *params: str) -> None:
    with contextlib.closing(sqlite3.connect(harness.layout.database)) as db, db:
        db.execute(sql, params)


def test_a_copy_that_a_killed_hosteld_was_making_is_removed(harness: Harness) -> None:
    ids: list[str] = []

    async def first(_: Supervisor) -> None:
        ids.append((await harness.start("a")).id)

    async def second(supervisor: Supervisor) -> None:
        vm = await supervisor.get_vm("a")
        assert (vm.state, vm.disks, own_files(harness, vm)) == (VmState.RUNNING, [], [])
        assert record_of(supervisor).doomed == ()

    harness.run(first)
    disks = harness.layout.vm_state(ids[0]) / "disks"
    (disks / ".staging-dead").mkdir(parents=True)
    (disks / ".staging-dead" / "data-1.raw").touch()
    (disks / "data-1.raw").touch()
    doomed = json.dumps([str(disks / "data-1.raw")])
    rewrite(harness, "UPDATE vms SET doc = json_set(doc, '$.doomed', json(?))", doomed)
    harness.run(second)


@pytest.mark.parametrize("is_own", [True, False])
def test_a_disk_that_the_worker_never_got_or_has_given_back_leaves_the_record(
    harness: Harness, path: Path, is_own: bool
) -> None:
    """hosteld was killed between a disk's commit and its attach, or its detach and the commit."""
    ids: list[str] = []

    async def first(_: Supervisor) -> None:
        ids.append((await harness.start("a")).id)

    async def second(supervisor: Supervisor) -> None:
        vm = await supervisor.get_vm("a")
        assert (vm.state, vm.disks, own_files(harness, vm)) == (VmState.RUNNING, [], [])
        assert "vm.disk_detached" in await harness.event_types()

    harness.run(first)
    own = harness.layout.vm_state(ids[0]) / "disks" / "data-1.raw"
    own.parent.mkdir()
    if is_own:
        own.touch()
    lost: dict[str, object] = {"id": "data", "path": str(own if is_own else path), "image_id": None}
    lost |= {"is_own": is_own, "read_only": False, "size_bytes": 4096}
    rewrite(harness, "UPDATE vms SET doc = json_set(doc, '$.disks', json(?))", json.dumps([lost]))
    harness.run(second)
    assert path.exists()


def test_only_the_vms_own_files_are_removed(harness: Harness, path: Path) -> None:
    async def first(_: Supervisor) -> None:
        await harness.image("i", 4096)
        await harness.create("a", disks=[{"id": "root", "image": "i"}])

    kept: list[str] = []

    async def second(supervisor: Supervisor) -> None:
        vm = await supervisor.get_vm("a")
        kept.extend(own_files(harness, vm))
        entry = supervisor._table.get("a")
        doomed = (str(path), "/etc/passwd", vm.disks[0].path)
        entry.record = replace(entry.record, doomed=doomed)
        async with entry.lock:
            await supervisor._plugger.tidy(entry)
        assert own_files(harness, vm) == ["root.raw"]
        assert entry.record.doomed == ()

    harness.run(first)
    harness.run(second)
    assert path.exists()
    assert kept == ["root.raw"]


def test_records_of_before_get_the_slots_that_their_devices_had() -> None:
    record = VmRecord.decode(
        json.dumps(
            {
                **dict.fromkeys(
                    ("reason", "initrd_id", "boot_time_us", "started_at", "worker"), None
                ),
                "id": "1", "name": "a", "state": "stopped", "vcpus": 1, "memory_mib": 16,
                "kernel_id": "k", "cmdline": "", "rng": True, "on_reboot": "reset",
                "on_panic": "keep", "labels": {}, "created_at": "2026-01-01T00:00:00+00:00",
                "version": 1,
                "disks": [
                    {"id": name, "path": "/x", "image_id": None, "is_own": False,
                     "read_only": False, "size_bytes": 512}
                    for name in ("root", "data")
                ],
                "nics": [
                    {"id": "net0", "tap": "t", "mac": "m", "mtu": None, "bridge": None}
                ],
            }
        )
    )  # fmt: skip
    assert [(disk.id, disk.slot) for disk in record.disks] == [("root", 1), ("data", 2)]
    assert [(nic.id, nic.slot) for nic in record.nics] == [("net0", 17)]
