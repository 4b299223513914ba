# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Each request of the block engine, good, bad and on a host that fails."""

from __future__ import annotations

import errno
import os
import resource
import struct
from pathlib import Path

import pytest

from kvm_ffi._kvm import ffi
from kvm_ffi.blk_engine import (
    LATENCY_LIMITS_NS,
    MAX_DISCARD_SECTORS,
    MAX_DISCARD_SEGMENTS,
    MAX_SECTORS,
    MAX_WRITE_ZEROES_SECTORS,
    SERIAL_BYTES,
)
from kvm_ffi.types import Gpa
from tests.support.disk import (
    DATA,
    DISCARD,
    FLUSH,
    GET_ID,
    HEADER,
    IN,
    IOERR,
    OK,
    OUT,
    PATTERN,
    SECTOR,
    SECTORS,
    STATUS,
    UNMAP,
    UNSUPP,
    WRITE_ZEROES,
    Disk,
    MakeDisk,
)
from tests.support.ring_driver import INDIRECT, NEXT, WRITE, Desc


def test_a_read_brings_the_sectors_of_the_file(disk: Disk) -> None:
    assert disk.read(3, 2 * SECTOR) == OK
    assert disk.memory.read(Gpa(DATA), 2 * SECTOR) == PATTERN[3 * SECTOR : 5 * SECTOR]
    assert disk.driver.take_used() == [(0, 2 * SECTOR + 1)]
    assert disk.engine.stats()["read_bytes"] == 2 * SECTOR


def test_a_write_lands_in_the_file_and_nowhere_else(disk: Disk) -> None:
    assert disk.write(5, b"W" * SECTOR) == OK
    assert disk.content() == PATTERN[: 5 * SECTOR] + b"W" * SECTOR + PATTERN[6 * SECTOR :]
    assert disk.driver.take_used() == [(0, 1)]


def test_data_may_be_scattered_over_many_buffers(disk: Disk) -> None:
    pieces = [(DATA, 100, WRITE), (DATA + 0x1000, 411, WRITE), (DATA + 0x2000, 1, WRITE)]
    assert disk.submit(IN, 1, pieces) == OK
    got = disk.memory.read(Gpa(DATA), 100) + disk.memory.read(Gpa(DATA + 0x1000), 411)
    got += disk.memory.read(Gpa(DATA + 0x2000), 1)
    assert got == PATTERN[SECTOR : 2 * SECTOR]


def test_a_header_may_be_split_over_three_descriptors_and_joined_with_data(disk: Disk) -> None:
    disk.header(OUT, 2)
    disk.memory.write(Gpa(HEADER + 16), b"J" * SECTOR)
    disk.driver.offer(
        disk.driver.chain(
            [(HEADER, 1, 0), (HEADER + 1, 8, 0), (HEADER + 9, 7 + SECTOR, 0), (STATUS, 1, WRITE)]
        )
    )
    assert disk.serve() == 0
    assert disk.status == OK
    assert disk.content()[2 * SECTOR : 3 * SECTOR] == b"J" * SECTOR


def test_the_status_is_the_last_byte_of_a_buffer_that_also_holds_data(disk: Disk) -> None:
    disk.header(IN, 0)
    disk.driver.offer(disk.driver.chain([(HEADER, 16, 0), (DATA, SECTOR + 1, WRITE)]))
    assert disk.serve() == 0
    assert disk.memory.read(Gpa(DATA), SECTOR + 1) == PATTERN[:SECTOR] + bytes([OK])


def test_a_request_in_an_indirect_table_is_served(disk: Disk) -> None:
    disk.header(IN, 4)
    table = [Desc(HEADER, 16, NEXT, 1), Desc(DATA, SECTOR, NEXT | WRITE, 2), Desc(STATUS, 1, WRITE)]
    disk.driver.set_table(0x50000, table)
    disk.driver.set_desc(7, Desc(0x50000, 48, INDIRECT))
    disk.driver.offer(7)
    assert disk.serve() == 0
    assert disk.status == OK
    assert disk.memory.read(Gpa(DATA), SECTOR) == PATTERN[4 * SECTOR : 5 * SECTOR]


def test_the_last_sector_is_on_the_disk(disk: Disk) -> None:
    assert disk.read(SECTORS - 1, SECTOR) == OK
    assert disk.read(SECTORS, 0) == OK


