# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What is refused before anything is made, and what a patch may change."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from api.errors import ApiError, Conflict, Invalid, NotFound
from api.models.limits import RateLimit
from api.models.vms import DiskPatch, NicPatch, VmAction, VmPatch, VmState
from daemon.supervisor import disks
from daemon.supervisor.service import Supervisor
from daemon.supervisor.vm_plan import FIRST_CID, derive_mac
from tests.support.supervisor import CALL, Harness


async def refused(harness: Harness, **options: Any) -> ApiError:  # noqa: ANN401
    """Create a VM that cannot be, and return why; nothing must be left."""
    with pytest.raises(ApiError) as caught:
        await harness.create("bad", **options)
    with pytest.raises(NotFound):
        await harness.supervisor.get_vm("bad")
    return caught.value


def test_more_memory_than_the_host_has_is_refused_with_both_numbers(harness: Harness) -> None:
    async def scenario(_: Supervisor) -> None:
        error = await refused(harness, memory_mib=1024 * 1024)
        assert (error.status, error.field) == (422, "memory_mib")
        assert "memory_mib=1048576: this host has" in error.detail

    harness.run(scenario)


@pytest.mark.parametrize(
    ("options", "code", "field"),
    [
        ({"kernel": "none"}, "kernel_not_found", "kernel"),
        ({"initrd": "none"}, "image_not_found", "initrd"),
        ({"initrd": "base"}, "image_kind", "initrd"),
        ({"disks": [{"id": "a", "image": "none"}]}, "image_not_found", "disks.0.image"),
        ({"disks": [{"id": "a", "image": "ramdisk"}]}, "image_kind", "disks.0.image"),
        ({"disks": [{"id": "a", "path": "/nowhere"}]}, "disk_missing", "disks.0.path"),
        ({"disks": [{"id": "a", "path": "/proc"}]}, "disk_kind", "disks.0.path"),
        ({"nics": [{"id": "n", "tap": "lo"}]}, "tap_taken", "nics.0.tap"),
        ({"nics": [{"id": "n", "tap": ".."}]}, "tap_name", "nics.0.tap"),
        ({"nics": [{"id": "n", "bridge": "nobridge0"}]}, "bridge_missing", "nics.0.bridge"),
        (
            {"nics": [{"id": "n", "tap": "t"}, {"id": "m", "tap": "t"}]},
            "tap_taken",
            "nics.1.tap",
        ),
    ],
)
def test_what_is_not_there_or_of_the_wrong_kind_is_named(
    harness: Harness, options: dict[str, Any], code: str, field: str
) -> None:
    async def scenario(_: Supervisor) -> None:
        await harness.kernel()
        await harness.image("base")
        await harness.image("ramdisk", kind="initrd")
        error = await refused(harness, **options)
        assert (error.status, error.code, error.field) == (422, code, field)

    harness.run(scenario)


def test_an_initrd_that_does_not_fit_is_refused(harness: Harness) -> None:
    async def scenario(_: Supervisor) -> None:
        await harness.image("huge", 17 << 20, kind="initrd")
        error = await refused(harness, initrd="huge")
        assert (error.status, error.field) == (422, "initrd")

    harness.run(scenario)


def test_a_name_is_taken_once(harness: Harness) -> None:
    async def scenario(_: Supervisor) -> None:
        await harness.create("a")
        with pytest.raises(Conflict) as caught:
            await harness.create("a")
        assert (caught.value.code, caught.value.field) == ("name_taken", "name")

    harness.run(scenario)


def test_a_name_is_free_again_after_a_refused_create(harness: Harness) -> None:
    async def scenario(_: Supervisor) -> None:
        await refused(harness, kernel="none")
        await harness.create("bad")

    harness.run(scenario)


def test_a_tap_belongs_to_one_vm(harness: Harness) -> None:
    async def scenario(_: Supervisor) -> None:
        await harness.create("a", nics=[{"id": "n", "tap": "hosteltest0"}])
        error = await refused(harness, nics=[{"id": "n", "tap": "hosteltest0"}])
        assert (error.status, error.code) == (409, "tap_taken")
        assert "belongs to VM a" in error.detail

    harness.run(scenario)


