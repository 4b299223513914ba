# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What is wrong in a request is told by a stable code, and leaves nothing behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lab.rest import ApiFailure
from tests.support import tiny_kernel as tiny
from tests.support.hostel import Hostel, has_tap

QUIET = tiny.boot_timer() + tiny.HALT
HUGE_MIB = 10 * 1024 * 1024


@pytest.fixture(scope="module")
def kernel(hostel: Hostel) -> str:
    return hostel.kernel(QUIET)


def refusal(hostel: Hostel, **vm: object) -> ApiFailure:
    """Create and start a VM that cannot be, and return why not."""
    body = {"name": "wrong", "memory_mib": 16, "start": True, **vm}
    with pytest.raises(ApiFailure) as failure:
        hostel.api.post("/v1/vms?wait=60", body)
    return failure.value


def import_refusal(hostel: Hostel, data: bytes) -> ApiFailure:
    path = hostel.directory / "candidate"
    path.write_bytes(data)
    with pytest.raises(ApiFailure) as failure:
        hostel.api.post("/v1/kernels?wait=60", {"name": "wrong", "path": str(path)})
    return failure.value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vcpus", 0),
        ("vcpus", 10_000),
        ("memory_mib", 1),
        ("memory_mib", HUGE_MIB),
        ("cmdline", "x" * 2048),
        ("colour", "blue"),
        ("vcpus", "2"),
        ("nics", [{"id": "net0", "tap": "a-name-of-16-chr"}]),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(
    hostel: Hostel, kernel: str, field: str, value: object
) -> None:
    error = refusal(hostel, kernel=kernel, **{field: value})
    assert error.status == 422
    assert str(error.problem["field"]).startswith(field)


def test_more_memory_than_the_host_has_is_told_or_lazily_given(hostel: Hostel, kernel: str) -> None:
    body = {"name": "large", "kernel": kernel, "memory_mib": 512 * 1024, "start": True}
    reply = hostel.api.request("POST", "/v1/vms?wait=60", body)
    assert reply.status in {201, 422, 502, 507}
    if reply.status == 201:
        hostel.delete("large")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a kernel at all" * 100,
        tiny.elf(QUIET)[:70],
        tiny.elf(QUIET, gpa=0xFFFF_FFFF_F000),
        tiny.elf(QUIET, memory_bytes=1 << 40),
        tiny.elf(QUIET, gpa=0),
    ],
    ids=["empty", "text", "truncated", "wild-address", "wild-size", "at-zero"],
)
def test_what_is_not_a_kernel_is_refused(hostel: Hostel, data: bytes) -> None:
    assert import_refusal(hostel, data).status == 422
    assert not [k for k in hostel.api.get("/v1/kernels")["items"] if k["name"] == "wrong"]


def test_a_missing_disk_is_refused(hostel: Hostel, kernel: str) -> None:
    disks = [{"id": "root", "path": str(hostel.directory / "missing.raw")}]
    error = refusal(hostel, kernel=kernel, disks=disks)
    assert error.status == 422
    assert error.problem["field"] == "disks.0.path"


def test_a_directory_is_no_disk(hostel: Hostel, kernel: str) -> None:
    error = refusal(hostel, kernel=kernel, disks=[{"id": "root", "path": str(hostel.directory)}])
    assert error.status == 422


def test_a_fifo_is_no_disk_and_blocks_nothing(hostel: Hostel, kernel: str) -> None:
    path = hostel.directory / "fifo"
    os.mkfifo(path)
    error = refusal(hostel, kernel=kernel, disks=[{"id": "root", "path": str(path)}])
    assert error.status == 422


def test_a_disk_of_another_vm_is_refused_while_that_one_runs(hostel: Hostel) -> None:
    path = hostel.directory / "shared.raw"
    path.write_bytes(bytes(1 << 20))
    disks = [{"id": "root", "path": str(path)}]
    first = hostel.run(QUIET, disks=disks)
    error = refusal(hostel, kernel=hostel.kernel(QUIET), disks=disks)
    assert error.status == 409
    assert first in str(error) or "use" in str(error)
    hostel.delete(first)
    second = hostel.run(QUIET, disks=disks)
    hostel.delete(second)


def test_two_readers_may_share_a_disk(hostel: Hostel) -> None:
    path = hostel.directory / "read-only.raw"
    path.write_bytes(bytes(1 << 20))
    disks = [{"id": "root", "path": str(path), "read_only": True}]
    names = [hostel.run(QUIET, disks=disks) for _ in range(2)]
    for name in names:
        hostel.delete(name)


def test_a_tap_of_another_vm_is_refused(hostel: Hostel, kernel: str) -> None:
    nics = [{"id": "net0", "tap": hostel.tap("taken")}]
    first = hostel.run(QUIET, nics=nics)
    assert refusal(hostel, kernel=kernel, nics=nics).status == 409
    hostel.delete(first)
    assert not has_tap(hostel.tap("taken"))


def test_an_interface_that_is_no_tap_is_refused(hostel: Hostel, kernel: str) -> None:
    error = refusal(hostel, kernel=kernel, nics=[{"id": "net0", "tap": "lo"}])
    assert error.status in {409, 422}


def test_a_taken_name_is_refused(hostel: Hostel, kernel: str) -> None:
    name = hostel.create(QUIET)
    assert refusal(hostel, name=name, kernel=kernel).status == 409
    hostel.delete(name)


def test_an_unknown_kernel_is_refused(hostel: Hostel) -> None:
    error = refusal(hostel, kernel="missing")
    assert error.status == 422
    assert error.problem["field"] == "kernel"


def test_an_initrd_too_large_for_the_memory_is_told(hostel: Hostel, kernel: str) -> None:
    path = hostel.directory / "large-initrd"
    with path.open("wb") as file:
        file.truncate(17 << 20)
    image = {"name": "large-initrd", "kind": "initrd", "path": str(path)}
    hostel.api.post("/v1/images?wait=60", image)
    error = refusal(hostel, kernel=kernel, initrd="large-initrd")
    assert "initrd" in str(error)
    assert error.status in {409, 422, 502}


def test_refusals_leave_no_vm_worker_or_file(hostel: Hostel) -> None:
    """Last in the file: everything above has failed by now, one way or another."""
    left = [vm["name"] for vm in hostel.api.get("/v1/vms")["items"]]
    for name in left:
        hostel.delete(name)
    assert left in ([], ["wrong"])
    hostel.wait_workers()
    assert _names(hostel.daemon.state_dir / "vms") == []
    assert _names(hostel.daemon.runtime_dir / "vms") == []


def _names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
