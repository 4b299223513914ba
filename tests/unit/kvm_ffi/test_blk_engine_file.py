# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A block engine's file: what is told of its errors, and another one in its place."""

from __future__ import annotations

import errno
import functools
import os
from pathlib import Path

import pytest

from kvm_ffi.types import Gpa
from tests.support.disk import DATA, IOERR, OK, PATTERN, SECTOR, SECTORS, Disk
from tests.support.engine_thread import running, wait_until


def test_the_first_error_is_told_and_the_next_when_it_is_awaited(disk: Disk) -> None:
    assert disk.engine.host_errno == 0
    os.truncate(disk.path, 8 * SECTOR)
    for _ in range(3):
        assert disk.read(8, SECTOR) == IOERR
    assert (disk.fault.drain(), disk.engine.host_errno) == (1, errno.EIO)
    assert disk.engine.stats()["host_errors"] == 3
    disk.engine.await_host_error()
    assert disk.fault.drain() == 0
    assert [disk.read(8, SECTOR), disk.read(9, SECTOR)] == [IOERR, IOERR]
    assert disk.fault.drain() == 1


def test_a_request_that_the_guest_got_wrong_is_no_error_of_the_file(disk: Disk) -> None:
    assert disk.read(SECTORS, SECTOR) == IOERR
    assert (disk.fault.drain(), disk.engine.host_errno) == (0, 0)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    path = tmp_path / "other.img"
    path.write_bytes(b"o" * SECTOR * 2 * SECTORS)
    return path


def test_another_file_serves_what_comes_after_it(disk: Disk, other: Path) -> None:
    assert disk.write(1, b"x" * SECTOR) == OK
    fd = os.open(other, os.O_RDWR)
    try:
        disk.engine.set_file(fd, 2 * SECTORS)
        assert disk.read(2 * SECTORS - 1, SECTOR) == OK
        assert disk.memory.read(Gpa(DATA), SECTOR) == b"o" * SECTOR
        assert disk.write(2, b"y" * SECTOR) == OK
        assert disk.content() == PATTERN[:SECTOR] + b"x" * SECTOR + PATTERN[2 * SECTOR :]
        assert other.read_bytes()[2 * SECTOR : 3 * SECTOR] == b"y" * SECTOR
        assert disk.engine.syncs == 1  # of the file that was left
    finally:
        disk.engine.set_file(disk.fd, SECTORS)
        os.close(fd)


def test_an_engine_is_held_still_for_another_file(disk: Disk, other: Path) -> None:
    fd = os.open(other, os.O_RDWR)
    with running(disk.engine):
        disk.offer_reads(4)
        disk.kick.signal()
        wait_until(disk.irq, functools.partial(disk.has_used, 4))
        with pytest.raises(OSError, match="busy") as caught:
            disk.engine.set_file(fd, 2 * SECTORS)
        assert caught.value.errno == errno.EBUSY
        disk.engine.quiesce()
        disk.engine.set_file(fd, 2 * SECTORS)
        disk.engine.resume()
        disk.offer_reads(1)
        disk.kick.signal()
        wait_until(disk.irq, functools.partial(disk.has_used, 5))
        assert disk.memory.read(Gpa(DATA), SECTOR) == b"o" * SECTOR
    os.close(fd)


def test_a_descriptor_that_is_none_leaves_the_file(disk: Disk) -> None:
    with pytest.raises(OSError, match="Bad file"):
        disk.engine.set_file(1 << 20, SECTORS)
    with pytest.raises(ValueError, match="size_sectors"):
        disk.engine.set_file(disk.fd, -1)
    assert disk.read(0, SECTOR) == OK
    assert disk.memory.read(Gpa(DATA), SECTOR) == PATTERN[:SECTOR]
