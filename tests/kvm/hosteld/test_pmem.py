# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Persistent memory of a VM whose tiny guest does not use it: memslots, locks, what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lab.rest import ApiFailure
from tests.support import tiny_kernel as tiny
from tests.support.hostel import Hostel, is_locked

QUIET = tiny.boot_timer() + tiny.HALT
MIB = 1 << 20


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
