# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Which vCPU exits come to Python, and what they are called.

Source: Linux Documentation/virt/kvm/api.rst 5 "The kvm_run structure".
"""

from __future__ import annotations

import enum
import errno
import mmap
import threading
from typing import TYPE_CHECKING, Final

from ._kvm import ffi, lib

if TYPE_CHECKING:
    from ._kvm import CData
    from .types import Gpa
    from .uart import Uart

PCI_SLOTS: Final = lib.EXIT_TABLE_PCI_SLOTS
PCI_SLOT_SIZE: Final = lib.EXIT_TABLE_PCI_SLOT_SIZE
MAX_MMIO_RANGES: Final = lib.EXIT_TABLE_MAX_MMIO


class ExitKind(enum.IntEnum):
    """Why Vcpu.run() returned; csrc/vcpu_loop.h says what each one leaves in Vcpu.exit."""

    KICKED = lib.EXIT_KICKED
    PIO_READ = lib.EXIT_PIO_READ
    PIO_WRITE = lib.EXIT_PIO_WRITE
    MMIO_READ = lib.EXIT_MMIO_READ
    MMIO_WRITE = lib.EXIT_MMIO_WRITE
    PCI_CONFIG_WRITE = lib.EXIT_PCI_CONFIG_WRITE
    HLT = lib.EXIT_HLT
    SHUTDOWN = lib.EXIT_SHUTDOWN
    SYSTEM_EVENT = lib.EXIT_SYSTEM_EVENT
    FAIL_ENTRY = lib.EXIT_FAIL_ENTRY
    INTERNAL_ERROR = lib.EXIT_INTERNAL_ERROR
    UNKNOWN = lib.EXIT_UNKNOWN
    PCI_CONFIG_READ = lib.EXIT_PCI_CONFIG_READ


# Plain ints, for the one place that compares a kind per exit.
EXIT_KICKED: Final = int(ExitKind.KICKED)
EXIT_PIO_READ: Final = int(ExitKind.PIO_READ)
EXIT_PIO_WRITE: Final = int(ExitKind.PIO_WRITE)
EXIT_MMIO_READ: Final = int(ExitKind.MMIO_READ)
EXIT_MMIO_WRITE: Final = int(ExitKind.MMIO_WRITE)
EXIT_PCI_CONFIG_WRITE: Final = int(ExitKind.PCI_CONFIG_WRITE)
EXIT_HLT: Final = int(ExitKind.HLT)
EXIT_SHUTDOWN: Final = int(ExitKind.SHUTDOWN)
EXIT_SYSTEM_EVENT: Final = int(ExitKind.SYSTEM_EVENT)
EXIT_FAIL_ENTRY: Final = int(ExitKind.FAIL_ENTRY)
EXIT_INTERNAL_ERROR: Final = int(ExitKind.INTERNAL_ERROR)
EXIT_UNKNOWN: Final = int(ExitKind.UNKNOWN)
EXIT_PCI_CONFIG_READ: Final = int(ExitKind.PCI_CONFIG_READ)

# Name to position in a vCPU's counters: first the exits by kind, then what C served.
_COUNTERS: Final[dict[str, int]] = {
    **{kind.name.lower(): int(kind) for kind in ExitKind},
    "uart": lib.COUNT_UART,
    "pci": lib.COUNT_PCI,
    "pio_unclaimed": lib.COUNT_PIO_UNCLAIMED,
    "mmio_unclaimed": lib.COUNT_MMIO_UNCLAIMED,
}


class ExitTable:
    """What C answers without Python, for all vCPUs of a VM.

    Claimed ports and ranges exit to Python. UARTs and reads of PCI config space are served in C.
    Everything else is nobody's: reads answer all-ones, writes go nowhere, both are counted.

    Threads: any, also while vCPUs run; an exit that is under way may still see the table as it was.
    """

    def __init__(self) -> None:
        # Python's own mapping, so that the views of pci_slot() keep it alive by themselves.
        self._pci_memory = mmap.mmap(
            -1, PCI_SLOTS * PCI_SLOT_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
        self._pci_view = memoryview(self._pci_memory)
        self._keepalive_pci = ffi.from_buffer("uint8_t[]", self._pci_memory)
        raw = lib.exit_table_create(self._keepalive_pci)
        if raw == ffi.NULL:
            raise MemoryError("exit table")
        self.raw: CData = ffi.gc(raw, lib.exit_table_destroy)
        self._lock = threading.Lock()
        self._uarts: list[Uart] = []
        self._vcpus: list[CData] = []
        self._gone: list[int] = [0] * lib.VCPU_COUNTERS

    def claim_pio(self, port: int, length: int) -> None:
        """Send accesses that start at these ports to Python.

        Raises:
            ValueError: the range is empty or leaves 0..0xffff.
        """
        self._set_pio(port, length, is_claimed=True)

    def unclaim_pio(self, port: int, length: int) -> None:
        """Make these ports nobody's.

        Raises:
            ValueError: the range is empty or leaves 0..0xffff.
        """
        self._set_pio(port, length, is_claimed=False)

    def _set_pio(self, port: int, length: int, *, is_claimed: bool) -> None:
        if not (0 <= port <= 0xFFFF and 0 < length <= 0x10000 - port):
            raise ValueError(f"port={port:#x} length={length:#x}: must be within 0..0xffff")
        with self._lock:
            lib.exit_table_set_pio(self.raw, port, length, is_claimed)

    def claim_mmio(self, gpa: Gpa | int, length: int) -> None:
        """Send accesses that start in this range to Python.

        Raises:
            ValueError: the range is empty, wraps, meets a claimed one, or is one too many
                (MAX_MMIO_RANGES).
        """
        with self._lock:
            ret = lib.exit_table_claim_mmio(self.raw, gpa, length)
        if ret < 0:
            reason = {
                errno.ERANGE: "empty or past the end of the address space",
                errno.EEXIST: "meets a range that is claimed already",
                errno.ENOSPC: f"there are {MAX_MMIO_RANGES} ranges already",
            }[-ret]
            raise ValueError(f"gpa={gpa:#x} length={length:#x}: {reason}")

    def unclaim_mmio(self, gpa: Gpa | int, length: int) -> None:
        """Make a range nobody's.

        Raises:
            ValueError: this is not exactly a range that was claimed.
        """
        with self._lock:
            ret = lib.exit_table_unclaim_mmio(self.raw, gpa, length)
        if ret < 0:
            raise ValueError(f"gpa={gpa:#x} length={length:#x}: not a claimed range")

    def attach_uart(self, uart: Uart, port: int) -> None:
        """Let C serve a UART at ``port`` and the seven ports after it.

        Raises:
            ValueError: there are four already, or the ports leave 0..0xffff.
        """
        with self._lock:
            ret = lib.exit_table_attach_uart(self.raw, uart.raw, port)
            if ret < 0:
                raise ValueError(f"port={port:#x}: out of range, or one UART too many")
            self._uarts.append(uart)

    def set_ecam(self, gpa: Gpa | int, size_bytes: int) -> None:
        """Place PCI Express config space; 1 MiB is one bus. Size 0 takes it away."""
        with self._lock:
            lib.exit_table_set_ecam(self.raw, gpa, size_bytes)

    def pci_slot(self, slot: int) -> memoryview:
        """The config space of function 0 of a slot of bus 0, which the guest can see from now on.

        C answers the guest's reads from these bytes; its writes come as EXIT_PCI_CONFIG_WRITE, and
        whoever owns the slot changes the bytes accordingly. A vendor id of 0 or 0xffff reads as an
        empty slot to a guest, so fill it in last.

        Returns:
            PCI_SLOT_SIZE writable bytes, zero at first.

        Raises:
            ValueError: ``slot`` is not 0..31.
        """
        view = self._slot_view(slot)
        with self._lock:
            lib.exit_table_set_pci_present(self.raw, slot, True)
        return view

    def pci_remove(self, slot: int) -> None:
        """Make a slot empty: reads answer all-ones, writes are dropped, its bytes are zero again.

        Raises:
            ValueError: ``slot`` is not 0..31.
        """
        view = self._slot_view(slot)
        with self._lock:
            lib.exit_table_set_pci_present(self.raw, slot, False)
            lib.exit_table_trap_pci_reads(self.raw, slot, 0, 0)
            view[:] = bytes(PCI_SLOT_SIZE)

    def pci_trap_reads(self, slot: int, offset: int, length: int) -> None:
        """Make reads that touch these registers exit as EXIT_PCI_CONFIG_READ.

        For registers whose reads do something (VIRTIO 1.2, 4.1.4.9: pci_cfg_data). One range per
        slot; length 0 takes it away.

        Raises:
            ValueError: the range leaves the slot's config space, or ``slot`` is not 0..31.
        """
        self._slot_view(slot)
        if not (offset >= 0 and 0 <= length <= PCI_SLOT_SIZE - offset):
            raise ValueError(f"offset={offset:#x} length={length:#x}: must be within the slot")
        with self._lock:
            lib.exit_table_trap_pci_reads(self.raw, slot, offset, offset + length)

    def _slot_view(self, slot: int) -> memoryview:
        if not 0 <= slot < PCI_SLOTS:
            raise ValueError(f"slot={slot}: must be 0..{PCI_SLOTS - 1}")
        start = slot * PCI_SLOT_SIZE
        return self._pci_view[start : start + PCI_SLOT_SIZE]

    @property
    def pci_address(self) -> int:
        """The latch behind port 0xcf8; a snapshot keeps it."""
        return lib.exit_table_pci_address(self.raw)

    @pci_address.setter
    def pci_address(self, address: int) -> None:
        lib.exit_table_set_pci_address(self.raw, address)

    def add_vcpu(self, raw: CData) -> None:
        """Serve a vCPU by this table; Vcpu does this."""
        with self._lock:
            raw.table = self.raw
            self._vcpus.append(raw)

    def remove_vcpu(self, raw: CData) -> None:
        """Keep only the counts of a vCPU that is gone; Vcpu does this."""
        with self._lock:
            self._vcpus.remove(raw)
            self._gone = [have + raw.counters[i] for i, have in enumerate(self._gone)]

    def counters(self) -> dict[str, int]:
        """How many exits there were, over all vCPUs.

        Returns:
            By lower-case ExitKind name those that came to Python; "uart", "pci", "pio_unclaimed"
            and "mmio_unclaimed" those that C served.
        """
        with self._lock:
            sums = [
                have + sum(raw.counters[i] for raw in self._vcpus)
                for i, have in enumerate(self._gone)
            ]
        return {name: sums[i] for name, i in _COUNTERS.items()}
