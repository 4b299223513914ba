# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Persistent memory of a VM whose tiny guest does not use it: memslots, locks, what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lab.rest import ApiFailure
from tests.support import tiny_kernel as tiny
from tests.support.frozen import run
from tests.support.hostel import Hostel, is_locked
from tests.support.pmem_kernel import PAGE_BYTES, PAGES, write_all

QUIET = tiny.boot_timer() + tiny.HALT
MIB = 1 << 20
ROOM_PAGES = 4


@pytest.fixture
def file(directory: Path) -> Path:
    path = directory / "file"
    path.touch()
    os.truncate(path, 4 * MIB)
    return path


@pytest.mark.parametrize("read_only", [False, True])
def test_vm_holds_its_file_through_pause_reset_and_a_new_hosteld(
    own_hostel: Hostel, file: Path, read_only: bool
) -> None:
    pmem = {"id": "data", "path": str(file), "read_only": read_only}
    name = own_hostel.run(QUIET, pmem=[pmem])
    assert own_hostel.api.vm(name)["pmem"] == [{**pmem, "size_bytes": 4 * MIB}]
    own_hostel.api.act(name, "pause")
    own_hostel.api.act(name, "resume")
    own_hostel.api.act(name, "reset")
    own_hostel.restart()
    assert is_locked(file)
    counters = own_hostel.api.get(f"/v1/vms/{name}/stats")["pmem"]["data"]
    assert set(counters.values()) == {0}
    own_hostel.delete(name)
    assert not is_locked(file)
    assert file.stat().st_size == 4 * MIB


def test_file_without_room_ends_its_guest_and_says_why(
    hostel: Hostel, directory: Path, file: Path
) -> None:
    mount = directory / "small"
    mount.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={ROOM_PAGES * PAGE_BYTES}", "none", str(mount))
    sparse = mount / "sparse"
    sparse.touch()
    os.truncate(sparse, 2 * MIB)
    try:
        name = hostel.run(write_all(), pmem=[{"id": "data", "path": str(sparse)}])
        vm = hostel.api.wait_state(name, "crashed", limit_s=30)
        assert vm["reason"]["code"] == "memory_lost"
        assert "file system of a pmem file is full" in vm["reason"]["message"]
        assert sparse.read_bytes()[::PAGE_BYTES].count(1) == ROOM_PAGES
        hostel.delete(name)
        # With room, the same guest comes to its own end.
        name = hostel.run(write_all(), pmem=[{"id": "data", "path": str(file)}])
        vm = hostel.api.wait_state(name, "crashed", limit_s=30)
        assert vm["reason"]["code"] == "triple_fault"
        assert file.read_bytes()[: 2 * MIB : PAGE_BYTES].count(1) == PAGES
        hostel.delete(name)
    finally:
        run("umount", "-l", str(mount))


def test_file_that_another_vm_uses_is_refused(hostel: Hostel, file: Path) -> None:
    name = hostel.run(QUIET, pmem=[{"id": "data", "path": str(file)}])
    with pytest.raises(ApiFailure, match="disk_in_use"):
        hostel.run(QUIET, disks=[{"id": "data", "path": str(file)}])
    hostel.delete(name)


def test_file_that_has_shrunk_is_refused_at_the_start(hostel: Hostel, file: Path) -> None:
    name = hostel.create(QUIET, pmem=[{"id": "data", "path": str(file)}])
    os.truncate(file, MIB)
    with pytest.raises(ApiFailure, match="pmem_size"):
        hostel.api.act(name, "start")
    os.truncate(file, 2 * MIB)
    hostel.api.act(name, "start")
    hostel.delete(name)
