# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Another file behind a disk, with workers that have no VM; and what hosteld does not learn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from api.errors import ApiError, Conflict, HostFailure, Invalid
from api.models.vms import DiskPatch, VmAction
from daemon.protocol import Status
from daemon.supervisor.news import counted, last_told
from daemon.supervisor.records import DiskRecord, VmRecord
from daemon.supervisor.service import Supervisor
from tests.support.supervisor import CALL, Harness


@pytest.fixture
def old(harness: Harness) -> Path:
    path = harness.path / "old.raw"
    path.write_bytes(bytes(4096))
    return path


@pytest.fixture
def new(harness: Harness) -> Path:
    path = harness.path / "new.raw"
    path.write_bytes(bytes(8192))
    return path


async def swap(supervisor: Supervisor, path: Path) -> DiskRecord:
    await supervisor.patch_disk("a", "root", DiskPatch(path=str(path)), CALL)
    return record_of(supervisor).disks[0]


def record_of(supervisor: Supervisor) -> VmRecord:
    return supervisor._table.get("a").record


def on(path: Path, **options: object) -> list[dict[str, object]]:
    return [{"id": "root", "path": str(path), **options}]


def test_a_running_vm_has_the_new_file_and_its_size(harness: Harness, old: Path, new: Path) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a", disks=on(old))
        disk = await swap(supervisor, new)
        assert (disk.path, disk.size_bytes, disk.swaps) == (str(new), 8192, 1)
        assert (await harness.event_types())[-1] == "vm.disk_swapped"
        # Asked once more, nothing is left to do.
        assert await swap(supervisor, new) == disk
        assert (await harness.event_types()).count("vm.disk_swapped") == 1
        third = harness.path / "third.raw"
        third.write_bytes(bytes(512))
        assert (await swap(supervisor, third)).swaps == 2

    async def after_a_restart(supervisor: Supervisor) -> None:
        assert record_of(supervisor).disks[0].path == str(harness.path / "third.raw")

    harness.run(scenario)
    harness.run(after_a_restart)


def test_a_refusal_leaves_the_old_file(harness: Harness, old: Path, new: Path) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a", "refuse-swap_disk", disks=on(old))
        with pytest.raises(HostFailure, match="no such luck"):
            await swap(supervisor, new)
        disk = record_of(supervisor).disks[0]
        assert (disk.path, disk.size_bytes, disk.swaps) == (str(old), 4096, 0)
        assert "vm.disk_swapped" not in await harness.event_types()

    harness.run(scenario)


def test_a_swap_without_an_answer_was_done_if_the_worker_says_so(
    harness: Harness, old: Path, new: Path
) -> None:
    harness.set(request_timeout_s=0.3)

    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a", "mute-swap_disk", disks=on(old))
        with pytest.raises(ApiError):
            await swap(supervisor, new)
        assert record_of(supervisor).disks[0].path == str(new)
        assert (await harness.event_types()).count("vm.disk_swapped") == 1

    harness.run(scenario)


def test_a_swap_that_comes_after_all_is_in_the_record_from_then_on(
    harness: Harness, old: Path, new: Path
) -> None:
    harness.set(request_timeout_s=0.3)

    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a", "late-swap", disks=on(old))
        with pytest.raises(ApiError):
            await swap(supervisor, new)
        disk = record_of(supervisor).disks[0]
        assert (disk.path, disk.size_bytes) == (str(old), 4096)
        await supervisor.vm_stats("a")
        vm = await harness.until("a", lambda vm: vm.disks[0].path == str(new))
        assert vm.disks[0].size_bytes == 8192
        assert (await harness.event_types())[-1] == "vm.disk_swapped"

    harness.run(scenario)


def test_what_a_killed_hosteld_did_not_learn_is_taken_from_the_worker(
    harness: Harness, old: Path, new: Path
) -> None:
    harness.set(request_timeout_s=0.3)

    async def first(supervisor: Supervisor) -> None:
        await harness.start("a", disks=on(old))
        entry = supervisor._table.get("a")
        # Committed, and not asked: where a kill hits it.
        asked = entry.record.disks[0].with_file(str(new), 8192)
        await supervisor._table.commit(entry, disks=(asked,))

    async def second(supervisor: Supervisor) -> None:
        assert record_of(supervisor).disks[0].path == str(old)
        assert (await swap(supervisor, new)).path == str(new)

    harness.run(first)
    harness.run(second)