def test_every_vm_gets_a_cid_of_its_own(harness: Harness) -> None:
    async def scenario(_: Supervisor) -> None:
        first = await harness.create("a", vsock={})
        second = await harness.create("b", vsock={"backend": "unix"})
        third = await harness.create("c", vsock={"cid": 3})
        assert (await harness.create("d")).vsock is None
        cids = [vm.vsock.cid for vm in (first, second, third) if vm.vsock is not None]
        assert cids == [FIRST_CID, FIRST_CID + 1, 3]
        await harness.supervisor.delete_vm("a", False, CALL)
        again = await harness.create("e", vsock={})
        assert again.vsock is not None
        assert again.vsock.cid == FIRST_CID

    harness.run(scenario)


def test_only_who_asks_for_vhost_gets_it(harness: Harness) -> None:
    async def scenario(_: Supervisor) -> None:
        for backend, wanted in (("auto", "unix"), ("unix", "unix"), ("vhost", "vhost")):
            vsock = (await harness.create(backend, vsock={"backend": backend})).vsock
            assert vsock is not None
            assert (vsock.backend, vsock.path is None) == (wanted, wanted == "vhost")

    harness.run(scenario)


def test_a_cid_belongs_to_one_vm(harness: Harness) -> None:
    async def scenario(_: Supervisor) -> None:
        await harness.create("a", vsock={"cid": 77})
        error = await refused(harness, vsock={"cid": 77})
        assert (error.status, error.code, error.field) == (409, "cid_taken", "vsock.cid")
        assert "belongs to VM a" in error.detail

    harness.run(scenario)


def test_a_cid_belongs_to_one_of_two_that_are_made_at_once(harness: Harness) -> None:
    async def scenario(_: Supervisor) -> None:
        await harness.create("first")
        made = await asyncio.gather(
            *(harness.start(name, vsock={"cid": 77}) for name in ("a", "b")),
            return_exceptions=True,
        )
        assert sorted(isinstance(one, Conflict) for one in made) == [False, True]

    harness.run(scenario)


def test_one_file_is_not_two_writable_disks(harness: Harness) -> None:
    path = harness.path / "disk.raw"
    path.write_bytes(bytes(4096))
    (harness.path / "link").symlink_to(path)

    async def scenario(_: Supervisor) -> None:
        disks = [{"id": "a", "path": str(path)}, {"id": "b", "path": str(harness.path / "link")}]
        error = await refused(harness, disks=disks)
        assert (error.code, error.field) == ("disk_twice", "disks.1.path")
        await harness.create("ok", disks=[{**disk, "read_only": True} for disk in disks])

    harness.run(scenario)


def test_a_disk_in_use_by_another_vm_is_refused_at_start(harness: Harness) -> None:
    path = harness.path / "disk.raw"
    path.write_bytes(bytes(4096))
    disks = [{"id": "root", "path": str(path)}]

    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a", disks=disks)
        await harness.create("b", disks=disks)
        with pytest.raises(Conflict, match="another VM or program uses it"):
            await harness.act(VmAction.START, "b")
        vm = await supervisor.get_vm("b")
        assert (vm.state, vm.reason) == (VmState.STOPPED, None)
        await harness.act(VmAction.KILL, "a")
        assert (await harness.act(VmAction.START, "b")).state is VmState.RUNNING

    harness.run(scenario)


def test_addresses_stay_the_same_and_differ() -> None:
    assert derive_mac("vm", "n") == derive_mac("vm", "n")
    assert derive_mac("vm", "n") != derive_mac("vm", "m")
    assert derive_mac("vm", "n").startswith("02:")


# --- disks from images