@pytest.mark.parametrize(
    ("sector", "length"),
    [
        pytest.param(SECTORS, SECTOR, id="behind the end"),
        pytest.param(SECTORS - 1, 2 * SECTOR, id="over the end"),
        pytest.param(1 << 55, SECTOR, id="sector * 512 wraps to 0"),
        pytest.param((1 << 64) - 1, SECTOR, id="sector + 1 wraps to 0"),
        pytest.param((1 << 63) // 512, SECTOR, id="negative file offset"),
        pytest.param(SECTORS + 1, 0, id="nothing, but beyond"),
        pytest.param(0, (SECTORS + 1) * SECTOR, id="larger than the disk"),
        pytest.param(0, 511, id="unaligned"),
        pytest.param(0, 513, id="unaligned above"),
    ],
)
def test_a_range_that_is_not_on_the_disk_is_an_io_error(
    disk: Disk, sector: int, length: int
) -> None:
    assert disk.read(sector, length) == IOERR
    assert disk.write(sector, bytes(length)) == IOERR
    assert disk.content() == PATTERN
    assert disk.engine.stats()["errors"] == 2
    assert disk.engine.stats()["host_errors"] == 0
    # Nothing was read, so nothing may be claimed as read.
    assert disk.driver.take_used()[0] == (0, 0 if length else 1)


def test_flush_calls_fdatasync_and_a_write_does_not(disk: Disk) -> None:
    assert disk.write(0, bytes(SECTOR)) == OK
    assert disk.engine.stats()["syncs"] == 0
    assert disk.submit(FLUSH, 0, []) == OK
    assert disk.engine.stats()["syncs"] == 1
    assert disk.engine.stats()["flushes"] == 1


def test_without_the_flush_feature_every_change_is_synced(make_disk: MakeDisk) -> None:
    disk = make_disk(is_writethrough=True)
    assert disk.write(0, bytes(SECTOR)) == OK
    assert disk.ranges(WRITE_ZEROES, (1, 1, 0)) == OK
    assert disk.ranges(DISCARD, (2, 1, 0)) == OK
    assert disk.read(0, SECTOR) == OK
    assert disk.engine.stats()["syncs"] == 3


def test_get_id_gives_the_padded_serial(make_disk: MakeDisk) -> None:
    disk = make_disk(serial=b"vm-root")
    assert disk.submit(GET_ID, 0, [(DATA, SERIAL_BYTES, WRITE)]) == OK
    assert disk.memory.read(Gpa(DATA), SERIAL_BYTES) == b"vm-root".ljust(SERIAL_BYTES, b"\0")


def test_get_id_with_a_short_buffer_is_an_io_error(disk: Disk) -> None:
    assert disk.submit(GET_ID, 0, [(DATA, SERIAL_BYTES - 1, WRITE)]) == IOERR


@pytest.mark.parametrize("kind", [2, 3, 14, 0x7FFFFFFF, 0xFFFFFFFF])
def test_an_unknown_request_is_unsupported(disk: Disk, kind: int) -> None:
    assert disk.submit(kind, 0, [(DATA, SECTOR, 0)]) == UNSUPP
    assert disk.engine.stats()["unsupported"] == 1


def test_a_read_only_disk_refuses_every_change_and_serves_reads(make_disk: MakeDisk) -> None:
    disk = make_disk(read_only=True)
    assert disk.write(0, bytes(SECTOR)) == IOERR
    assert disk.ranges(DISCARD, (0, 1, 0)) == IOERR
    assert disk.ranges(WRITE_ZEROES, (0, 1, 0)) == IOERR
    assert disk.read(0, SECTOR) == OK
    assert disk.submit(FLUSH, 0, []) == OK
    assert disk.content() == PATTERN


def test_discard_punches_a_hole(make_disk: MakeDisk, tmp_path: Path) -> None:
    disk = make_disk(size_sectors=8192)
    path = tmp_path / "big.img"
    path.write_bytes(b"\xff" * (4 << 20))
    os.dup2(fd := os.open(path, os.O_RDWR), disk.fd)
    os.close(fd)
    before = path.stat().st_blocks
    assert disk.ranges(DISCARD, (0, 2048, 0), (4096, 4096, 0)) == OK
    os.fsync(disk.fd)
    after = path.stat()
    assert after.st_blocks <= before - 6000
    assert after.st_size == 4 << 20
    assert path.read_bytes() == bytes(1 << 20) + b"\xff" * (1 << 20) + bytes(2 << 20)
    assert disk.engine.stats()["discards"] == 1


@pytest.mark.parametrize("flags", [0, UNMAP])
def test_write_zeroes_clears_exactly_the_range(disk: Disk, flags: int) -> None:
    assert disk.ranges(WRITE_ZEROES, (3, 9, flags)) == OK
    assert disk.content() == PATTERN[: 3 * SECTOR] + bytes(9 * SECTOR) + PATTERN[12 * SECTOR :]


def test_write_zeroes_works_where_the_file_system_cannot(make_disk: MakeDisk) -> None:
    # tmpfs has no FALLOC_FL_ZERO_RANGE: zeros are written out, more than one chunk of them.
    fd = os.memfd_create("disk")
    os.pwrite(fd, b"\xff" * 300 * SECTOR, 0)
    disk = make_disk(fd=fd, size_sectors=300)
    assert disk.ranges(WRITE_ZEROES, (1, 298, 0)) == OK
    expected = b"\xff" * SECTOR + bytes(298 * SECTOR) + b"\xff" * SECTOR
    assert os.pread(fd, 300 * SECTOR, 0) == expected


@pytest.mark.parametrize(
    ("kind", "segments", "status"),
    [
        pytest.param(DISCARD, [(0, 1, UNMAP)], UNSUPP, id="unmap on a discard"),
        pytest.param(DISCARD, [(0, 1, 2)], UNSUPP, id="reserved flag"),
        pytest.param(WRITE_ZEROES, [(0, 1, 0x80000000)], UNSUPP, id="reserved flag of zeroes"),
        pytest.param(DISCARD, [(SECTORS, 1, 0)], IOERR, id="behind the end"),
        pytest.param(DISCARD, [(1, SECTORS, 0)], IOERR, id="over the end"),
        pytest.param(DISCARD, [((1 << 64) - 1, 1, 0)], IOERR, id="wraps"),
        pytest.param(DISCARD, [(0, 1, 0), (1 << 55, 1, 0)], IOERR, id="second one bad"),
        pytest.param(DISCARD, [(0, 1, 0)] * (MAX_DISCARD_SEGMENTS + 1), IOERR, id="too many"),
        pytest.param(WRITE_ZEROES, [(0, 1, 0)] * 2, IOERR, id="too many zeroes"),
        pytest.param(DISCARD, [], IOERR, id="none"),
    ],
)
def test_bad_segments_change_nothing(
    disk: Disk, kind: int, segments: list[tuple[int, int, int]], status: int
) -> None:
    assert disk.ranges(kind, *segments) == status
    assert disk.content() == PATTERN


def test_segments_beyond_the_advertised_length_are_refused(make_disk: MakeDisk) -> None:
    disk = make_disk(size_sectors=1 << 40)
    assert disk.ranges(DISCARD, (0, MAX_DISCARD_SECTORS + 1, 0)) == IOERR
    assert disk.ranges(WRITE_ZEROES, (0, MAX_WRITE_ZEROES_SECTORS + 1, 0)) == IOERR
    assert disk.content() == PATTERN


def test_half_a_segment_is_refused(disk: Disk) -> None:
    disk.memory.write(Gpa(DATA), struct.pack("<QII", 0, 1, 0))
    assert disk.submit(DISCARD, 0, [(DATA, 17, 0)]) == IOERR
    assert disk.content() == PATTERN


def test_the_most_segments_allowed_are_carried_out(disk: Disk) -> None:
    segments = [(2 * index, 1, 0) for index in range(MAX_DISCARD_SEGMENTS)]
    assert disk.ranges(DISCARD, *segments) == OK
    assert disk.content()[: 2 * SECTOR] == bytes(SECTOR) + PATTERN[SECTOR : 2 * SECTOR]


def test_an_empty_segment_is_fine(disk: Disk) -> None:
    assert disk.ranges(DISCARD, (5, 0, 0)) == OK
    assert disk.content() == PATTERN


def test_a_full_host_disk_is_an_io_error(make_disk: MakeDisk) -> None:
    disk = make_disk(fd=os.open("/dev/full", os.O_RDWR))
    assert disk.write(0, bytes(SECTOR)) == IOERR
    assert disk.engine.stats()["host_errors"] == 1


def test_a_write_over_the_file_size_limit_is_an_io_error(disk: Disk) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * SECTOR, hard))
    try:
        status = disk.write(1, b"x" * 2 * SECTOR)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == IOERR
    assert disk.content()[SECTOR : 3 * SECTOR] == b"x" * SECTOR + PATTERN[2 * SECTOR : 3 * SECTOR]


