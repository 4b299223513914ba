# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""virtio over PCI with a real guest: its own instructions drive the device through KVM.

The guest runs in real mode with DS based at the BAR, so a 16-bit offset reaches every register.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from devices.bus import AddressWindow, Bus
from devices.event_loop import EventLoop
from devices.pci.host import PciHost
from devices.virtio.pci import VirtioPci
from devices.virtio.rng import VirtioRng
from kvm_ffi.exits import (
    EXIT_MMIO_READ,
    EXIT_MMIO_WRITE,
    EXIT_PCI_CONFIG_READ,
    EXIT_PCI_CONFIG_WRITE,
    EXIT_PIO_WRITE,
)
from kvm_ffi.irq_routing import IrqRouter
from kvm_ffi.system import Kvm
from kvm_ffi.types import Gpa
from tests.support.tiny_guest import TinyGuest

BAR0, LAPIC = 0xC0000000, 0xFEE00000
DONE_PORT = 0xF4
DESC, AVAIL, USED, DATA = 0x9000, 0xA000, 0xB000, 0xC000
QUEUE_SIZE, REQUEST_BYTES = 8, 64
QUEUE_VECTOR = 0x31
DONE = bytes((0xE6, DONE_PORT))
NOTIFY = 0x3000
STATUS_RUNNING = 15


def poke(offset: int, length: int, value: int) -> bytes:
    """Mov [offset], value."""
    if length == 1:
        return struct.pack("<BBHB", 0xC6, 0x06, offset, value)
    if length == 2:
        return struct.pack("<BBHH", 0xC7, 0x06, offset, value)
    return struct.pack("<BBBHI", 0x66, 0xC7, 0x06, offset, value)


def out32(port: int, value: int) -> bytes:
    """Mov dx, port; mov eax, value; out dx, eax."""
    return struct.pack("<BHBBIBB", 0xBA, port, 0x66, 0xB8, value, 0x66, 0xEF)


def config_write(register: int, value: int) -> bytes:
    return out32(0xCF8, 0x80000800 | register) + out32(0xCFC, value)


def driver_start() -> bytes:
    """The whole initialisation of an rng, with one unmasked vector for its queue."""
    code = config_write(0x04, 0x6) + config_write(0x40, 0x8000_0000)
    code += poke(0x14, 1, 0) + poke(0x14, 1, 1) + poke(0x14, 1, 3)
    code += poke(0x08, 4, 1) + poke(0x0C, 4, 1) + poke(0x14, 1, 11)  # VERSION_1, FEATURES_OK
    for word, value in enumerate((LAPIC, 0, QUEUE_VECTOR, 0)):
        code += poke(0x4010 + 4 * word, 4, value)
    code += poke(0x16, 2, 0) + poke(0x18, 2, QUEUE_SIZE) + poke(0x1A, 2, 1)
    for register, gpa in ((0x20, DESC), (0x28, AVAIL), (0x30, USED)):
        code += poke(register, 4, gpa) + poke(register + 4, 4, 0)
    return code + poke(0x1C, 2, 1) + poke(0x14, 1, STATUS_RUNNING)


def hostile_loop(body: bytes, rounds: int) -> bytes:
    """Run body so often, each time with a new pseudo-random EAX, and EBX = EAX >> 16."""
    code = bytes.fromhex("66b8") + struct.pack("<I", 0x12345678) + b"\xbe"
    code += struct.pack("<H", rounds)
    loop = bytes.fromhex("6669c0") + struct.pack("<I", 1103515245)  # imul eax, eax, ...
    loop += bytes.fromhex("6605") + struct.pack("<I", 12345)  # add eax, ...
    loop += bytes.fromhex("6689c3 66c1eb10") + body + b"\x4e"  # dec si
    return code + loop + bytes((0x75, 256 - len(loop) - 2)) + DONE


# and bx, 0x7fff; mov [bx], eax; mov [bx], ax; mov [bx], al; mov cl, [bx]
WRITE_BAR = bytes.fromhex("81e3ff7f 668907 8907 8807 8a0f")
# Common configuration only: and bx, 0x3f; mov [bx], eax; mov [bx], ax; mov [bx], al
WRITE_COMMON = bytes.fromhex("81e33f00 668907 8907 8807")
# mov edi, eax; and eax, 0xfc; or eax, slot 1; cf8 <- eax; cfc <- edi; eax <- edi
WRITE_CONFIG = bytes.fromhex(
    "6689c7 6625fc000000 660d00080080 baf80c 66ef 6689f8 bafc0c 66ef 6689f8"
)


