# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from __future__ import annotations

import errno
import os
import select
import struct
import threading
from typing import TYPE_CHECKING

import pytest

from devices.errors import BackendError
from devices.virtio import blk
from devices.virtio.blk import VirtioBlk, backend_size_bytes
from kvm_ffi.blk_engine import IoEngine
from kvm_ffi.rate_limiter import RateLimit

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from devices.virtio.device import VirtioDevice
    from tests.unit.devices.virtio.conftest import Machine

SECTORS = 64
VERSION_1 = 1 << 32
F_SEG_MAX, F_RO, F_BLK_SIZE, F_FLUSH = 1 << 2, 1 << 5, 1 << 6, 1 << 9
F_TOPOLOGY, F_CONFIG_WCE, F_MQ, F_DISCARD, F_WRITE_ZEROES = (
    1 << bit for bit in (10, 11, 12, 13, 14)
)
IN, OUT, GET_ID = 0, 1, 8
HEADER, DATA, STATUS = 0x40000, 0x41000, 0x42000
NEEDS_RESET = 64


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(range(256)) * (2 * SECTORS))
    return path


@pytest.fixture
def make_disk(
    image: Path, make_machine: Callable[[VirtioDevice], Machine]
) -> Callable[..., Machine]:
    def make(*, is_read_only: bool = False, n_queues: int = 1) -> Machine:
        fd = os.open(image, os.O_RDONLY if is_read_only else os.O_RDWR)
        disk = VirtioBlk(
            "blk0",
            fd,
            path=str(image),
            is_read_only=is_read_only,
            serial="hostel-0001",
            n_queues=n_queues,
        )
        return make_machine(disk)

    return make


def wait_for_used(machine: Machine, timeout_s: float = 10) -> list[tuple[int, int]]:
    """Wait for the engine's thread by its interrupt, not by time."""
    eventfd = machine.transport._msix.eventfd(1)
    assert eventfd is not None
    # The irqfd is a fake, so nobody else takes the count.
    assert select.select([eventfd.fd], [], [], timeout_s)[0]
    eventfd.drain()
    return machine.used(0)


def request(machine: Machine, kind: int, sector: int, length: int) -> int:
    """Run one request and return its status byte."""
    machine.memory.write(HEADER, struct.pack("<IIQ", kind, 0, sector))
    machine.memory.write(STATUS, b"\xff")
    buffers = [(HEADER, 16, False), (DATA, length, kind != OUT), (STATUS, 1, True)]
    machine.post(0, buffers)
    machine.kick(0)
    assert len(wait_for_used(machine)) == 1
    return machine.memory.read(STATUS, 1)[0]


def test_config_space_tells_capacity_and_limits(make_disk: Callable[..., Machine]) -> None:
    machine = make_disk()
    machine.enable_memory()
    at, offset, length = machine.structures()[4]
    assert (offset, length) == (0x2000, 60)
    assert at
    assert machine.read(0x2000, 8) == SECTORS
    assert machine.read(0x200C, 4) == 254  # seg_max
    assert machine.read(0x2014, 4) == 512  # blk_size
    assert machine.read(0x2022, 2) == 1  # num_queues


def test_offered_features(make_disk: Callable[..., Machine]) -> None:
    machine = make_disk()
    machine.enable_memory()
    wanted = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_DISCARD | F_WRITE_ZEROES
    assert machine.offered() & wanted == wanted
    assert not machine.offered() & (F_RO | F_CONFIG_WCE)


def test_read_only_disk_offers_no_discard(make_disk: Callable[..., Machine]) -> None:
    machine = make_disk(is_read_only=True)
    machine.enable_memory()
    assert machine.offered() & F_RO
    assert not machine.offered() & (F_DISCARD | F_WRITE_ZEROES)


def test_a_disk_has_as_many_queues_as_its_machine_has_vcpus(
    make_disk: Callable[..., Machine],
) -> None:
    machine = make_disk(n_queues=4)
    machine.enable_memory()
    assert machine.offered() & F_MQ
    assert machine.read(0x2022, 2) == 4
    machine.start(VERSION_1 | F_FLUSH | F_MQ)
    assert request(machine, IN, 1, 512) == 0
    details = machine.device.details()  # type: ignore[attr-defined]
    at = details["counters"].index("reads")
    assert [queue[at] for queue in details["queues"]] == [1, 0, 0, 0]
    assert sum(details["latency"][0]) == 1
    assert details["io_engine"] in {"io_uring", "threads"}


def test_a_driver_may_use_fewer_queues_than_there_are(make_disk: Callable[..., Machine]) -> None:
    machine = make_disk(n_queues=4)
    machine.start(VERSION_1 | F_FLUSH, queues=(0,))
    assert request(machine, IN, 1, 512) == 0
    assert len(machine.device.details()["queues"]) == 1  # type: ignore[attr-defined]