def test_an_io_error_of_the_host_is_one_of_the_guest(make_disk: MakeDisk) -> None:
    # Reading the unmapped first page of an address space is EIO.
    fd = os.open("/proc/self/mem", os.O_RDONLY)
    with pytest.raises(OSError) as caught:  # noqa: PT011 - errno below
        os.pread(fd, 1, 0)
    assert caught.value.errno == errno.EIO
    disk = make_disk(fd=fd)
    assert disk.read(0, SECTOR) == IOERR
    assert disk.driver.take_used() == [(0, 0)]
    assert disk.engine.stats()["host_errors"] == 1


def test_a_file_that_is_shorter_than_the_disk_is_an_io_error(make_disk: MakeDisk) -> None:
    disk = make_disk(size_sectors=SECTORS + 8)
    assert disk.read(SECTORS - 1, 2 * SECTOR) == IOERR
    # The first sector did arrive; the used length says exactly that.
    assert disk.driver.take_used() == [(0, SECTOR)]
    assert disk.memory.read(Gpa(DATA), SECTOR) == PATTERN[-SECTOR:]


def test_a_read_that_the_host_gives_in_pieces_arrives_whole(make_disk: MakeDisk) -> None:
    # A file of the kernel that answers each read with a few KiB at most.
    fd = os.open("/proc/kallsyms", os.O_RDONLY)
    content = b""
    while len(content) < 32 * SECTOR:
        piece = os.pread(fd, SECTOR, len(content))
        if not piece:
            pytest.skip("/proc/kallsyms is empty here")
        content += piece
    if len(os.pread(fd, 32 * SECTOR, 0)) == 32 * SECTOR:
        pytest.skip("this kernel reads /proc/kallsyms in one piece")
    disk = make_disk(fd=fd)
    pieces = [(DATA, 5000, WRITE), (DATA + 0x4000, 1, WRITE), (DATA + 0x5000, 11383, WRITE)]
    assert disk.submit(IN, 0, pieces) == OK
    got = b"".join(disk.memory.read(Gpa(gpa), length) for gpa, length, _ in pieces)
    assert got == content[: 32 * SECTOR]


