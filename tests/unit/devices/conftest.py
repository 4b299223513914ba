# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Fakes for the device tests: what stands for the kernel, the exit table and a guest's rings.

They are handed out as fixtures, so that no test has to import this file by a path.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from devices.bus import Bus
from kvm_ffi.errors import KvmError
from kvm_ffi.eventfd import EventFd


class FakeIrq:
    """Counts edges."""

    def __init__(self) -> None:
        self.count = 0

    def signal(self) -> None:
        self.count += 1


class FakeHandler:
    """A bus handler that records what reaches it."""

    def __init__(self, answer: int = 0) -> None:
        self.answer = answer
        self.reads: list[tuple[int, int]] = []
        self.writes: list[tuple[int, int, int]] = []

    def read(self, offset: int, length: int) -> int:
        self.reads.append((offset, length))
        return self.answer

    def write(self, offset: int, length: int, value: int) -> None:
        self.writes.append((offset, length, value))


class FakeVm:
    """irqfds and ioeventfds with the kernel's rules: no double assignment, no stray removal."""

    def __init__(self) -> None:
        self.irqfds: set[tuple[int, EventFd]] = set()
        self.ioeventfds: dict[tuple[int, int], EventFd] = {}
        self.assigned_count = 0
        self.deassigned_count = 0
        self.refuse_ioeventfds = False

    def assign_irqfd(self, gsi: int, eventfd: EventFd) -> None:
        if (gsi, eventfd) in self.irqfds or any(eventfd is fd for _, fd in self.irqfds):
            raise KvmError("KVM_IRQFD", errno.EBUSY)
        self.irqfds.add((gsi, eventfd))
        self.assigned_count += 1

    def deassign_irqfd(self, gsi: int, eventfd: EventFd) -> None:
        if (gsi, eventfd) not in self.irqfds:
            raise KvmError("KVM_IRQFD", errno.EINVAL)
        self.irqfds.remove((gsi, eventfd))
        self.deassigned_count += 1

    def assign_ioeventfd(self, address: int, length: int, eventfd: EventFd) -> None:
        if self.refuse_ioeventfds or (address, length) in self.ioeventfds:
            raise KvmError("KVM_IOEVENTFD", errno.EEXIST)
        self.ioeventfds[address, length] = eventfd

    def deassign_ioeventfd(self, address: int, length: int, eventfd: EventFd) -> None:
        if self.ioeventfds.get((address, length)) is not eventfd:
            raise KvmError("KVM_IOEVENTFD", errno.ENOENT)
        del self.ioeventfds[address, length]


class FakeRouter:
    """MSI GSIs from 24; keeps the routes that were committed."""

    def __init__(self) -> None:
        self.allocated: set[int] = set()
        self.staged: dict[int, tuple[int, int]] = {}
        self.routes: dict[int, tuple[int, int]] = {}
        self.commits = 0

    def allocate_msi(self) -> int:
        gsi = next(n for n in range(24, 4096) if n not in self.allocated)
        self.allocated.add(gsi)
        return gsi

    def free(self, gsi: int) -> None:
        self.allocated.remove(gsi)
        self.staged.pop(gsi, None)

    def set_msi(self, gsi: int, address: int, data: int) -> None:
        assert gsi in self.allocated
        self.staged[gsi] = (address, data)

    def clear_msi(self, gsi: int) -> None:
        self.staged.pop(gsi, None)

    def commit(self) -> None:
        self.commits += 1
        self.routes = dict(self.staged)


class FakeExitTable:
    """Holds the configuration bytes of 32 slots."""

    def __init__(self) -> None:
        self.slots: dict[int, memoryview] = {}
        self.traps: dict[int, tuple[int, int]] = {}
        self.claims: set[tuple[int, int]] = set()

    def pci_slot(self, slot: int) -> memoryview:
        assert 0 <= slot < 32
        self.slots[slot] = memoryview(bytearray(4096))
        return self.slots[slot]

    def pci_remove(self, slot: int) -> None:
        del self.slots[slot]

    def pci_trap_reads(self, slot: int, offset: int, length: int) -> None:
        self.traps[slot] = (offset, length)

    def claim(self, base: int, length: int) -> None:
        self.claims.add((base, length))

    def unclaim(self, base: int, length: int) -> None:
        self.claims.remove((base, length))


@pytest.fixture
def irq() -> FakeIrq:
    return FakeIrq()


@pytest.fixture
def vm() -> FakeVm:
    return FakeVm()


@pytest.fixture
def router() -> FakeRouter:
    return FakeRouter()


@pytest.fixture
def exit_table() -> FakeExitTable:
    return FakeExitTable()


@pytest.fixture
def make_handler() -> Callable[..., FakeHandler]:
    return FakeHandler


@pytest.fixture
def pio() -> Bus:
    return Bus("pio")
