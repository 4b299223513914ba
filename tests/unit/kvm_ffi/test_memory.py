# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from __future__ import annotations

import errno
import fcntl
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvm_ffi._kvm import ffi, lib
from kvm_ffi.errors import BadGuestAddress
from kvm_ffi.memory import MAX_REGIONS, GuestMemory, ReadOnlyMapping
from kvm_ffi.types import Gpa

PAGE = 4096
# Two regions that touch in the file but not in the guest: the hole between is MMIO.
LOW_SIZE = 16 * PAGE
HIGH_GPA = 64 * PAGE
HIGH_SIZE = 8 * PAGE


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory([(Gpa(HIGH_GPA), HIGH_SIZE), (Gpa(0), LOW_SIZE)]) as guest_memory:
        yield guest_memory


def test_what_was_written_is_read_back(memory: GuestMemory) -> None:
    memory.write(Gpa(0x123), b"hello")
    assert memory.read(Gpa(0x123), 5) == b"hello"


def test_regions_lie_in_the_file_in_the_order_of_their_addresses(memory: GuestMemory) -> None:
    low, high = memory.regions
    assert (low.gpa, low.size_bytes, low.file_offset) == (0, LOW_SIZE, 0)
    assert (high.gpa, high.size_bytes, high.file_offset) == (HIGH_GPA, HIGH_SIZE, LOW_SIZE)
    memory.write(Gpa(HIGH_GPA), b"high")
    assert os.pread(memory.fd, 4, LOW_SIZE) == b"high"
    assert memory.size_bytes == LOW_SIZE + HIGH_SIZE


def test_the_host_address_of_a_region_leads_to_its_bytes(memory: GuestMemory) -> None:
    memory.write(Gpa(HIGH_GPA), b"direct")
    assert ffi.buffer(ffi.cast("char *", memory.regions[1].hva), 6)[:] == b"direct"


def test_the_last_byte_of_a_region_is_memory(memory: GuestMemory) -> None:
    memory.write(Gpa(LOW_SIZE - 1), b"x")
    assert memory.read(Gpa(LOW_SIZE - 1), 1) == b"x"


@pytest.mark.parametrize(
    ("gpa", "length"),
    [
        (LOW_SIZE - 1, 2),
        (LOW_SIZE, 1),
        (LOW_SIZE, 0),
        (HIGH_GPA - 1, 1),
        (HIGH_GPA - 1, 2),
        (HIGH_GPA, HIGH_SIZE + 1),
        (HIGH_GPA + HIGH_SIZE, 1),
        (0, HIGH_GPA + HIGH_SIZE),
        (1, (1 << 64) - 1),
        ((1 << 64) - 1, 2),
        (-1, 1),
        (0, -1),
        (1 << 64, 1),
    ],
)
def test_a_range_that_leaves_a_region_is_refused(
    memory: GuestMemory, gpa: int, length: int
) -> None:
    with pytest.raises(BadGuestAddress):
        memory.read(Gpa(gpa), length)
    with pytest.raises(BadGuestAddress):
        memory.zero(Gpa(gpa), length)


def test_an_empty_range_inside_a_region_is_fine(memory: GuestMemory) -> None:
    assert memory.read(Gpa(LOW_SIZE - 1), 0) == b""


def test_a_write_over_the_hole_changes_nothing(memory: GuestMemory) -> None:
    with pytest.raises(BadGuestAddress):
        memory.write(Gpa(LOW_SIZE - 2), b"1234")
    assert memory.read(Gpa(LOW_SIZE - 2), 2) == bytes(2)


@pytest.mark.parametrize(("start", "length"), [(5, 11), (100, 3 * PAGE), (0, LOW_SIZE)])
def test_zero_clears_the_range_and_only_that(start: int, length: int) -> None:
    # Large enough that whole pages are punched out rather than cleared.
    size = 128 * PAGE
    scaled = length if length < PAGE else length * 8
    with GuestMemory([(Gpa(0), size)]) as memory:
        memory.write(Gpa(0), b"\xff" * size)
        memory.zero(Gpa(start), scaled)
        expected = b"\xff" * start + bytes(scaled) + b"\xff" * (size - start - scaled)
        assert memory.read(Gpa(0), size) == expected


def test_a_file_is_loaded_from_an_offset(memory: GuestMemory, tmp_path: Path) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(b"skip" + bytes(range(256)) * 40)
    with path.open("rb") as file:
        memory.load_fd(Gpa(PAGE), file.fileno(), 4, 256 * 40)
    assert memory.read(Gpa(PAGE), 256 * 40) == bytes(range(256)) * 40


