# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Many requests in flight, several queues, syncs, rate limits, and a model of it all."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvm_ffi._kvm import lib
from kvm_ffi.blk_engine import BlkEngine, BlkQueue, IoEngine
from kvm_ffi.eventfd import EventFd
from kvm_ffi.memory import GuestMemory
from kvm_ffi.rate_limiter import RateLimit, RateLimiter
from kvm_ffi.types import Gpa
from tests.support.disk import (
    DATA,
    DISCARD,
    FLUSH,
    IN,
    IOERR,
    OK,
    OUT,
    PATTERN,
    SECTOR,
    SECTORS,
    WRITE_ZEROES,
    Disk,
    MakeDisk,
)
from tests.support.engine_thread import running, wait_signal, wait_until
from tests.support.ring_driver import NEXT, WRITE, Desc, RingDriver

HEADERS, STATUSES, BUFFERS = 0x60000, 0x61000, 0x80000


class Batch:
    """Requests of one queue that are offered together; each has a header, a buffer, a status."""

    def __init__(self, memory: GuestMemory, driver: RingDriver, base: int = 0) -> None:
        self.memory, self.driver, self.base = memory, driver, base
        self.count = 0

    def add(self, kind: int, sector: int, data: bytes = b"", length: int = 0) -> int:
        """Offer one request, in an indirect table of its own; its number."""
        n = self.count
        self.count += 1
        header = HEADERS + self.base + 16 * n
        buffer = BUFFERS + 16 * self.base + 8192 * n
        status = STATUSES + self.base + n
        table = 0x70000 + self.base + 64 * n
        self.memory.write(Gpa(header), struct.pack("<IIQ", kind, 0, sector))
        self.memory.write(Gpa(buffer), data or bytes(length))
        self.memory.write(Gpa(status), b"\xee")
        flags = 0 if data else WRITE
        body = [Desc(buffer, len(data) or length, NEXT | flags, 2)] if data or length else []
        table_of = [Desc(header, 16, NEXT, 1), *body, Desc(status, 1, WRITE)]
        self.driver.set_table(table, table_of)
        self.driver.set_desc(n, Desc(table, 16 * len(table_of), 4))
        self.driver.offer(n)
        return n

    def status(self, n: int) -> int:
        return self.memory.read(Gpa(STATUSES + self.base + n), 1)[0]

    def data(self, n: int, length: int) -> bytes:
        return self.memory.read(Gpa(BUFFERS + 16 * self.base + 8192 * n), length)


def batch_of(disk: Disk) -> Batch:
    return Batch(disk.memory, disk.driver)


def test_a_whole_ring_is_in_flight_at_once(disk: Disk) -> None:
    batch = batch_of(disk)
    for sector in range(16):
        batch.add(IN, sector, length=SECTOR)
    assert disk.serve() == 0
    assert [batch.status(n) for n in range(16)] == [OK] * 16
    assert b"".join(batch.data(n, SECTOR) for n in range(16)) == PATTERN[: 16 * SECTOR]
    assert sorted(disk.driver.take_used()) == [(n, SECTOR + 1) for n in range(16)]
    assert sum(disk.engine.latency()[0]) == 16
    assert disk.engine.queue_stats()[0]["in_flight"] == 0


def test_one_sync_answers_all_flushes_that_came_together(disk: Disk) -> None:
    batch = batch_of(disk)
    for _ in range(8):
        batch.add(FLUSH, 0)
    assert disk.serve() == 0
    assert [batch.status(n) for n in range(8)] == [OK] * 8
    assert disk.engine.syncs == 1
    assert disk.engine.stats()["flushes"] == 8


def test_writes_that_came_together_share_their_sync_without_the_flush_feature(
    make_disk: MakeDisk,
) -> None:
    disk = make_disk(is_writethrough=True)
    batch = batch_of(disk)
    for sector in range(8):
        batch.add(OUT, sector, b"w" * SECTOR)
    assert disk.serve() == 0
    assert [batch.status(n) for n in range(8)] == [OK] * 8
    assert 1 <= disk.engine.syncs <= 8
    assert disk.content()[: 8 * SECTOR] == b"w" * 8 * SECTOR


