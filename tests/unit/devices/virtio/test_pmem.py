# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""virtio-pmem: what a flush does, and when it may be believed."""

from __future__ import annotations

import errno
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from devices.virtio import pmem as pmem_module
from devices.virtio.pmem import VirtioPmem
from devices.virtio.rng import VirtioRng
from kvm_ffi.types import Gpa

if TYPE_CHECKING:
    from tests.unit.devices.virtio.conftest import Machine, MachineFactory

GPA, SIZE_BYTES = 1 << 32, 2 << 20
REQUEST_GPA = 0x40000
SLOT_BYTES = 16
OK, EIO = 0, 1
NEEDS_RESET = 64
DEADLINE_S = 30.0


class Disk:
    """Stands for fdatasync(2): counts, waits, fails."""

    def __init__(self) -> None:
        self.syncs = 0
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.has_begun = threading.Event()
        self.error: int | None = None

    def fdatasync(self, _fd: int) -> None:
        self.has_begun.set()
        assert self.may_go_on.wait(DEADLINE_S)
        self.syncs += 1
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    made = Disk()
    monkeypatch.setattr(pmem_module.os, "fdatasync", made.fdatasync)
    yield made
    made.may_go_on.set()


class Rig:
    """A device and its driver."""

    def __init__(self, machine: Machine, device: VirtioPmem) -> None:
        self.machine = machine
        self.device = device

    def ask(self, *numbers: int, kind: int = 0, room: int = 4) -> None:
        """Offer flushes, each with descriptors and memory of its own, and kick once."""
        for number in numbers:
            self.post(number, kind, room)
        self.machine.kick(0)
        self.machine.loop.dispatch()

    def post(self, number: int, kind: int, room: int) -> None:
        gpa = REQUEST_GPA + number * SLOT_BYTES
        self.machine.memory.write(gpa, struct.pack("<II", kind, 0xFFFFFFFF))
        self.machine.post(0, [(gpa, 4, False), (gpa + 4, room, True)], head=2 * number)

    def outcome(self, number: int) -> int:
        raw = self.machine.memory.read(REQUEST_GPA + number * SLOT_BYTES + 4, 4)
        return int.from_bytes(raw, "little")

    def wait(self, count: int) -> list[tuple[int, int]]:
        """Return (request, bytes written) of those that are done."""
        done: list[tuple[int, int]] = []
        due = time.monotonic() + DEADLINE_S
        while len(done) < count:
            assert time.monotonic() < due
            done += [(head // 2, written) for head, written in self.machine.used(0)]
            time.sleep(0.001)
        return done


@pytest.fixture
def make_rig(tmp_path: Path, make_machine: MachineFactory) -> Callable[..., Rig]:
    def make(*, is_read_only: bool = False) -> Rig:
        fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
        device = VirtioPmem("data", fd, gpa=GPA, size_bytes=SIZE_BYTES, is_read_only=is_read_only)
        rig = Rig(make_machine(device), device)
        rig.machine.start()
        return rig

    return make


def test_guest_learns_where_it_is(make_rig: Callable[..., Rig]) -> None:
    machine = make_rig().machine
    words = [machine.read(0x2000 + at, 4) for at in range(0, 16, 4)]
    assert struct.pack("<4I", *words) == struct.pack("<QQ", GPA, SIZE_BYTES)


def test_flush_is_answered_after_the_file_is_durable(
    make_rig: Callable[..., Rig], disk: Disk
) -> None:
    rig = make_rig()
    disk.may_go_on.clear()
    rig.ask(0)
    assert disk.has_begun.wait(DEADLINE_S)
    assert rig.machine.used(0) == []
    disk.may_go_on.set()
    assert rig.wait(1) == [(0, 4)]
    assert (rig.outcome(0), disk.syncs) == (OK, 1)


def test_those_that_come_meanwhile_share_the_next_one(
    make_rig: Callable[..., Rig], disk: Disk
) -> None:
    rig = make_rig()
    disk.may_go_on.clear()
    rig.ask(0)
    assert disk.has_begun.wait(DEADLINE_S)
    rig.ask(1, 2)
    rig.ask(3)
    disk.may_go_on.set()
    assert rig.wait(4) == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert disk.syncs == 2
    assert rig.device.stats() == {"requests": 4, "syncs": 2, "errors": 0}


def test_a_whole_queue_of_flushes_does_not_end_the_kicks(
    make_rig: Callable[..., Rig], disk: Disk
) -> None:
    rig = make_rig()
    rig.machine.start(features=1 << 32 | 1 << 29)  # VIRTIO_F_EVENT_IDX
    size = rig.machine.queue_size
    rig.ask(*[0] * size)
    rig.machine.loop.dispatch()
    assert len(rig.wait(size)) == size
    avail_event = 0x10000 + 0x2000 + 4 + 8 * size  # behind the used ring of queue 0
    assert struct.unpack("<H", rig.machine.memory.read(avail_event, 2)) == (size,)


def test_after_one_that_failed_none_succeeds(make_rig: Callable[..., Rig], disk: Disk) -> None:
    rig = make_rig()
    disk.error = errno.EIO
    rig.ask(0)
    rig.wait(1)
    disk.error = None
    rig.ask(1)
    rig.wait(1)
    assert [rig.outcome(0), rig.outcome(1)] == [EIO, EIO]
    assert rig.device.stats()["errors"] == 2


def test_read_only_file_is_never_flushed(make_rig: Callable[..., Rig], disk: Disk) -> None:
    rig = make_rig(is_read_only=True)
    rig.ask(0)
    assert rig.wait(1) == [(0, 4)]
    assert (rig.outcome(0), disk.syncs) == (EIO, 0)


def test_pause_answers_what_was_asked_for_and_takes_nothing_new(
    make_rig: Callable[..., Rig], disk: Disk
) -> None:
    rig = make_rig()
    disk.may_go_on.clear()
    rig.ask(0)
    assert disk.has_begun.wait(DEADLINE_S)
    threading.Timer(0.05, disk.may_go_on.set).start()
    rig.device.quiesce()
    assert rig.machine.used(0) == [(0, 4)]
    rig.ask(1)
    assert disk.syncs == 1
    rig.device.resume()
    rig.machine.loop.dispatch()
    assert rig.wait(1) == [(1, 4)]


def test_pause_gives_up_on_a_file_that_hangs_and_the_device_goes_on(
    make_rig: Callable[..., Rig], disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pmem_module, "QUIESCE_TIMEOUT_S", 0.01)
    rig = make_rig()
    disk.may_go_on.clear()
    rig.ask(0)
    assert disk.has_begun.wait(DEADLINE_S)
    with pytest.raises(TimeoutError, match="flush"):
        rig.device.quiesce()
    disk.may_go_on.set()
    assert rig.wait(1) == [(0, 4)]


def test_reset_does_not_wait_and_what_was_under_way_is_not_written(
    make_rig: Callable[..., Rig], disk: Disk
) -> None:
    rig = make_rig()
    disk.may_go_on.clear()
    rig.ask(0)
    assert disk.has_begun.wait(DEADLINE_S)
    rig.machine.set_status(0)
    rig.machine.start()
    disk.may_go_on.set()
    rig.ask(1)
    assert rig.wait(1) == [(1, 4)]
    assert rig.outcome(0) == 0xFFFFFFFF


@pytest.mark.parametrize(("kind", "room"), [(1, 4), (0xFFFFFFFF, 4), (0, 3)])
@pytest.mark.parametrize("is_read_only", [False, True])
def test_malformed_request_ends_the_device(
    make_rig: Callable[..., Rig], kind: int, room: int, is_read_only: bool
) -> None:
    rig = make_rig(is_read_only=is_read_only)
    rig.ask(0, kind=kind, room=room)
    rig.machine.loop.dispatch()
    assert rig.machine.status & NEEDS_RESET


def test_malformed_request_does_not_hold_a_pause_up(
    make_rig: Callable[..., Rig], disk: Disk
) -> None:
    rig = make_rig()
    rig.post(0, 0, 4)
    rig.ask(1, kind=7)
    rig.device.quiesce()
    assert (rig.machine.used(0), disk.syncs) == ([(0, 4)], 1)


def test_other_devices_of_the_guest_can_write_to_it(
    make_machine: MachineFactory, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(SIZE_BYTES))
    fd = os.open(file, os.O_RDWR)
    machine = make_machine(VirtioRng())
    machine.memory.add_file(Gpa(GPA), SIZE_BYTES, fd)
    machine.start()
    machine.post(0, [(GPA + SIZE_BYTES - 64, 64, True)])
    machine.kick(0)
    machine.loop.dispatch()
    assert machine.used(0) == [(0, 64)]
    assert file.read_bytes()[-64:] != bytes(64)
    machine.close()
    os.close(fd)