class Machine:
    def __init__(self, kvm: Kvm) -> None:
        self.guest = TinyGuest(kvm, has_irqchip=True)
        self.exits = self.guest.exits
        self.exits.claim_pio(DONE_PORT, 1)
        self.mmio = Bus("mmio", self.exits.claim_mmio, self.exits.unclaim_mmio)
        self.loop = EventLoop()
        self.host = PciHost(self.exits, self.mmio, AddressWindow(BAR0, 1 << 24))
        self.rng = VirtioRng()
        self.transport = VirtioPci(
            self.rng,
            vm=self.guest.vm,
            router=IrqRouter(self.guest.vm),
            memory=self.guest.memory,
            event_loop=self.loop,
        )
        self.host.attach(self.transport)
        self.writes: Counter[int] = Counter()

    def close(self) -> None:
        self.transport.close()
        self.loop.close()
        self.guest.close()

    def run(self, code: bytes, *, ds_base: int = BAR0) -> None:
        """Run code to its OUT to DONE_PORT, serving its exits as a vCPU thread does."""
        self.guest.load(code, ds_base=ds_base)
        exit_: Any = self.guest.vcpu.exit
        while (kind := self.guest.vcpu.run()) != EXIT_PIO_WRITE:
            if kind == EXIT_MMIO_WRITE:
                self.writes[exit_.addr] += 1
                self.mmio.write(exit_.addr, exit_.len, exit_.value)
            elif kind == EXIT_MMIO_READ:
                exit_.value = self.mmio.read(exit_.addr, exit_.len)
            elif kind == EXIT_PCI_CONFIG_WRITE:
                self.host.config_write(exit_.addr, exit_.len, exit_.value)
            elif kind == EXIT_PCI_CONFIG_READ:
                exit_.value = self.host.config_read(exit_.addr, exit_.len)
            else:
                raise AssertionError(f"exit {kind} at {self.guest.vcpu.get_regs().rip:#x}")
            self.loop.dispatch()

    def post_request(self) -> None:
        memory = self.guest.memory
        for gpa in (DESC, AVAIL, USED, DATA):
            memory.write(Gpa(gpa), bytes(0x1000))
        memory.write(Gpa(DESC), struct.pack("<QIHH", DATA, REQUEST_BYTES, 2, 0))
        memory.write(Gpa(AVAIL), struct.pack("<HHH", 0, 1, 0))

    def enable_lapic(self) -> None:
        """Set the software-enable bit of the spurious vector register."""
        self.run(poke(0xF0, 4, 0x1FF) + DONE, ds_base=LAPIC)

    def pending_vectors(self) -> list[int]:
        """Return what waits in the IRR of the LAPIC."""
        lapic = self.guest.vcpu.get_lapic()
        words = [struct.unpack_from("<I", lapic, 0x200 + 16 * i)[0] for i in range(8)]
        return [
            32 * i + bit for i, word in enumerate(words) for bit in range(32) if word >> bit & 1
        ]


@pytest.fixture
def machine(kvm: Kvm) -> Iterator[Machine]:
    machine = Machine(kvm)
    yield machine
    machine.close()


def test_guest_gets_its_bytes_and_its_interrupt_without_a_kick_exit(machine: Machine) -> None:
    machine.enable_lapic()
    machine.post_request()
    machine.run(driver_start() + poke(NOTIFY, 2, 0) + DONE)
    machine.loop.dispatch(timeout_s=10)
    memory = machine.guest.memory
    assert memory.read(Gpa(USED), 12) == struct.pack("<HHII", 0, 1, 0, REQUEST_BYTES)
    assert memory.read(Gpa(DATA), REQUEST_BYTES) != bytes(REQUEST_BYTES)
    assert machine.writes[BAR0 + NOTIFY] == 0
    assert machine.pending_vectors() == [QUEUE_VECTOR]


def test_masked_vector_is_injected_when_it_is_unmasked(machine: Machine) -> None:
    machine.enable_lapic()
    machine.post_request()
    mask, unmask = poke(0x401C, 4, 1), poke(0x401C, 4, 0)
    machine.run(driver_start() + mask + poke(NOTIFY, 2, 0) + DONE)
    machine.loop.dispatch(timeout_s=10)
    assert machine.pending_vectors() == []
    assert machine.mmio.read(BAR0 + 0x5000, 1) == 0b10
    machine.run(unmask + DONE)
    assert machine.pending_vectors() == [QUEUE_VECTOR]
    assert machine.mmio.read(BAR0 + 0x5000, 1) == 0


@pytest.mark.parametrize(
    "body", [WRITE_BAR, WRITE_COMMON, WRITE_CONFIG], ids=["BAR", "common", "config space"]
)
def test_guest_that_writes_garbage_everywhere_can_start_the_device_after(
    machine: Machine, body: bytes
) -> None:
    machine.run(driver_start() + DONE)
    machine.run(hostile_loop(body, rounds=1500))
    machine.run(config_write(0x04, 0) + config_write(0x10, BAR0) + DONE)
    machine.post_request()
    machine.run(driver_start() + poke(NOTIFY, 2, 0) + DONE)
    machine.loop.dispatch(timeout_s=10)
    assert machine.mmio.read(BAR0 + 0x14, 1) == STATUS_RUNNING
    assert machine.guest.memory.read(Gpa(USED), 4) == struct.pack("<HH", 0, 1)