def test_after_a_failed_sync_nothing_is_durable_any_more(make_disk: MakeDisk) -> None:
    disk = make_disk(fd=os.open("/dev/full", os.O_RDWR))
    assert disk.submit(FLUSH, 0, []) == IOERR
    os.dup2(os.open(disk.path, os.O_RDWR), disk.fd)
    assert disk.submit(FLUSH, 0, []) == IOERR
    assert disk.engine.syncs == 1


def test_an_error_is_one_of_its_request_alone(make_disk: MakeDisk) -> None:
    disk = make_disk(size_sectors=SECTORS + 8)
    batch = batch_of(disk)
    sectors = (0, SECTORS, 5, SECTORS + 7, 63)
    for sector in sectors:
        batch.add(IN, sector, length=SECTOR)
    assert disk.serve() == 0
    assert [batch.status(n) for n in range(5)] == [OK, IOERR, OK, IOERR, OK]
    assert disk.engine.stats()["host_errors"] == 2


def test_more_requests_of_many_buffers_than_there_is_room_for_are_all_served(
    make_disk: MakeDisk,
) -> None:
    disk = make_disk(ring_size=256)
    disk.header(IN, 3)
    pieces = [Desc(DATA + 8 * n, 8, NEXT | WRITE, n + 2) for n in range(64)]
    disk.driver.set_table(0x90000, [Desc(0x40000, 16, NEXT, 1), *pieces, Desc(0x41000, 1, WRITE)])
    for head in range(200):
        disk.driver.set_desc(head, Desc(0x90000, 16 * 66, 4))
    disk.driver.offer(*range(200))
    assert disk.serve() == 0
    assert sorted(disk.driver.take_used()) == [(head, SECTOR + 1) for head in range(200)]
    assert disk.memory.read(Gpa(DATA), SECTOR) == PATTERN[3 * SECTOR : 4 * SECTOR]


@contextlib.contextmanager
def no_descriptor_left() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_auto_serves_without_a_ring_where_there_is_none(make_disk: MakeDisk) -> None:
    disk = make_disk(io_engine=IoEngine.AUTO)
    assert disk.engine.io_engine is IoEngine.AUTO
    with no_descriptor_left():
        assert disk.read(1, SECTOR) == OK
    assert disk.engine.io_engine is IoEngine.THREADS


def test_what_was_asked_for_runs_or_nothing_does(make_disk: MakeDisk, io_engine: IoEngine) -> None:
    disk = make_disk()
    assert disk.read(1, SECTOR) == OK
    assert disk.engine.io_engine is io_engine
    refused = make_disk(io_engine=IoEngine.IO_URING)
    with no_descriptor_left():
        refused.offer_reads(1)
        assert refused.serve() == -errno.EMFILE
    assert refused.irq.drain() == 0


class TwoQueues:
    """A disk with two queues, each with its driver and its wires."""

    def __init__(self, memory: GuestMemory, fd: int, io_engine: IoEngine) -> None:
        self.drivers = [RingDriver(memory, base=0x1000), RingDriver(memory, base=0x8000)]
        self.batches = [Batch(memory, self.drivers[n], 0x200 * n) for n in (0, 1)]
        self.kicks, self.irqs = [EventFd(), EventFd()], [EventFd(), EventFd()]
        self.fault = EventFd()
        self.rings = [driver.queue() for driver in self.drivers]
        wires = [BlkQueue(*each) for each in zip(self.rings, self.kicks, self.irqs, strict=True)]
        self.engine = BlkEngine(
            memory,
            fd,
            size_sectors=SECTORS,
            read_only=False,
            serial=b"",
            queues=wires,
            fault=self.fault,
            io_engine=io_engine,
        )

    def close(self) -> None:
        self.engine.close()
        for event in (*self.kicks, *self.irqs, self.fault):
            event.close()


@pytest.fixture
def two_queues(tmp_path: Path, io_engine: IoEngine) -> Iterator[TwoQueues]:
    path = tmp_path / "disk.img"
    path.write_bytes(PATTERN)
    fd = os.open(path, os.O_RDWR)
    with contextlib.closing(GuestMemory([(Gpa(0), 1 << 20)])) as memory:
        disk = TwoQueues(memory, fd, io_engine)
        yield disk
        disk.close()
    os.close(fd)