def test_a_writable_image_is_copied_grown_and_goes_with_its_vm(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.image("base")
        vm = await harness.create("a", disks=[{"id": "root", "image": "base", "size_mib": 3}])
        (disk,) = vm.disks
        assert (disk.image, disk.size_bytes, disk.read_only) == ("base", 3 << 20, False)
        assert disks.inspect(disk.path, "f", read_only=False).size_bytes == 3 << 20
        await supervisor.delete_vm("a", False, CALL)
        with pytest.raises(Invalid, match="no such file"):
            disks.inspect(disk.path, "f", read_only=False)

    harness.run(scenario)


def test_a_read_only_image_is_shared_and_kept_while_used(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.image("base")
        disks = [{"id": "root", "image": "base", "read_only": True}]
        one = await harness.start("a", disks=disks)
        two = await harness.start("b", disks=disks)
        assert one.disks[0].path == two.disks[0].path
        with pytest.raises(Conflict, match="is used by VM a, b"):
            await supervisor.delete_image("base", CALL)

    harness.run(scenario)


def test_a_disk_smaller_than_its_image_is_refused(harness: Harness) -> None:
    async def scenario(_: Supervisor) -> None:
        await harness.image("base", 2 << 20)
        disks = [{"id": "root", "image": "base", "size_mib": 1}]
        error = await refused(harness, disks=disks)
        assert (error.code, error.field) == ("disk_too_small", "disks.0.size_mib")

    harness.run(scenario)


def test_a_disk_that_cannot_be_copied_leaves_nothing(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    async def scenario(_: Supervisor) -> None:
        await harness.image("base")
        monkeypatch.setattr("daemon.supervisor.vm_make.clone_disk", fail)
        error = await refused(harness, disks=[{"id": "root", "image": "base"}])
        assert error.status == 507
        assert list((harness.layout.state / "vms").iterdir()) == []
        assert (await harness.event_types()) == ["vm.created", "vm.create_failed"]

    harness.run(scenario)


# --- patches


def test_a_patch_changes_what_it_names_and_nothing_else(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.image("ramdisk", 4096, kind="initrd")
        before = await harness.create("a", initrd="ramdisk", labels={"x": "1"})
        patch = VmPatch.model_validate({"name": "b", "vcpus": 4, "initrd": None, "cmdline": None})
        after = await supervisor.patch_vm("a", patch, CALL)
        changed = {"name": "b", "vcpus": 4, "initrd": None, "version": 2}
        assert after == before.model_copy(update=changed)
        with pytest.raises(NotFound):
            await supervisor.get_vm("a")

    harness.run(scenario)


def test_an_empty_patch_is_no_change(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        before = await harness.create("a")
        assert await supervisor.patch_vm("a", VmPatch(vcpus=before.vcpus), CALL) == before

    harness.run(scenario)


def test_a_running_vm_changes_its_name_and_labels_but_not_its_shape(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a")
        await supervisor.patch_vm("a", VmPatch(name="b", labels={"k": "v"}), CALL)
        with pytest.raises(Conflict) as caught:
            await supervisor.patch_vm("b", VmPatch(memory_mib=32), CALL)
        assert (caught.value.state, caught.value.field) == ("running", "memory_mib")

    harness.run(scenario)


def test_a_patch_to_a_taken_name_is_refused_and_changes_nothing(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.create("a")
        await harness.create("b")
        with pytest.raises(Conflict):
            await supervisor.patch_vm("a", VmPatch(name="b", vcpus=2), CALL)
        assert (await supervisor.get_vm("a")).vcpus == 1

    harness.run(scenario)


def test_a_patch_that_does_not_fit_is_refused(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.image("huge", 17 << 20, kind="initrd")
        await harness.create("a")
        with pytest.raises(Invalid) as caught:
            await supervisor.patch_vm("a", VmPatch(initrd="huge"), CALL)
        assert caught.value.field == "initrd"

    harness.run(scenario)


def test_a_disk_grows_while_its_vm_runs(harness: Harness) -> None:
    path = harness.path / "disk.raw"
    path.write_bytes(bytes(4096))

    async def scenario(supervisor: Supervisor) -> None:
        await harness.start("a", disks=[{"id": "root", "path": str(path)}])
        vm = await supervisor.patch_disk("a", "root", DiskPatch(size_mib=2), CALL)
        assert vm.disks[0].size_bytes == path.stat().st_size == 2 << 20
        with pytest.raises(Invalid, match="cannot shrink"):
            await supervisor.patch_disk("a", "root", DiskPatch(size_mib=1), CALL)
        with pytest.raises(NotFound, match="has no disk other"):
            await supervisor.patch_disk("a", "other", DiskPatch(size_mib=4), CALL)

    harness.run(scenario)


def test_limits_of_a_disk_are_kept_changed_and_taken_away(harness: Harness) -> None:
    path = harness.path / "disk.raw"
    path.write_bytes(bytes(4096))
    disk = {"id": "root", "path": str(path), "read_only": True, "io_engine": "threads"}
    limit = {"ops_per_s": 100, "ops_burst": 5}

    async def scenario(supervisor: Supervisor) -> None:
        [made] = (await harness.start("a", disks=[{**disk, "rate_limit": limit}])).disks
        assert (made.cache, made.io_engine) == ("writeback", "threads")
        assert made.rate_limit == RateLimit(**limit)
        other = RateLimit(bytes_per_s=1 << 20)
        vm = await supervisor.patch_disk("a", "root", DiskPatch(rate_limit=other), CALL)
        assert vm.disks[0].rate_limit == other
        vm = await supervisor.patch_disk("a", "root", DiskPatch(rate_limit=None), CALL)
        assert vm.disks[0].rate_limit is None
        with pytest.raises(Invalid, match="is read-only"):
            await supervisor.patch_disk("a", "root", DiskPatch(size_mib=4), CALL)

    harness.run(scenario)


def test_an_interface_has_a_pair_of_queues_for_each_vcpu(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        nics = [{"id": "net0"}, {"id": "net1", "queues": 8}]
        one = await harness.create("one", nics=nics)
        assert [nic.queues for nic in one.nics] == [1, 8]
        many = await harness.create("many", nics=[{"id": "net0"}], vcpus=16)
        assert many.nics[0].queues == 4
        fewer = await supervisor.patch_vm("many", VmPatch(vcpus=2), CALL)
        assert fewer.nics[0].queues == 2

    harness.run(scenario)


def test_a_cable_is_pulled_and_stays_so(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.create("a", nics=[{"id": "net0"}])
        for _ in range(2):
            vm = await supervisor.patch_nic("a", "net0", NicPatch(link="down"), CALL)
            assert vm.nics[0].link == "down"
        limit = RateLimit(ops_per_s=10)
        vm = await supervisor.patch_nic("a", "net0", NicPatch(rx_limit=limit), CALL)
        assert (vm.nics[0].link, vm.nics[0].rx_limit, vm.nics[0].tx_limit) == ("down", limit, None)
        vm = await supervisor.patch_nic("a", "net0", NicPatch(rx_limit=None), CALL)
        assert vm.nics[0].rx_limit is None
        with pytest.raises(NotFound, match="no network interface net1"):
            await supervisor.patch_nic("a", "net1", NicPatch(link="down"), CALL)
        assert (await harness.event_types()).count("vm.nic_changed") == 3

    harness.run(scenario)


def test_vhost_takes_no_limit_later_either(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        await harness.create("a", nics=[{"id": "net0", "backend": "vhost"}])
        patch = NicPatch(tx_limit=RateLimit(ops_per_s=10))
        with pytest.raises(Invalid, match="make it with auto"):
            await supervisor.patch_nic("a", "net0", patch, CALL)

    harness.run(scenario)


def test_lists_are_in_order_of_name_filtered_and_paged(harness: Harness) -> None:
    from api.ports import ListQuery

    async def scenario(supervisor: Supervisor) -> None:
        for name in ("c", "a", "b"):
            await harness.create(name, labels={"tier": name, "all": "yes"})
        await harness.act(VmAction.START, "b")

        async def names(**query: Any) -> list[str]:  # noqa: ANN401
            return [vm.name for vm in (await supervisor.list_vms(ListQuery(**query))).items]

        assert await names() == ["a", "b", "c"]
        assert await names(state=VmState.RUNNING) == ["b"]
        assert await names(label="tier=c") == ["c"]
        assert await names(label="all") == ["a", "b", "c"]
        assert await names(label="none") == []
        page = await supervisor.list_vms(ListQuery(limit=2))
        assert page.next_cursor == "b"
        assert await names(cursor="b") == ["c"]

    harness.run(scenario)
