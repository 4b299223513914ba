# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Files as persistent memory: which ones may be, and who else has them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from api.errors import ApiError, Conflict, Invalid
from daemon.supervisor.pmem import measure, open_pmem
from daemon.supervisor.records import PmemRecord
from daemon.supervisor.service import Supervisor
from tests.support.supervisor import Harness

MIB = 1 << 20


def file_of(path: Path, size_bytes: int) -> str:
    path.touch()
    os.truncate(path, size_bytes)
    return str(path)


@pytest.mark.parametrize("size_bytes", [2 * MIB, 64 << 30])
def test_whole_pieces_up_to_the_limit_are_taken(tmp_path: Path, size_bytes: int) -> None:
    path = file_of(tmp_path / "file", size_bytes)
    assert measure(path, "pmem.0.path", read_only=False) == size_bytes


@pytest.mark.parametrize("size_bytes", [MIB, 2 * MIB + 512, (64 << 30) + 2 * MIB])
def test_other_sizes_are_refused_with_the_remedy(tmp_path: Path, size_bytes: int) -> None:
    path = file_of(tmp_path / "file", size_bytes)
    with pytest.raises(Invalid, match=f"{size_bytes} bytes.*fallocate -l") as caught:
        measure(path, "pmem.0.path", read_only=True)
    assert (caught.value.code, caught.value.field) == ("pmem_size", "pmem.0.path")


def test_file_that_another_vm_writes_is_refused(tmp_path: Path) -> None:
    path = file_of(tmp_path / "file", 2 * MIB)
    fd = open_pmem(PmemRecord("a", path, False, 2 * MIB), 0)
    with pytest.raises(Conflict, match="cannot be locked"):
        open_pmem(PmemRecord("b", path, True, 2 * MIB), 0)
    os.close(fd)
    readers = [open_pmem(PmemRecord("c", path, True, 2 * MIB), 0) for _ in range(2)]
    for reader in readers:
        os.close(reader)


def test_file_that_has_changed_its_size_is_refused_at_the_start(tmp_path: Path) -> None:
    path = file_of(tmp_path / "file", 3 * MIB)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - as short as it is
    with pytest.raises(Invalid, match="pieces"):
        open_pmem(PmemRecord("a", path, False, 2 * MIB), 0)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208 - as above


def test_file_is_used_once_in_a_vm(harness: Harness, tmp_path: Path) -> None:
    path = file_of(tmp_path / "file", 2 * MIB)

    async def scenario(_: Supervisor) -> None:
        one, other = {"id": "a", "path": path}, {"id": "b", "path": path}
        for options in ({"pmem": [one, other]}, {"pmem": [one], "disks": [other]}):
            with pytest.raises(ApiError) as caught:
                await harness.create("a", **options)
            assert caught.value.code == "pmem_twice"
        vm = await harness.create("a", pmem=[one])
        assert [(p.id, p.path, p.read_only, p.size_bytes) for p in vm.pmem] == [
            ("a", path, False, 2 * MIB)
        ]

    harness.run(scenario)