def test_each_queue_has_its_kick_its_interrupt_and_its_counters(two_queues: TwoQueues) -> None:
    disk = two_queues
    with running(disk.engine):
        for index in (1, 0):
            disk.batches[index].add(IN, index, length=SECTOR)
            disk.kicks[index].signal()
            wait_signal(disk.irqs[index])
    for index in (0, 1):
        got = disk.batches[index].data(0, SECTOR)
        assert got == PATTERN[index * SECTOR : (index + 1) * SECTOR]
    assert [queue["reads"] for queue in disk.engine.queue_stats()] == [1, 1]
    assert [queue["interrupts"] for queue in disk.engine.queue_stats()] == [1, 1]
    assert disk.engine.stats()["reads"] == 2
    assert min(queue["kicks"] for queue in disk.engine.queue_stats()) >= 1


def test_a_queue_that_breaks_ends_the_disk_after_what_was_in_flight(two_queues: TwoQueues) -> None:
    disk = two_queues
    disk.batches[0].add(IN, 0, length=SECTOR)
    disk.drivers[1].set_avail_idx(0x8000)
    with running(disk.engine) as thread:
        wait_signal(disk.fault)
    assert thread.stopped is False
    assert disk.batches[0].status(0) == OK


def test_a_quiesce_holds_all_queues(two_queues: TwoQueues) -> None:
    disk = two_queues
    with running(disk.engine):
        disk.engine.quiesce()
        for index in (0, 1):
            disk.batches[index].add(IN, index, length=SECTOR)
            disk.kicks[index].signal()
        assert [driver.used_idx for driver in disk.drivers] == [0, 0]
        disk.engine.resume()
        for irq, driver in zip(disk.irqs, disk.drivers, strict=True):
            wait_until(irq, lambda driver=driver: driver.used_idx == 1)  # type: ignore[misc]


def test_a_limited_disk_serves_its_burst_and_then_waits(make_disk: MakeDisk) -> None:
    limiter = RateLimiter(RateLimit(ops_per_s=1, ops_burst=4))
    disk = make_disk(limiter=limiter)
    disk.offer_reads(6)
    with running(disk.engine):
        wait_until(disk.irq, lambda: disk.driver.used_idx >= 4)
        # Without another kick: it is the new limit that lets the rest go.
        limiter.set(RateLimit())
        disk.engine.wake()
        wait_until(disk.irq, lambda: disk.driver.used_idx == 6)
    assert disk.engine.stats()["throttled"] >= 1


def test_a_request_that_waits_for_a_limit_does_not_hold_up_a_pause(make_disk: MakeDisk) -> None:
    limiter = RateLimiter(RateLimit(ops_per_s=1, ops_burst=1))
    disk = make_disk(limiter=limiter)
    disk.offer_reads(3)
    with running(disk.engine):
        wait_until(disk.irq, lambda: disk.driver.used_idx >= 1)
        disk.engine.quiesce()
        state = disk.queue.state
        assert state.next_avail == state.next_used == disk.driver.used_idx
        limiter.set(RateLimit())
        disk.engine.resume()
        wait_until(disk.irq, lambda: disk.driver.used_idx == 3)


def test_bytes_are_limited_by_what_requests_move(make_disk: MakeDisk) -> None:
    limiter = RateLimiter(RateLimit(bytes_per_s=SECTOR, bytes_burst=4 * SECTOR))
    disk = make_disk(limiter=limiter)
    with running(disk.engine):
        disk.offer_reads(4)
        disk.kick.signal()
        wait_until(disk.irq, lambda: disk.driver.used_idx == 4)
    assert disk.engine.stats()["throttled"] == 0


def direct_file(path: Path, length: int) -> int:
    """A file of zeros that the page cache is kept out of."""
    path.write_bytes(bytes(length))
    try:
        return os.open(path, os.O_RDWR | os.O_DIRECT)
    except OSError as err:
        pytest.skip(f"O_DIRECT in {path.parent}: {err.strerror}")