def test_no_machine_gets_more_queues_than_the_engine_serves(
    make_disk: Callable[..., Machine],
) -> None:
    machine = make_disk(n_queues=64)
    machine.enable_memory()
    assert machine.read(0x2022, 2) == 16


def test_a_limit_is_changed_while_the_disk_runs(make_disk: Callable[..., Machine]) -> None:
    machine = make_disk()
    machine.start()
    machine.device.set_limit(RateLimit(ops_per_s=1, ops_burst=1))  # type: ignore[attr-defined]
    assert request(machine, IN, 1, 512) == 0
    machine.device.set_limit(RateLimit())  # type: ignore[attr-defined]
    assert request(machine, IN, 1, 512) == 0


def test_io_uring_that_was_asked_for_and_is_refused_says_so(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(blk, "require_io_uring", refuse)
    fd = os.open(image, os.O_RDWR)
    with pytest.raises(BackendError, match="io_engine=io_uring: Operation not permitted; see"):
        VirtioBlk("blk0", fd, path=str(image), io_engine=IoEngine.IO_URING)
    os.close(fd)


def test_a_size_that_direct_io_cannot_write_is_refused(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blk, "direct_align_bytes", lambda _fd: 4096)
    os.truncate(image, 4096 + 512)
    fd = os.open(image, os.O_RDWR)
    with pytest.raises(BackendError, match=r"4608 bytes: .* multiple of 4096; grow it"):
        VirtioBlk("blk0", fd, path=str(image))
    os.close(fd)


def test_a_coarse_host_is_told_as_the_physical_block(
    image: Path, monkeypatch: pytest.MonkeyPatch, make_machine: Callable[[VirtioDevice], Machine]
) -> None:
    monkeypatch.setattr(blk, "direct_align_bytes", lambda _fd: 4096)
    machine = make_machine(VirtioBlk("blk0", os.open(image, os.O_RDWR), path=str(image)))
    machine.enable_memory()
    assert machine.offered() & F_TOPOLOGY
    assert (machine.read(0x2014, 4), machine.read(0x2018, 1)) == (512, 3)


def test_config_space_is_read_only(make_disk: Callable[..., Machine]) -> None:
    machine = make_disk()
    machine.enable_memory()
    machine.write(0x2000, 4, 0)
    machine.write(0x2FFC, 4, 0)
    assert machine.read(0x2000, 4) == SECTORS


def test_read_and_write_reach_the_file(make_disk: Callable[..., Machine], image: Path) -> None:
    machine = make_disk()
    machine.start(VERSION_1 | F_FLUSH)
    assert request(machine, IN, 1, 512) == 0
    assert machine.memory.read(DATA, 512) == bytes(range(256)) * 2
    machine.memory.write(DATA, b"W" * 512)
    assert request(machine, OUT, 2, 512) == 0
    assert image.read_bytes()[1024:1536] == b"W" * 512


def test_serial_is_told(make_disk: Callable[..., Machine]) -> None:
    machine = make_disk()
    machine.start()
    assert request(machine, GET_ID, 0, 20) == 0
    assert machine.memory.read(DATA, 20) == b"hostel-0001".ljust(20, b"\0")


def test_engine_runs_in_a_thread_of_its_name_until_reset(
    make_disk: Callable[..., Machine],
) -> None:
    machine = make_disk()
    machine.start()
    assert [t.name for t in threading.enumerate()].count("blk0") == 1
    machine.set_status(0)
    assert [t.name for t in threading.enumerate()].count("blk0") == 0


def test_counters_survive_a_reset(make_disk: Callable[..., Machine]) -> None:
    machine = make_disk()
    machine.start()
    request(machine, IN, 0, 512)
    machine.start()
    request(machine, IN, 0, 1024)
    stats = machine.device.stats()
    assert (stats["reads"], stats["read_bytes"]) == (2, 1536)


def test_device_without_its_queue_needs_reset(make_disk: Callable[..., Machine]) -> None:
    machine = make_disk()
    machine.start(queues=())
    assert machine.status & NEEDS_RESET
    machine.start()
    assert request(machine, IN, 0, 512) == 0


def test_host_without_a_thread_left_makes_the_disk_need_a_reset(
    make_disk: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    machine = make_disk()
    monkeypatch.setattr(threading.Thread, "start", refuse)
    machine.start()
    assert machine.status & NEEDS_RESET
    monkeypatch.undo()
    machine.start()
    assert request(machine, IN, 0, 512) == 0


def test_broken_ring_needs_reset_and_a_reset_heals(make_disk: Callable[..., Machine]) -> None:
    machine = make_disk()
    machine.start()
    machine.interrupts(0)
    machine.memory.write(0x10000 + 0x1000 + 2, struct.pack("<H", 1000))  # avail.idx runs away
    machine.kick(0)
    while not machine.loop.dispatch(timeout_s=10):
        pass
    assert machine.status & NEEDS_RESET
    assert machine.interrupts(0) == 1
    machine.start()
    assert request(machine, IN, 0, 512) == 0


def test_quiesced_disk_serves_after_resume(make_disk: Callable[..., Machine]) -> None:
    machine = make_disk()
    machine.start()
    machine.transport.quiesce()
    machine.transport.resume()
    assert request(machine, IN, 0, 512) == 0


def test_growing_the_file_tells_the_driver(make_disk: Callable[..., Machine], image: Path) -> None:
    machine = make_disk()
    machine.start()
    machine.interrupts(0)
    os.truncate(image, 1 << 20)
    assert machine.device.refresh_size() == 2048  # type: ignore[attr-defined]
    assert (machine.read(0x2000, 8), machine.read(0x15, 1)) == (2048, 1)
    assert machine.interrupts(0) == 1
    assert request(machine, IN, 2047, 512) == 0


def test_unchanged_size_tells_nobody(make_disk: Callable[..., Machine]) -> None:
    machine = make_disk()
    machine.start()
    machine.interrupts(0)
    machine.device.refresh_size()  # type: ignore[attr-defined]
    assert machine.interrupts(0) == 0


def test_another_file_takes_over_and_its_size_is_told(
    make_disk: Callable[..., Machine], image: Path, tmp_path: Path
) -> None:
    machine = make_disk()
    disk = machine.device
    assert isinstance(disk, VirtioBlk)
    machine.start()
    other = tmp_path / "other.raw"
    other.write_bytes(b"o" * SECTORS * 1024)
    assert disk.swap(os.open(other, os.O_RDWR)) == 2 * SECTORS
    assert machine.interrupts(0) == 1
    assert request(machine, IN, SECTORS, 512) == 0
    assert machine.memory.read(DATA, 512) == b"o" * 512
    # The same size again is nothing to tell of.
    same = tmp_path / "same.raw"
    same.write_bytes(b"s" * SECTORS * 1024)
    disk.swap(os.open(same, os.O_RDWR))
    assert machine.interrupts(0) == 0
    machine.set_status(0)
    assert disk.swap(os.open(image, os.O_RDWR)) == SECTORS


def test_what_cannot_be_a_disk_is_not_taken(
    make_disk: Callable[..., Machine], tmp_path: Path
) -> None:
    machine = make_disk()
    disk = machine.device
    assert isinstance(disk, VirtioBlk)
    machine.start()
    fd = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(BackendError, match="neither a regular file"):
        disk.swap(fd)
    os.close(fd)  # still the caller's
    assert request(machine, IN, 1, 512) == 0


def test_a_quiesced_disk_has_another_file_and_stays_quiet(
    make_disk: Callable[..., Machine], tmp_path: Path
) -> None:
    machine = make_disk()
    disk = machine.device
    assert isinstance(disk, VirtioBlk)
    machine.start()
    other = tmp_path / "other.raw"
    other.write_bytes(b"o" * SECTORS * 512)
    disk.quiesce()
    disk.swap(os.open(other, os.O_RDWR))
    machine.memory.write(HEADER, struct.pack("<IIQ", IN, 0, 1))
    machine.post(0, [(HEADER, 16, False), (DATA, 512, True), (STATUS, 1, True)])
    machine.kick(0)
    assert machine.used(0) == []
    disk.resume()
    assert wait_for_used(machine) == [(0, 513)]
    assert machine.memory.read(DATA, 512) == b"o" * 512


def test_errors_of_the_file_are_told_and_break_nothing(
    make_disk: Callable[..., Machine], image: Path
) -> None:
    machine = make_disk()
    disk = machine.device
    assert isinstance(disk, VirtioBlk)
    told: list[tuple[int, int]] = []
    disk.on_host_error = lambda: told.append(disk.host_errors())
    machine.start()
    os.truncate(image, 8 * 512)
    assert request(machine, IN, 8, 512) == 1
    machine.loop.dispatch(timeout_s=10)
    assert told == [(1, errno.EIO)]
    assert not machine.status & NEEDS_RESET
    # One that the driver's reset overtakes is told too.
    assert request(machine, IN, 9, 512) == 1
    machine.set_status(0)
    assert told[-1] == (2, errno.EIO)


def test_directory_is_no_disk(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(BackendError, match="neither a regular file nor a block device"):
            backend_size_bytes(fd, str(tmp_path))
    finally:
        os.close(fd)


def test_closed_descriptor_is_a_backend_error() -> None:
    with pytest.raises(BackendError, match="cannot tell its size"):
        backend_size_bytes(-1, "gone.raw")


def test_serial_too_long_is_refused(image: Path) -> None:
    with pytest.raises(ValueError, match="at most 20 bytes"):
        VirtioBlk("blk0", 0, path=str(image), serial="x" * 21)