def test_a_worker_that_ends_after_an_unclear_swap_says_which_file_it_used(
    harness: Harness, old: Path, new: Path
) -> None:
    harness.set(request_timeout_s=0.3)

    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a", disks=on(old))
        entry = supervisor._table.get("a")
        # Committed, and not asked.
        asked = entry.record.disks[0].with_file(str(new), 8192)
        await supervisor._table.commit(entry, disks=(asked,))
        vm = await harness.act(VmAction.STOP)
        assert (vm.state, vm.disks[0].path) == ("stopped", str(old))

    harness.run(scenario)


def test_a_last_word_found_at_a_start_says_which_file_was_used(
    harness: Harness, old: Path, new: Path
) -> None:
    async def first(supervisor: Supervisor) -> None:
        await harness.start("a", disks=on(old))
        entry = supervisor._table.get("a")
        asked = entry.record.disks[0].with_file(str(new), 8192)
        await supervisor._table.commit(entry, disks=(asked,))
        status = Status("stopped", entry.record.id, 1, swaps={"root": 0})
        events, changes = last_told(entry, status)
        assert events == []
        assert changes["disks"][0].path == str(old)

    harness.run(first)


def test_a_file_that_was_put_in_the_place_of_another_is_taken(harness: Harness, old: Path) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a", disks=on(old))
        copy = harness.path / "copy.raw"
        copy.write_bytes(bytes(4096))
        copy.rename(old)
        assert (await swap(supervisor, old)).swaps == 1

    harness.run(scenario)


def test_a_vm_at_rest_starts_with_the_new_file(harness: Harness, old: Path, new: Path) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.create("a", disks=on(old))
        assert (await swap(supervisor, new)).other is None
        vm = await harness.act(VmAction.START)
        assert vm.disks[0].path == str(new)

    harness.run(scenario)


def test_what_makes_no_sense_is_refused_before_anything_happens(
    harness: Harness, old: Path, new: Path
) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.image("i", 4096)
        disks = [*on(old), {"id": "data", "path": str(new)}, {"id": "own", "image": "i"}]
        await harness.start("a", disks=disks)
        with pytest.raises(Invalid, match="same file") as twice:
            await swap(supervisor, new)
        assert twice.value.field == "path"
        with pytest.raises(Conflict, match="own copy"):
            await supervisor.patch_disk("a", "own", DiskPatch(path="/dev/null"), CALL)
        with pytest.raises(Invalid, match="no such file") as missing:
            await swap(supervisor, harness.path / "none")
        assert missing.value.field == "path"
        assert record_of(supervisor).disks[0].path == str(old)

    harness.run(scenario)


def test_a_path_goes_alone() -> None:
    with pytest.raises(ValueError, match="`path` alone"):
        DiskPatch(path="/a", size_mib=1)
    with pytest.raises(ValueError, match="`path` alone"):
        DiskPatch()


def test_errors_are_told_as_often_as_they_grow(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.create("a")
        entry = supervisor._table.get("a")
        told = {"root": {"count": 3, "error": "EIO"}}
        status = Status("running", "a", 1, disk_errors=told)
        events, changes = counted(entry, status)
        assert [(event.type, event.data) for event in events] == [
            ("vm.disk_error", {"disk": "root", "error": "EIO", "count": 3})
        ]
        await supervisor._table.commit(entry, **changes)
        assert counted(entry, status) == ([], {})
        more = {**told, "data": {"count": 7, "error": "ENOSPC"}}
        events, changes = counted(entry, replace(status, disk_errors=more))
        assert [event.data["count"] for event in events] == [7]
        assert changes == {"disk_errors": {"root": 3, "data": 7}}
        assert VmRecord.decode(entry.record.encode()) == entry.record

    harness.run(scenario)