def test_a_file_that_ends_early_is_an_error(memory: GuestMemory, tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"short")
    with path.open("rb") as file, pytest.raises(OSError) as caught:  # noqa: PT011 - errno below
        memory.load_fd(Gpa(0), file.fileno(), 0, 6)
    assert caught.value.errno == errno.ENODATA


def test_loading_past_the_end_of_memory_is_refused(memory: GuestMemory, tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(2))
    with path.open("rb") as file, pytest.raises(BadGuestAddress):
        memory.load_fd(Gpa(LOW_SIZE - 1), file.fileno(), 0, 2)


def test_a_negative_file_offset_is_refused(memory: GuestMemory) -> None:
    with pytest.raises(ValueError, match="file_offset=-1"):
        memory.load_fd(Gpa(0), memory.fd, -1, 1)


@pytest.mark.parametrize(
    ("regions", "reason"),
    [
        ([], "0 memory regions"),
        ([(0, 0)], "whole pages"),
        ([(0, 100)], "whole pages"),
        ([(100, PAGE)], "whole pages"),
        ([(0, -PAGE)], "whole pages"),
        ([(0, 2 * PAGE), (PAGE, PAGE)], "overlaps"),
        ([(-PAGE, PAGE)], "overlaps"),
        ([(1 << 52, PAGE)], "must be at most"),
        ([(index * PAGE, PAGE) for index in range(MAX_REGIONS + 1)], "17 memory regions"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(regions: list[tuple[Gpa, int]], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        GuestMemory(regions)


def test_a_memfd_that_is_too_small_is_refused_and_stays_open() -> None:
    fd = os.memfd_create("small", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGE)
    with pytest.raises(ValueError, match="must be at least 8192"):
        GuestMemory([(Gpa(0), 2 * PAGE)], memfd=fd)
    os.close(fd)


def test_a_given_memfd_brings_its_bytes() -> None:
    fd = os.memfd_create("saved", os.MFD_ALLOW_SEALING)
    os.pwrite(fd, b"saved", PAGE)
    os.ftruncate(fd, 2 * PAGE)
    with GuestMemory([(Gpa(0), PAGE), (Gpa(1 << 32), PAGE)], memfd=fd) as memory:
        assert memory.read(Gpa(1 << 32), 5) == b"saved"


def test_the_memfd_cannot_shrink_under_the_mapping(memory: GuestMemory) -> None:
    assert fcntl.fcntl(memory.fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    with pytest.raises(PermissionError):
        os.ftruncate(memory.fd, PAGE)


def test_guest_memory_is_left_out_of_core_dumps(memory: GuestMemory) -> None:
    smaps = Path("/proc/self/smaps").read_text().split("VmFlags:")
    pairs = itertools.pairwise(smaps)
    flags = [after.split("\n")[0] for before, after in pairs if "hostel-ram" in before]
    assert flags
    assert all(" dd" in line for line in flags)


def test_after_close_every_access_is_refused() -> None:
    memory = GuestMemory([(Gpa(0), PAGE)])
    memory.close()
    memory.close()
    with pytest.raises(BadGuestAddress):
        memory.read(Gpa(0), 1)


def test_the_c_structs_have_the_layout_that_python_believes() -> None:
    assert ffi.sizeof("struct guest_region") == 24
    assert ffi.sizeof("struct guest_mem") == 8 + 24 * lib.GUEST_MEM_MAX_REGIONS


def test_file_is_a_region_behind_ram(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(2 * PAGE))
    fd = os.open(path, os.O_RDWR)
    with GuestMemory([(Gpa(0), PAGE)]) as memory:
        memory.add_file(Gpa(8 * PAGE), 2 * PAGE, fd)
        memory.write(Gpa(9 * PAGE), b"kept")
        assert (memory.regions[1].gpa, memory.regions[1].fd) == (8 * PAGE, fd)
        with pytest.raises(ValueError, match="overlaps"):
            memory.add_file(Gpa(9 * PAGE), PAGE, fd)
        with pytest.raises(BadGuestAddress):
            memory.read(Gpa(10 * PAGE), 1)
    assert path.read_bytes()[PAGE:][:4] == b"kept"
    os.close(fd)


def test_read_only_file_is_mapped_for_reading_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"fixed".ljust(PAGE, b"."))
    fd = os.open(path, os.O_RDONLY)
    mapping = ReadOnlyMapping(fd, PAGE)
    assert ffi.buffer(ffi.cast("char *", mapping.hva), 5)[:] == b"fixed"
    (line,) = (m for m in Path("/proc/self/maps").read_text().splitlines() if str(path) in m)
    assert line.split()[1] == "r--s"
    mapping.close()
    assert str(path) not in Path("/proc/self/maps").read_text()
    os.close(fd)