@pytest.mark.parametrize("offset", [0, 1, 4, 511])
def test_buffers_that_are_not_aligned_for_direct_io_still_work(
    make_disk: MakeDisk, tmp_path: Path, offset: int
) -> None:
    path = tmp_path / "direct.img"
    disk = make_disk(fd=direct_file(path, SECTORS * SECTOR))
    data = os.urandom(3 * SECTOR)
    disk.memory.write(Gpa(DATA + offset), data)
    pieces = [(DATA + offset, 700, 0), (DATA + offset + 700, 3 * SECTOR - 700, 0)]
    assert disk.submit(OUT, 8, pieces) == OK
    assert disk.submit(IN, 8, [(DATA + 0x2000 + offset, 3 * SECTOR, WRITE)]) == OK
    assert disk.memory.read(Gpa(DATA + 0x2000 + offset), 3 * SECTOR) == data
    assert path.read_bytes() == bytes(8 * SECTOR) + data + bytes((SECTORS - 11) * SECTOR)


def test_direct_io_reaches_every_sector_of_a_block(make_disk: MakeDisk, tmp_path: Path) -> None:
    path = tmp_path / "direct.img"
    disk = make_disk(fd=direct_file(path, SECTORS * SECTOR))
    batch = batch_of(disk)
    for sector in range(16):
        batch.add(OUT, sector, bytes([sector + 1]) * SECTOR)
    assert disk.serve() == 0
    assert [batch.status(n) for n in range(16)] == [OK] * 16
    expected = b"".join(bytes([sector + 1]) * SECTOR for sector in range(16))
    assert path.read_bytes() == expected + bytes((SECTORS - 16) * SECTOR)


# One batch touches each of 16 pairs of sectors once at most, so that the order in which its
# requests are carried out makes no difference.
Step = tuple[int, int, bytes]
BATCHES = st.lists(
    st.lists(
        st.tuples(
            st.sampled_from([IN, OUT, FLUSH, DISCARD, WRITE_ZEROES]),
            st.integers(0, SECTORS + 2),
            st.binary(min_size=1, max_size=8),
        ),
        unique_by=lambda step: step[1] // 2,
        max_size=16,
    ),
    max_size=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(batches=BATCHES)
def test_a_disk_does_what_an_array_of_bytes_does(
    tmp_path: Path, io_engine: IoEngine, batches: list[list[Step]]
) -> None:
    path = tmp_path / "model.img"
    path.write_bytes(PATTERN)
    model = bytearray(PATTERN)
    fd = os.open(path, os.O_RDWR)
    memory = GuestMemory([(Gpa(0), 1 << 20)])
    driver = RingDriver(memory, size=16)
    with EventFd() as kick, EventFd() as irq, EventFd() as fault:
        engine = BlkEngine(
            memory,
            fd,
            size_sectors=SECTORS,
            read_only=False,
            serial=b"",
            queues=[BlkQueue(driver.queue(), kick, irq)],
            fault=fault,
            io_engine=io_engine,
        )
        for steps in batches:
            batch = Batch(memory, driver)
            expected = [apply(model, batch, *step) for step in steps]
            assert lib.blk_engine_serve(engine._c) == 0
            for n, (status, data) in enumerate(expected):
                assert batch.status(n) == status
                assert data is None or batch.data(n, len(data)) == data
            assert path.read_bytes() == model
        engine.close()
    memory.close()
    os.close(fd)


def apply(
    model: bytearray, batch: Batch, kind: int, sector: int, data: bytes
) -> tuple[int, bytes | None]:
    """Offer a request and do it to the model; status and, of a read, the data."""
    here = slice(sector * SECTOR, (sector + 1) * SECTOR)
    is_on_disk = sector < SECTORS
    if kind == FLUSH:
        batch.add(FLUSH, 0)
        return OK, None
    if kind == IN:
        batch.add(IN, sector, length=SECTOR)
        return (OK, bytes(model[here])) if is_on_disk else (IOERR, None)
    if kind == OUT:
        content = (data * SECTOR)[:SECTOR]
        batch.add(OUT, sector, content)
    else:
        content = bytes(SECTOR)
        batch.add(kind, 0, struct.pack("<QII", sector, 1, 0))
    if is_on_disk:
        model[here] = content
    return (OK if is_on_disk else IOERR), None
