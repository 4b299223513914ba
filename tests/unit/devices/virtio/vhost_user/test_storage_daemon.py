# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A qcow2 disk behind the real qemu-storage-daemon, driven through our front end."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from devices.virtio.vhost_user import device as device_module
from devices.virtio.vhost_user.device import VhostUserBlk
from devices.virtio.vhost_user.link import Link
from tests.support.storage_daemon import DEADLINE_S, StorageDaemon, make_image

if TYPE_CHECKING:
    from tests.unit.devices.virtio.conftest import Machine, MachineFactory

DATA_GPA = 0x40000
SIZE_BYTES = 64 << 20
READ, WRITE, FLUSH = 0, 1, 4
OK = 0
VERSION_1 = 1 << 32
SLOT_BYTES = 0x2000  # of guest memory for one request: header, data, status


@dataclass
class Rig:
    """A machine with the disk, and who serves it."""

    machine: Machine
    disk: VhostUserBlk
    link: Link
    daemon: StorageDaemon
    image: Path
    lost: list[str]

    def submit(self, number: int, kind: int, sector: int, data: bytes = b"") -> None:
        """Offer request ``number``, of 512 bytes, with descriptors of its own; no kick."""
        base = DATA_GPA + number * SLOT_BYTES
        memory = self.machine.memory
        memory.write(base, struct.pack("<IIQ", kind, 0, sector))
        memory.write(base + 0x1000, data or bytes(512))
        memory.write(base + 0x1800, b"\xff")
        body = [] if kind == FLUSH else [(base + 0x1000, 512, kind == READ)]
        buffers = [(base, 16, False), *body, (base + 0x1800, 1, True)]
        self.machine.post(0, buffers, head=number * 3)

    def outcome(self, number: int) -> int:
        return self.machine.memory.read(DATA_GPA + number * SLOT_BYTES + 0x1800, 1)[0]

    def data(self, number: int) -> bytes:
        return self.machine.memory.read(DATA_GPA + number * SLOT_BYTES + 0x1000, 512)

    def kick(self) -> None:
        self.machine.transport._kicks[0].signal()

    def wait(self, done: Callable[[], bool]) -> None:
        due = time.monotonic() + DEADLINE_S
        while not done():
            assert time.monotonic() < due
            self.machine.loop.dispatch()
            time.sleep(0.001)

    def wait_used(self, count: int) -> list[int]:
        """Return the requests' numbers in the order in which they were completed."""
        heads: list[int] = []

        def take() -> bool:
            heads.extend(head for head, _ in self.machine.used(0))
            return len(heads) >= count

        self.wait(take)
        return [head // 3 for head in heads]

    def do(self, kind: int, sector: int, data: bytes = b"") -> bytes:
        """Do one request to its end."""
        self.submit(0, kind, sector, data)
        self.kick()
        assert self.wait_used(1) == [0]
        assert self.outcome(0) == OK
        return self.data(0)

    def replace_daemon(self) -> None:
        """What hosteld does: another daemon on the same image, another connection."""
        self.daemon = StorageDaemon(self.image, self.daemon.socket_path)
        self.link.attach(self.daemon.connect(), needed=self.disk.negotiated)
        self.disk.reattach()


@pytest.fixture
def make_rig(tmp_path: Path, make_machine: MachineFactory) -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(*, slow_writes: bool = False) -> Rig:
        image = make_image(tmp_path / "disk.qcow2", SIZE_BYTES)
        daemon = StorageDaemon(image, tmp_path / "socket", slow_writes=slow_writes)
        config_bytes = VhostUserBlk.CONFIG_BYTES
        link = Link("d0", daemon.connect(), config_bytes=config_bytes, is_libvhost=True)
        disk = VhostUserBlk("d0", link)
        machine = make_machine(disk)
        machine.queue_size = 64
        link.watch(machine.loop)
        rig = Rig(machine, disk, link, daemon, image, [])
        link.on_lost = lambda: rig.lost.append(str(link.lost))
        rigs.append(rig)
        return rig

    yield make
    for rig in rigs:
        rig.link.watch(None)
        rig.machine.close()
        rig.link.close()
        rig.daemon.kill()


def start(rig: Rig) -> None:
    rig.machine.start(VERSION_1)
    assert rig.machine.status & 64 == 0, "the device needs a reset"


def test_what_was_written_is_read_again_by_the_next_daemon(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    start(rig)
    rig.do(WRITE, 2048, b"qcow2" + bytes(507))
    rig.do(FLUSH, 0)
    rig.daemon.kill()
    rig.wait(lambda: rig.link.lost is not None)
    rig.replace_daemon()
    assert rig.do(READ, 2048) == b"qcow2" + bytes(507)
    assert rig.image.stat().st_size < SIZE_BYTES, "the image is not in a sparse format"


def test_config_space_tells_the_virtual_size(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    assert int.from_bytes(rig.disk.config_space()[:8], "little") == SIZE_BYTES // 512


def test_completion_raises_the_queue_s_interrupt(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    start(rig)
    rig.do(READ, 0)
    eventfd = rig.machine.transport._msix.eventfd(1)
    assert eventfd is not None
    rig.wait(lambda: eventfd.drain() > 0)


def test_killed_daemon_loses_no_request_and_does_none_twice(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(slow_writes=True)
    start(rig)
    for number in range(4):
        rig.submit(number, WRITE, number, bytes([number + 1]) * 512)
    for number in range(4, 8):
        rig.submit(number, READ, 100)
    rig.kick()
    # The reads overtake the writes that are held up: what is in flight is not the newest.
    early = rig.wait_used(5)
    assert set(range(4, 8)) < set(early)
    rig.daemon.kill()
    rig.wait(lambda: rig.link.lost is not None)
    assert rig.lost == [rig.link.lost]
    rig.submit(8, READ, 100)  # while nobody serves
    rig.kick()
    rig.replace_daemon()
    late = rig.wait_used(4)
    assert sorted(early + late) == list(range(9))
    assert [rig.outcome(number) for number in range(9)] == [OK] * 9
    assert [rig.do(READ, sector)[0] for sector in range(4)] == [1, 2, 3, 4]


def test_quiesce_waits_for_what_is_in_flight_and_resume_goes_on(
    make_rig: Callable[..., Rig],
) -> None:
    rig = make_rig()
    start(rig)
    for number in range(8):
        rig.submit(number, WRITE, number, bytes([number]) * 512)
    rig.kick()
    rig.disk.quiesce()
    assert len(rig.wait_used(8)) == 8
    rig.submit(0, READ, 5)
    rig.kick()
    time.sleep(0.05)
    assert rig.machine.used(0) == []
    rig.disk.resume()
    assert rig.wait_used(1) == [0]
    assert rig.data(0) == bytes([5]) * 512


def test_pause_that_gives_up_leaves_the_rings_as_they_were(
    make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_module, "QUIESCE_TIMEOUT_S", 0.05)
    rig = make_rig()
    start(rig)
    for sector in range(3):
        rig.do(WRITE, sector, b"x" * 512)
    rig.submit(0, READ, 1)  # and no kick, so nobody takes it
    with pytest.raises(TimeoutError, match="still has requests in flight"):
        rig.disk.quiesce()
    rig.kick()
    assert rig.wait_used(1) == [0]
    assert rig.data(0) == b"x" * 512
    assert (rig.machine.used(0), rig.lost) == ([], [])


def test_guest_that_writes_to_the_config_space_changes_nothing(
    make_rig: Callable[..., Rig],
) -> None:
    rig = make_rig()
    start(rig)
    before = rig.disk.config_space()
    for at in range(VhostUserBlk.CONFIG_BYTES):
        rig.machine.write(0x2000 + at, 1, 0xFF)
    assert (rig.disk.config_space(), rig.lost) == (before, [])
    assert rig.do(READ, 0) == bytes(512)


def test_guest_may_reset_and_start_its_device_again(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    start(rig)
    rig.do(WRITE, 7, b"x" * 512)
    start(rig)
    assert rig.do(READ, 7) == b"x" * 512
    assert rig.lost == []


def test_daemon_that_dies_while_the_device_is_quiesced_is_no_loss(
    make_rig: Callable[..., Rig],
) -> None:
    rig = make_rig()
    start(rig)
    rig.do(WRITE, 7, b"x" * 512)
    rig.disk.quiesce()
    rig.daemon.kill()
    rig.wait(lambda: rig.link.lost is not None)
    rig.replace_daemon()
    rig.disk.resume()
    assert rig.do(READ, 7) == b"x" * 512


def test_pause_without_a_daemon_holds_when_nothing_is_in_flight(
    make_rig: Callable[..., Rig],
) -> None:
    rig = make_rig(slow_writes=True)
    start(rig)
    rig.do(WRITE, 7, b"x" * 512)
    rig.daemon.kill()
    rig.wait(lambda: rig.link.lost is not None)
    rig.disk.quiesce()
    rig.disk.resume()
    rig.submit(0, READ, 7)
    with pytest.raises(TimeoutError, match="lost, with requests in flight"):
        rig.disk.quiesce()
    rig.replace_daemon()
    rig.kick()
    assert rig.wait_used(1) == [0]
    assert rig.data(0) == b"x" * 512


def test_guest_that_starts_while_the_daemon_is_away_is_served_later(
    make_rig: Callable[..., Rig],
) -> None:
    rig = make_rig()
    rig.daemon.kill()
    rig.wait(lambda: rig.link.lost is not None)
    start(rig)
    rig.submit(0, READ, 0)
    rig.kick()
    rig.replace_daemon()
    assert rig.wait_used(1) == [0]


def test_guest_that_breaks_its_ring_loses_only_its_own_disk(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    start(rig)
    base = 0x10000 + 0x1000
    rig.machine.memory.write(base + 2, struct.pack("<H", 5000))  # avail.idx beyond the queue
    rig.kick()
    rig.wait(lambda: rig.link.lost is not None)
    assert rig.daemon.process.poll() is None
