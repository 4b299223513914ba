# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A virtio-pci driver for the tests: it goes through configuration space, BAR and rings only."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import pytest

from devices.bus import AddressWindow, Bus
from devices.event_loop import EventLoop
from devices.pci.host import PciHost
from devices.virtio.pci import VirtioPci
from kvm_ffi.memory import GuestMemory
from kvm_ffi.types import Gpa

if TYPE_CHECKING:
    from devices.virtio.device import VirtioDevice
    from tests.unit.devices.conftest import FakeExitTable, FakeRouter, FakeVm

RAM_BYTES = 1 << 20
RINGS_GPA = 0x10000
QUEUE_STRIDE = 0x4000
DATA_GPA = 0x40000
BAR0 = 0xC0000000
MSI_ADDRESS = 0xFEE00000
NO_VECTOR = 0xFFFF

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET = 1, 2, 4, 8, 64
NEXT, WRITE = 1, 2


class Machine:
    """One device in slot 1 of a PCI host, with fakes for the kernel, and its driver."""

    def __init__(
        self, device: VirtioDevice, vm: FakeVm, router: FakeRouter, exit_table: FakeExitTable
    ) -> None:
        self.vm, self.router, self.exit_table = vm, router, exit_table
        self.memory = GuestMemory([(Gpa(0), RAM_BYTES)])
        self.mmio = Bus("mmio")
        self.loop = EventLoop()
        self.host = PciHost(exit_table, self.mmio, AddressWindow(BAR0, 1 << 24))
        self.device = device
        self.transport = VirtioPci(
            device, vm=vm, router=router, memory=self.memory, event_loop=self.loop
        )
        self.slot = self.host.attach(self.transport)
        self.avail_idx = [0] * len(device.QUEUE_SIZES)
        self.used_idx = [0] * len(device.QUEUE_SIZES)
        self.queue_size = 8
        self.is_closed = False

    def close(self) -> None:
        """Give everything back; a second call does nothing."""
        if self.is_closed:
            return
        self.is_closed = True
        self.transport.close()
        self.loop.close()
        self.memory.close()

    # PCI configuration space

    def config_write(self, register: int, length: int, value: int) -> None:
        self.host.config_write(self.slot << 12 | register, length, value)

    def config_read(self, register: int, length: int) -> int:
        """Read as a guest does: from C's bytes, or from Python where reads are trapped."""
        start, size = self.exit_table.traps.get(self.slot, (0, 0))
        if register < start + size and start < register + length:
            return self.host.config_read(self.slot << 12 | register, length)
        view = self.exit_table.slots[self.slot]
        return int.from_bytes(view[register : register + length], "little")

    def capabilities(self) -> list[tuple[int, int]]:
        """Return (id, offset) in list order."""
        found, offset = [], self.config_read(0x34, 1)
        while offset:
            found.append((self.config_read(offset, 1), offset))
            offset = self.config_read(offset + 1, 1)
        return found

    def structures(self) -> dict[int, tuple[int, int, int]]:
        """Return cfg_type -> (capability offset, offset in the BAR, length)."""
        return {
            self.config_read(at + 3, 1): (
                at,
                self.config_read(at + 8, 4),
                self.config_read(at + 12, 4),
            )
            for cap_id, at in self.capabilities()
            if cap_id == 9
        }

    # BAR

    def read(self, offset: int, length: int) -> int:
        return self.mmio.read(BAR0 + offset, length)

    def write(self, offset: int, length: int, value: int) -> None:
        self.mmio.write(BAR0 + offset, length, value)

    @property
    def status(self) -> int:
        return self.read(0x14, 1)

    def set_status(self, value: int) -> None:
        self.write(0x14, 1, value)

    def offered(self) -> int:
        self.write(0x00, 4, 0)
        low = self.read(0x04, 4)
        self.write(0x00, 4, 1)
        return self.read(0x04, 4) << 32 | low

    def accept(self, features: int) -> None:
        for select in (0, 1):
            self.write(0x08, 4, select)
            self.write(0x0C, 4, features >> 32 * select & 0xFFFFFFFF)

    def enable_memory(self) -> None:
        self.config_write(0x04, 2, 0x6)

    def enable_msix(self) -> None:
        """Unmask every vector of the table and enable it, as Linux does."""
        at = next(at for cap_id, at in self.capabilities() if cap_id == 0x11)
        self.config_write(at + 2, 2, 0x8000)
        for vector in range((self.config_read(at + 2, 2) & 0x7FF) + 1):
            for word, value in enumerate((MSI_ADDRESS, 0, 0x30 + vector, 0)):
                self.write(0x4000 + 16 * vector + 4 * word, 4, value)

    def setup_queue(self, index: int, vector: int = NO_VECTOR) -> None:
        base = RINGS_GPA + index * QUEUE_STRIDE
        self.memory.write(Gpa(base), bytes(QUEUE_STRIDE))
        self.avail_idx[index] = self.used_idx[index] = 0
        self.write(0x16, 2, index)
        self.write(0x18, 2, self.queue_size)
        self.write(0x1A, 2, vector)
        for register, gpa in ((0x20, base), (0x28, base + 0x1000), (0x30, base + 0x2000)):
            self.write(register, 4, gpa & 0xFFFFFFFF)
            self.write(register + 4, 4, gpa >> 32)
        self.write(0x1C, 2, 1)

    def start(self, features: int = 1 << 32, queues: Sequence[int] | None = None) -> None:
        """Go through the whole initialisation; vector 0 is config, queue n has vector n + 1."""
        self.enable_memory()
        self.set_status(0)
        self.set_status(ACKNOWLEDGE)
        self.set_status(ACKNOWLEDGE | DRIVER)
        self.accept(features)
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK)
        self.enable_msix()
        self.write(0x10, 2, 0)
        for index in range(len(self.avail_idx)) if queues is None else queues:
            self.setup_queue(index, index + 1)
        self.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)

    # rings

    def post(self, index: int, buffers: Sequence[tuple[int, int, bool]], head: int = 0) -> None:
        """Offer one chain of (gpa, length, is_writable) and make it available."""
        base = RINGS_GPA + index * QUEUE_STRIDE
        for i, (gpa, length, is_writable) in enumerate(buffers):
            flags = (WRITE if is_writable else 0) | (NEXT if i + 1 < len(buffers) else 0)
            raw = struct.pack("<QIHH", gpa, length, flags, head + i + 1)
            self.memory.write(Gpa(base + 16 * (head + i)), raw)
        slot = self.avail_idx[index] % self.queue_size
        self.memory.write(Gpa(base + 0x1000 + 4 + 2 * slot), struct.pack("<H", head))
        self.avail_idx[index] = (self.avail_idx[index] + 1) & 0xFFFF
        self.memory.write(Gpa(base + 0x1000 + 2), struct.pack("<H", self.avail_idx[index]))

    def kick(self, index: int) -> None:
        """Write the notify register, as an exit that no ioeventfd took."""
        self.write(0x3000 + 4 * index, 2, index)

    def used(self, index: int) -> list[tuple[int, int]]:
        """Return the (head, written) pairs that are new since the last call."""
        base = RINGS_GPA + index * QUEUE_STRIDE + 0x2000
        end = struct.unpack("<H", self.memory.read(Gpa(base + 2), 2))[0]
        found = []
        while self.used_idx[index] != end:
            slot = self.used_idx[index] % self.queue_size
            found.append(struct.unpack("<II", self.memory.read(Gpa(base + 4 + 8 * slot), 8)))
            self.used_idx[index] = (self.used_idx[index] + 1) & 0xFFFF
        return found

    def interrupts(self, vector: int) -> int:
        """Take what was signalled on a vector (the kernel would inject it)."""
        eventfd = self.transport._msix.eventfd(vector)
        return 0 if eventfd is None else eventfd.drain()


MachineFactory = Callable[["VirtioDevice"], Machine]


@pytest.fixture
def make_machine(
    vm: FakeVm, router: FakeRouter, exit_table: FakeExitTable
) -> Iterator[MachineFactory]:
    machines: list[Machine] = []

    def make(device: VirtioDevice) -> Machine:
        machines.append(Machine(device, vm, router, exit_table))
        return machines[-1]

    yield make
    for machine in machines:
        machine.close()
    assert vm.irqfds == set()
    assert vm.ioeventfds == {}
    assert router.allocated == set()
