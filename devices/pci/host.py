# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The PCI host: bus 0 with its slots, the host bridge, and the windows that BARs live in.

Source: PCI Local Bus Specification 3.0, 3.2.2.3; PCI Firmware Specification 3.2 (ECAM).
"""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import Final

from devices.bus import AddressWindow, Bus, all_ones
from devices.platform import PciConfigStore
from devices.ratelimit import GuestLog
from kvm_ffi.errors import GuestError

from .config import Bar, PciFunction, PciIdentity

log = logging.getLogger(__name__)

SLOT_COUNT: Final = 32
HOST_BRIDGE_SLOT: Final = 0
SLOT_SHIFT: Final = 12  # an address is slot << 12 | register
REGISTER_MASK: Final = 0xFFF
# "QEMU PCIe Host bridge": an identity that every guest takes for a plain bridge.
HOST_BRIDGE: Final = PciIdentity(0x1B36, 0x0008, 0x060000, 0, 0x1AF4, 0x1100)


class _Remains:
    """What is left of a BAR whose function was pulled out."""

    def read(self, offset: int, length: int) -> int:
        return 0

    def write(self, offset: int, length: int, value: int) -> None:
        pass


class PciHost:
    """Slots, configuration writes, and BAR placement.

    Args:
        config_store: the exit table, whose bytes C serves configuration reads from.
        mmio: the bus that mapped BARs are claimed on.
        window_32: where 32-bit BARs may be; the guest learns of it by _CRS.
        window_64: where 64-bit BARs may be, or None.

    Threads: any; one lock, taken before any lock of a function.
    """

    def __init__(
        self,
        config_store: PciConfigStore,
        mmio: Bus,
        window_32: AddressWindow,
        window_64: AddressWindow | None = None,
    ) -> None:
        self._config_store = config_store
        self._mmio = mmio
        self._window_32 = window_32
        self._window_64 = window_64
        self._lock = threading.RLock()
        self._functions: dict[int, PciFunction] = {}
        self._placed: dict[int, list[tuple[int, int]]] = {}
        self._remains: dict[int, int] = {}
        self._guest_log = GuestLog(log)
        self.attach(PciFunction(HOST_BRIDGE), HOST_BRIDGE_SLOT)

    def attach(self, function: PciFunction, slot: int | None = None) -> int:
        """Put a function into a slot (the lowest free one) and return the slot.

        Guests number disks and interfaces by slot, so the order of the calls is their order.

        Raises:
            ValueError: the slot is taken or none is free, or the BARs do not fit the windows.
        """
        with self._lock:
            if slot is None:
                slot = next((s for s in range(1, SLOT_COUNT) if s not in self._functions), None)
            if slot is None or slot in self._functions or not 0 <= slot < SLOT_COUNT:
                raise ValueError(f"PCI slot {'any' if slot is None else slot} is not free")
            self._placed[slot] = self._place_bars(function)
            self._functions[slot] = function
            function.bind(self._config_store.pci_slot(slot), self)
            if function.trapped_reads is not None:
                self._config_store.pci_trap_reads(slot, *function.trapped_reads)
            return slot

    def is_free(self, slot: int) -> bool:
        """Whether a function can be attached to ``slot``."""
        with self._lock:
            return slot not in self._functions

    def detach(self, slot: int) -> PciFunction:
        """Take a function out of its slot.

        Raises:
            ValueError: the slot is empty, or holds the host bridge.
        """
        with self._lock:
            if slot == HOST_BRIDGE_SLOT or slot not in self._functions:
                raise ValueError(f"PCI slot {slot} holds nothing that can be taken out")
            function = self._functions.pop(slot)
            del self._placed[slot]
            function.unbind()
            self._config_store.pci_remove(slot)
            return function

    def pull(self, slot: int) -> PciFunction:
        """Take a function out of its slot by surprise; what was mapped of it reads as zeros then.

        Linux's virtio driver resets the device that it has lost and waits for a status of 0 without
        an end (vp_reset in drivers/virtio/virtio_pci_modern.c): all ones would hold it for ever.
        What is left goes when the guest puts something else there.

        Raises:
            ValueError: as detach().
        """
        with self._lock:
            present = self._functions.get(slot)
            places = {} if present is None else present.mapped
            function = self.detach(slot)
            for gpa, size_bytes in places.items():
                # Where the exit table is full it reads as all ones, as any gap does.
                with contextlib.suppress(ValueError):
                    self._mmio.add(gpa, size_bytes, _Remains())
                    self._remains[gpa] = size_bytes
            return function

    def config_write(self, address: int, length: int, value: int) -> None:
        """Serve EXIT_PCI_CONFIG_WRITE: ``address`` is slot << 12 | register, guest-controlled."""
        with self._lock:
            function = self._functions.get(address >> SLOT_SHIFT)
            if function is None:
                return
            try:
                function.config_write(address & REGISTER_MASK, length, value & all_ones(length))
            except GuestError as err:
                self._guest_log.warning("bad config write address=%#x: %s", address, err)

    def config_read(self, address: int, length: int) -> int:
        """Serve EXIT_PCI_CONFIG_READ, a read that C hands out; all ones where nothing answers."""
        with self._lock:
            function = self._functions.get(address >> SLOT_SHIFT)
            if function is None:
                return all_ones(length)
            try:
                return function.config_read(address & REGISTER_MASK, length) & all_ones(length)
            except GuestError as err:
                self._guest_log.warning("bad config read address=%#x: %s", address, err)
                return all_ones(length)

    def map_bar(self, bar: Bar, gpa: int) -> bool:
        """Claim the BAR's range, unless it leaves the windows or hits another BAR."""
        windows = (self._window_32, self._window_64)
        if not any(w is not None and w.contains(gpa, bar.size_bytes) for w in windows):
            self._guest_log.warning("BAR outside the PCI windows gpa=%#x", gpa)
            return False
        for base, length in list(self._remains.items()):
            if gpa < base + length and base < gpa + bar.size_bytes:
                del self._remains[base]
                self._mmio.remove(base)
        try:
            self._mmio.add(gpa, bar.size_bytes, bar.handler)
        except ValueError as err:
            self._guest_log.warning("BAR refused: %s", err)
            return False
        return True

    def unmap_bar(self, bar: Bar, gpa: int) -> None:
        """Release the BAR's range."""
        self._mmio.remove(gpa)

    def _place_bars(self, function: PciFunction) -> list[tuple[int, int]]:
        taken = [piece for pieces in self._placed.values() for piece in pieces]
        mine: list[tuple[int, int]] = []
        for bar in function.bars:
            gpa = self._find_room(bar, sorted(taken + mine))
            mine.append((gpa, bar.size_bytes))
            function.place_bar(bar.index, gpa)
        return mine

    def _find_room(self, bar: Bar, taken: list[tuple[int, int]]) -> int:
        window = self._window_64 if bar.is_64bit and self._window_64 else self._window_32
        size = bar.size_bytes
        gpa = -(-window.base // size) * size
        for base, length in taken:
            if gpa < base + length and base < gpa + size:
                gpa = -(-(base + length) // size) * size
        if not window.contains(gpa, size):
            raise ValueError(f"BAR {bar.index} of {size:#x} bytes does not fit its window")
        return gpa