def test_a_failed_sync_is_an_io_error(make_disk: MakeDisk) -> None:
    disk = make_disk(fd=os.open("/dev/full", os.O_RDWR))
    assert disk.submit(FLUSH, 0, []) == IOERR


def test_a_size_change_is_seen_by_the_next_request(disk: Disk) -> None:
    disk.engine.set_size(10)
    assert disk.read(10, SECTOR) == IOERR
    disk.engine.set_size(SECTORS)
    assert disk.read(10, SECTOR) == OK


def test_a_header_that_is_too_short_is_an_io_error(disk: Disk) -> None:
    disk.header(IN)
    disk.driver.offer(disk.driver.chain([(HEADER, 15, 0), (STATUS, 1, WRITE)]))
    assert disk.serve() == 0
    assert disk.status == IOERR


def test_a_request_of_a_status_byte_alone_is_an_io_error(disk: Disk) -> None:
    disk.driver.offer(disk.driver.chain([(STATUS, 1, WRITE)]))
    assert disk.serve() == 0
    assert disk.status == IOERR


def test_a_request_without_a_status_byte_breaks_the_ring(disk: Disk) -> None:
    disk.header(OUT)
    disk.driver.offer(disk.driver.chain([(HEADER, 16, 0), (DATA, SECTOR, 0)]))
    assert disk.serve() == -errno.EPROTO
    assert disk.content() == PATTERN


def test_requests_before_a_broken_one_are_answered(disk: Disk) -> None:
    disk.header(IN, 1)
    good = disk.driver.chain([(HEADER, 16, 0), (DATA, SECTOR, WRITE), (STATUS, 1, WRITE)])
    disk.driver.offer(good, 0xFFFF)
    assert disk.serve() == -errno.EPROTO
    assert disk.driver.take_used() == [(0, SECTOR + 1)]
    assert disk.irq.drain() == 1


@pytest.mark.parametrize("size", [-1, MAX_SECTORS + 1])
def test_a_size_that_no_file_has_is_refused(make_disk: MakeDisk, size: int) -> None:
    with pytest.raises(ValueError, match="size_sectors"):
        make_disk(size_sectors=size)


def test_a_serial_that_is_too_long_is_refused(make_disk: MakeDisk) -> None:
    with pytest.raises(ValueError, match="at most 20 bytes"):
        make_disk(serial=b"x" * 21)


def test_every_counter_is_reported(disk: Disk) -> None:
    histogram = len(disk.engine.latency()[0])
    assert histogram == len(LATENCY_LIMITS_NS) + 1
    [queue] = disk.engine.queue_stats()
    assert (len(queue) + histogram) * 8 == ffi.sizeof("struct blk_queue_stats")
    assert set(disk.engine.stats().values()) == {0}
