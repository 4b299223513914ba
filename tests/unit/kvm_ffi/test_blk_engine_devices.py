# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The block engine on file systems and devices that fail, or that want whole blocks of 4 KiB.

They are made with mount(8) and losetup(8), which takes root; skipped where that is not to be had.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvm_ffi.blk_engine import direct_align_bytes
from kvm_ffi.types import Gpa
from tests.support.disk import DATA, FLUSH, IOERR, OK, OUT, SECTOR, Disk, MakeDisk
from tests.support.host_tools import run
from tests.support.ring_driver import WRITE

SMALL_BYTES = 64 << 10
DISK_SECTORS = 2048
BLOCK = 8  # sectors


@pytest.fixture
def full_file(tmp_path: Path) -> Iterator[Path]:
    """A sparse file of 1 MiB in a file system that has room for 64 KiB of it."""
    mount = tmp_path / "small"
    mount.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={SMALL_BYTES}", "none", str(mount))
    path = mount / "disk.raw"
    path.touch()
    os.truncate(path, DISK_SECTORS * SECTOR)
    yield path
    run("umount", "-l", str(mount))


@pytest.fixture
def loop() -> Iterator[Callable[..., str]]:
    """Makes a block device of a file."""
    made: list[str] = []

    def make(path: Path, *options: str) -> str:
        made.append(run("losetup", *options, "--find", "--show", str(path)))
        return made[-1]

    yield make
    for device in made:
        run("losetup", "--detach", device)


def test_a_full_file_system_fails_the_writes_that_do_not_fit_and_no_other(
    make_disk: MakeDisk, full_file: Path
) -> None:
    disk = make_disk(fd=os.open(full_file, os.O_RDWR), size_sectors=DISK_SECTORS)
    statuses = [disk.write(n * BLOCK, bytes([n + 1]) * BLOCK * SECTOR) for n in range(32)]
    fitted = statuses.count(OK)
    assert 0 < fitted <= SMALL_BYTES // (BLOCK * SECTOR)
    assert statuses == [OK] * fitted + [IOERR] * (32 - fitted)
    assert disk.engine.stats()["host_errors"] == 32 - fitted
    # The disk lives: what was written is there, and what fits in place is still taken.
    assert disk.write(0, b"again" + bytes(SECTOR - 5)) == OK
    assert disk.submit(FLUSH, 0, []) == OK
    content = full_file.read_bytes()
    for n in range(1, fitted):
        at = n * BLOCK * SECTOR
        assert content[at : at + BLOCK * SECTOR] == bytes([n + 1]) * BLOCK * SECTOR
    assert content.startswith(b"again")


def test_a_write_back_that_failed_is_never_forgotten(
    make_disk: MakeDisk, full_file: Path, loop: Callable[..., str]
) -> None:
    # The page cache of the device takes everything; what is below it does not. With gaps: of a
    # write that is merged from many, the loop driver takes any part for the whole.
    disk = make_disk(fd=os.open(loop(full_file), os.O_RDWR), size_sectors=DISK_SECTORS)
    for n in range(64):
        assert disk.write(2 * n * BLOCK, b"x" * BLOCK * SECTOR) == OK
    assert disk.submit(FLUSH, 0, []) == IOERR
    # The kernel has told it once, and would now say that all is well.
    assert disk.submit(FLUSH, 0, []) == IOERR
    assert disk.read(0, SECTOR) == OK


def test_a_file_that_lost_writes_is_left_when_that_has_been_told(
    make_disk: MakeDisk, full_file: Path, loop: Callable[..., str], tmp_path: Path
) -> None:
    disk = make_disk(fd=os.open(loop(full_file), os.O_RDWR), size_sectors=DISK_SECTORS)
    for n in range(64):
        assert disk.write(2 * n * BLOCK, b"x" * BLOCK * SECTOR) == OK
    other = os.open(tmp_path / "other.raw", os.O_RDWR | os.O_CREAT)
    os.truncate(other, DISK_SECTORS * SECTOR)
    with pytest.raises(OSError, match=r"."):
        disk.engine.set_file(other, DISK_SECTORS)
    # The operator's question must not have taken the answer from the driver.
    assert disk.submit(FLUSH, 0, []) == IOERR
    disk.engine.set_file(other, DISK_SECTORS)
    assert disk.submit(FLUSH, 0, []) == OK
    assert disk.read(0, SECTOR) == OK
    os.close(other)


@pytest.fixture
def coarse(make_disk: MakeDisk, tmp_path: Path, loop: Callable[..., str]) -> Disk:
    """A disk on a device with blocks of 4 KiB, past the page cache."""
    path = tmp_path / "coarse.raw"
    path.write_bytes(bytes(DISK_SECTORS * SECTOR))
    fd = os.open(loop(path, "--sector-size", "4096"), os.O_RDWR | os.O_DIRECT)
    assert direct_align_bytes(fd) == BLOCK * SECTOR
    return make_disk(fd=fd, size_sectors=DISK_SECTORS)


def read_back(disk: Disk, sectors: int) -> bytes:
    """What the device holds, by another way."""
    fd = os.open(f"/proc/self/fd/{disk.fd}", os.O_RDONLY)
    try:
        return os.pread(fd, sectors * SECTOR, 0)
    finally:
        os.close(fd)


def test_single_sectors_of_a_block_are_written_without_harm_to_the_others(coarse: Disk) -> None:
    heads = []
    for n in range(5):
        coarse.memory.write(Gpa(0x50000 + 16 * n), struct.pack("<IIQ", OUT, 0, n))
        coarse.memory.write(Gpa(0x54000 + SECTOR * n), bytes([n + 1]) * SECTOR)
        buffers = [(0x50000 + 16 * n, 16, 0), (0x54000 + SECTOR * n, SECTOR, 0)]
        heads.append(coarse.driver.chain([*buffers, (0x53000 + n, 1, WRITE)], first=3 * n))
    coarse.driver.offer(*heads)
    assert coarse.serve() == 0
    assert coarse.memory.read(Gpa(0x53000), 5) == bytes([OK] * 5)
    written = b"".join(bytes([n + 1]) * SECTOR for n in range(5))
    assert read_back(coarse, 2 * BLOCK) == written + bytes(11 * SECTOR)


@pytest.mark.parametrize(("sector", "count"), [(0, 8), (3, 1), (5, 12), (7, 2), (2040, 8), (9, 24)])
def test_any_range_of_a_coarse_device_is_read_and_written(
    coarse: Disk, sector: int, count: int
) -> None:
    data = os.urandom(count * SECTOR)
    assert coarse.write(sector, data) == OK
    assert coarse.read(sector, count * SECTOR) == OK
    assert coarse.memory.read(Gpa(DATA), count * SECTOR) == data
    expected = bytearray(DISK_SECTORS * SECTOR)
    expected[sector * SECTOR : (sector + count) * SECTOR] = data
    assert read_back(coarse, DISK_SECTORS) == expected
