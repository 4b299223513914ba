# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""MSI-X: one eventfd per vector, injected by KVM through an irqfd while the vector is unmasked.

A masked vector has no irqfd: whoever signals it only raises the eventfd's count, and that count
is the pending bit. Unmasking binds the irqfd again and KVM injects what is pending. So an engine
signals the same eventfd whatever the guest does to the table.

Source: PCI Local Bus Specification 3.0, 6.8.2; Linux Documentation/virt/kvm/api.rst, KVM_IRQFD.
"""

from __future__ import annotations

import logging
import select
import struct
import threading
from typing import Final

from devices.errors import BadRegisterAccess
from devices.platform import IrqfdVm, MsiRouter
from devices.ratelimit import GuestLog
from kvm_ffi.errors import HostError, KvmError
from kvm_ffi.eventfd import EventFd

log = logging.getLogger(__name__)

PCI_CAP_ID_MSIX: Final = 0x11
ENTRY_SIZE_BYTES: Final = 16
VECTOR_CONTROL_OFFSET: Final = 12
ENTRY_MASKED: Final = 1
CONTROL_ENABLE: Final = 0x8000
CONTROL_FUNCTION_MASK: Final = 0x4000
# One page of table; the specification allows 2048.
MAX_VECTORS: Final = 256


class _Vector:
    """One vector: its eventfd for life; a GSI from its first use on."""

    def __init__(self) -> None:
        self.eventfd = EventFd()
        self.gsi: int | None = None
        self.route: tuple[int, int] | None = None
        self.is_live = False  # the irqfd is assigned


class MsixTable:
    """Table, pending bits and the irqfds behind them.

    Args:
        n_vectors: 1..MAX_VECTORS.
        vm: binds eventfds to GSIs.
        router: owns GSIs and their MSI routes.

    Threads: any; one lock inside, taken after the locks of the PCI host and the device.
    """

    def __init__(self, n_vectors: int, vm: IrqfdVm, router: MsiRouter) -> None:
        if not 1 <= n_vectors <= MAX_VECTORS:
            raise ValueError(f"n_vectors={n_vectors}: must be 1..{MAX_VECTORS}")
        self._vm = vm
        self._router = router
        self._lock = threading.Lock()
        self._vectors = [_Vector() for _ in range(n_vectors)]
        entry = bytes(VECTOR_CONTROL_OFFSET) + struct.pack("<I", ENTRY_MASKED)
        self._table = bytearray(entry * n_vectors)
        self._is_enabled = False
        self._is_function_masked = False
        self._guest_log = GuestLog(log)

    def __len__(self) -> int:
        return len(self._vectors)

    @property
    def is_enabled(self) -> bool:
        """Whether the guest uses MSI-X at all."""
        return self._is_enabled

    @property
    def table_size_bytes(self) -> int:
        """Bytes of the table."""
        return len(self._table)

    def capability(self, bar: int, table_offset: int, pba_offset: int) -> tuple[bytes, bytes]:
        """Return the body and the write mask of the MSI-X capability."""
        body = struct.pack("<HII", len(self._vectors) - 1, table_offset | bar, pba_offset | bar)
        return body, struct.pack("<H", CONTROL_ENABLE | CONTROL_FUNCTION_MASK)

    def eventfd(self, vector: int) -> EventFd | None:
        """Return what to signal for ``vector``; None for a vector that does not exist."""
        return self._vectors[vector].eventfd if 0 <= vector < len(self._vectors) else None

    def set_control(self, control: int) -> None:
        """Take the capability's control word (guest-controlled)."""
        with self._lock:
            self._is_enabled = bool(control & CONTROL_ENABLE)
            self._is_function_masked = bool(control & CONTROL_FUNCTION_MASK)
            self._update(range(len(self._vectors)))

    def read_table(self, offset: int, length: int) -> int:
        """Return table bytes; zeros beyond its end."""
        with self._lock:
            return int.from_bytes(self._table[offset : offset + length], "little")

    def write_table(self, offset: int, length: int, value: int) -> None:
        """Write an aligned dword or qword of the table.

        Raises:
            BadRegisterAccess: another width or alignment, or beyond the table.
        """
        is_aligned = length in (4, 8) and offset % length == 0
        if not is_aligned or offset + length > len(self._table):
            raise BadRegisterAccess(f"MSI-X table offset={offset:#x} length={length}")
        index = offset // ENTRY_SIZE_BYTES
        with self._lock:
            self._table[offset : offset + length] = value.to_bytes(length, "little")
            control = index * ENTRY_SIZE_BYTES + VECTOR_CONTROL_OFFSET
            masked = self._table[control] & ENTRY_MASKED
            struct.pack_into("<I", self._table, control, masked)  # other bits are reserved
            if index < len(self._vectors):  # else a write that was under way at close()
                self._update((index,))

    def read_pending(self, offset: int, length: int) -> int:
        """Return bytes of the pending bit array."""
        bits = 0
        with self._lock:
            first = 8 * offset
            last = min(first + 8 * length, len(self._vectors))
            for index in range(first, last):
                if self._is_pending(self._vectors[index]):
                    bits |= 1 << (index - first)
        return bits

    def close(self) -> None:
        """Unbind every vector, give the GSIs back, close the eventfds."""
        with self._lock:
            self._is_enabled = False
            self._update(range(len(self._vectors)))
            for vector in self._vectors:
                if vector.gsi is not None:
                    self._router.clear_msi(vector.gsi)
                    self._router.free(vector.gsi)
                    vector.gsi = None
                vector.eventfd.close()
            self._vectors.clear()

    def _update(self, indices: range | tuple[int, ...]) -> None:
        """Make routes and irqfds what table and control say; one routing ioctl at most."""
        wanted = [i for i in indices if self._is_unmasked(i)]
        for index in indices:
            vector = self._vectors[index]
            if vector.is_live and index not in wanted:
                self._unbind(vector)
        rerouted = [i for i in wanted if self._stage_route(i)]
        if rerouted and not self._commit(rerouted):
            return
        for index in wanted:
            vector = self._vectors[index]
            if vector.route is not None and not vector.is_live:
                self._bind(vector)

    def _is_unmasked(self, index: int) -> bool:
        control = self._table[index * ENTRY_SIZE_BYTES + VECTOR_CONTROL_OFFSET]
        is_masked = self._is_function_masked or bool(control & ENTRY_MASKED)
        return self._is_enabled and not is_masked

    def _stage_route(self, index: int) -> bool:
        vector = self._vectors[index]
        address, data = struct.unpack_from("<QI", self._table, index * ENTRY_SIZE_BYTES)
        if vector.route == (address, data):
            return False
        if vector.gsi is None:
            try:
                vector.gsi = self._router.allocate_msi()
            except HostError as err:
                self._guest_log.warning("MSI-X vector %d gets no GSI: %s", index, err)
                return False
        self._router.set_msi(vector.gsi, address, data)
        vector.route = (address, data)
        return True

    def _commit(self, rerouted: list[int]) -> bool:
        try:
            self._router.commit()
        except KvmError as err:
            # An address that the kernel refuses must not stay in the table: it would fail the
            # commits of every other device.
            self._guest_log.warning("MSI-X message refused vectors=%s: %s", rerouted, err)
            for index in rerouted:
                vector = self._vectors[index]
                assert vector.gsi is not None
                self._router.clear_msi(vector.gsi)
                vector.route = None
                if vector.is_live:
                    self._unbind(vector)
            return False
        return True

    def _bind(self, vector: _Vector) -> None:
        assert vector.gsi is not None
        # KVM injects at assignment when the count is not zero, but does not clear it, and the
        # next mask would show a stale pending bit. So take the count and signal anew after.
        was_pending = vector.eventfd.drain() > 0
        try:
            self._vm.assign_irqfd(vector.gsi, vector.eventfd)
            vector.is_live = True
        except KvmError as err:
            self._guest_log.warning("MSI-X vector cannot be bound gsi=%d: %s", vector.gsi, err)
        if was_pending:
            vector.eventfd.signal()

    def _unbind(self, vector: _Vector) -> None:
        assert vector.gsi is not None
        vector.is_live = False
        try:
            self._vm.deassign_irqfd(vector.gsi, vector.eventfd)
        except KvmError as err:
            self._guest_log.warning("MSI-X vector cannot be unbound gsi=%d: %s", vector.gsi, err)

    def _is_pending(self, vector: _Vector) -> bool:
        if vector.is_live:
            return False
        poller = select.poll()
        poller.register(vector.eventfd.fd, select.POLLIN)
        return bool(poller.poll(0))
