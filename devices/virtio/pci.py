# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""virtio over PCI: the modern transport, with MSI-X and one ioeventfd per queue.

One 32-bit memory BAR holds everything, a page for each structure (see the offsets below). There
is no INTx: a driver without MSI-X has to poll the ISR register.

Source: VIRTIO 1.2, 4.1 "Virtio Over PCI Bus".
"""

from __future__ import annotations

import logging
import struct
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from devices.bus import all_ones
from devices.errors import BadRegisterAccess
from devices.pci.config import Bar, PciFunction, PciIdentity, overlaps
from devices.pci.msix import PCI_CAP_ID_MSIX, MsixTable
from devices.ratelimit import GuestLog
from kvm_ffi.errors import GuestError, HostError, KvmError
from kvm_ffi.eventfd import EventFd
from kvm_ffi.types import Gpa
from kvm_ffi.virtqueue import Virtqueue

from .common_config import COMMON_CONFIG_LENGTH, CommonConfig
from .ids import (
    ISR_CONFIG,
    PCI_DEVICE_ID_BASE,
    PCI_SUBSYSTEM_ID_BASE,
    PCI_VENDOR_VIRTIO,
    STATUS_DRIVER_OK,
    STATUS_NEEDS_RESET,
)
from .queue import Activation, EnabledQueue

if TYPE_CHECKING:
    from devices.event_loop import EventLoop
    from devices.platform import DeviceVm, MsiRouter
    from kvm_ffi.memory import GuestMemory

    from .device import VirtioDevice

log = logging.getLogger(__name__)

PCI_CAP_ID_VENDOR: Final = 0x09
PCI_REVISION: Final = 1  # 4.1.2: a non-transitional device

# 4.1.4 cfg_type.
CFG_COMMON: Final = 1
CFG_NOTIFY: Final = 2
CFG_ISR: Final = 3
CFG_DEVICE: Final = 4
CFG_PCI: Final = 5

BAR_INDEX: Final = 0
BAR_SIZE_BYTES: Final = 0x8000
PAGE_SHIFT: Final = 12
PAGE_BYTES: Final = 1 << PAGE_SHIFT
COMMON_OFFSET: Final = 0x0000
ISR_OFFSET: Final = 0x1000
DEVICE_OFFSET: Final = 0x2000
NOTIFY_OFFSET: Final = 0x3000
MSIX_TABLE_OFFSET: Final = 0x4000
MSIX_PBA_OFFSET: Final = 0x5000
NOTIFY_MULTIPLIER: Final = 4

# Offsets in the PCI configuration access capability, 4.1.4.9.
PCI_CFG_BAR: Final = 4
PCI_CFG_OFFSET: Final = 8
PCI_CFG_DATA: Final = 16


class VirtioPci(PciFunction):
    """One virtio device in one PCI slot.

    Args:
        device: what it is; owned from now on.
        vm: binds ioeventfds and irqfds.
        router: owns the GSIs of the vectors.
        memory: guest RAM.
        event_loop: serves kicks of slow devices, and faults.
        notify_length: width of the writes that the ioeventfds match; 0 matches any
            (KVM_CAP_IOEVENTFD_ANY_LENGTH), else 2, which is what 4.1.5.2 prescribes.

    Threads: BAR accesses from any vCPU thread, config_changed() from any. Locks are taken in the
    order PCI host, transport, device or MSI-X table.
    """

    def __init__(
        self,
        device: VirtioDevice,
        *,
        vm: DeviceVm,
        router: MsiRouter,
        memory: GuestMemory,
        event_loop: EventLoop,
        notify_length: int = 0,
    ) -> None:
        device_id = device.DEVICE_ID
        super().__init__(
            PciIdentity(
                PCI_VENDOR_VIRTIO,
                PCI_DEVICE_ID_BASE + device_id,
                device.PCI_CLASS,
                PCI_REVISION,
                PCI_VENDOR_VIRTIO,
                PCI_SUBSYSTEM_ID_BASE + device_id,
            ),
        )
        self.device = device
        device.config_changed = self.config_changed
        self._vm = vm
        self._memory = memory
        self._event_loop = event_loop
        self._notify_length = notify_length
        self._lock = threading.RLock()
        self._guest_log = GuestLog(log)
        n_queues = len(device.QUEUE_SIZES)
        # One vector for each queue and one for configuration changes.
        self._msix = MsixTable(n_queues + 1, vm, router)
        self._common = CommonConfig(device.features, device.QUEUE_SIZES, n_queues + 1, self)
        self._kicks = tuple(EventFd() for _ in range(n_queues))
        self._fault = EventFd()
        self._isr = 0
        self._is_active = False
        self._is_closed = False
        self._epoch = 0  # counts resets, so that a late fault is not blamed on the next driver
        self._ioeventfds: dict[int, int] = {}  # queue index -> gpa
        self._config_length = len(device.config_space())
        self._readers = self._make_readers()
        self._writers = self._make_writers()
        self.add_bar(Bar(BAR_INDEX, BAR_SIZE_BYTES, self))
        self._add_capabilities(n_queues)

    # ---- set-up

    def _add_capabilities(self, n_queues: int) -> None:
        body, writable = self._msix.capability(BAR_INDEX, MSIX_TABLE_OFFSET, MSIX_PBA_OFFSET)
        self._msix_capability = self.add_capability(PCI_CAP_ID_MSIX, body, writable)
        self._add_structure(CFG_COMMON, COMMON_OFFSET, COMMON_CONFIG_LENGTH)
        self._add_structure(CFG_ISR, ISR_OFFSET, 1)
        if self._config_length:
            self._add_structure(CFG_DEVICE, DEVICE_OFFSET, self._config_length)
        multiplier = struct.pack("<I", NOTIFY_MULTIPLIER)
        self._add_structure(CFG_NOTIFY, NOTIFY_OFFSET, n_queues * NOTIFY_MULTIPLIER, multiplier)
        self._pci_cfg = self._add_structure(CFG_PCI, 0, 0, bytes(4))
        self.trapped_reads = (self._pci_cfg + PCI_CFG_DATA, 4)

    def _add_structure(self, cfg_type: int, offset: int, length: int, tail: bytes = b"") -> int:
        # struct virtio_pci_cap after its first two bytes: length, type, BAR, id, padding, place.
        body = struct.pack("<BBBB2xII", 16 + len(tail), cfg_type, BAR_INDEX, 0, offset, length)
        writable = b""
        if cfg_type == CFG_PCI:
            writable = b"\x00\x00\xff\x00\x00\x00" + b"\xff" * 12
        return self.add_capability(PCI_CAP_ID_VENDOR, body + tail, writable)

    def _make_readers(self) -> dict[int, Callable[[int, int], int]]:
        return {
            COMMON_OFFSET >> PAGE_SHIFT: self._common.read,
            ISR_OFFSET >> PAGE_SHIFT: self._read_isr,
            DEVICE_OFFSET >> PAGE_SHIFT: self._read_device_config,
            MSIX_TABLE_OFFSET >> PAGE_SHIFT: self._msix.read_table,
            MSIX_PBA_OFFSET >> PAGE_SHIFT: self._msix.read_pending,
        }

    def _make_writers(self) -> dict[int, Callable[[int, int, int], None]]:
        return {
            COMMON_OFFSET >> PAGE_SHIFT: self._common.write,
            DEVICE_OFFSET >> PAGE_SHIFT: self._write_device_config,
            NOTIFY_OFFSET >> PAGE_SHIFT: self._write_notify,
            MSIX_TABLE_OFFSET >> PAGE_SHIFT: self._msix.write_table,
        }

    # ---- the BAR; offset, length and value are guest-controlled

    def read(self, offset: int, length: int) -> int:
        """Read from the BAR; a page that holds nothing readable answers 0."""
        reader = self._readers.get(_page(offset, length))
        if reader is None:
            return 0
        with self._lock:
            return all_ones(length) if self._is_closed else reader(offset % PAGE_BYTES, length)

    def write(self, offset: int, length: int, value: int) -> None:
        """Write to the BAR.

        Raises:
            BadRegisterAccess: the driver broke a rule; nothing has changed.
        """
        writer = self._writers.get(_page(offset, length))
        if writer is None:
            raise BadRegisterAccess(f"{self.device.name}: BAR offset={offset:#x} is read-only")
        with self._lock:
            if not self._is_closed:
                writer(offset % PAGE_BYTES, length, value)

    def _read_isr(self, offset: int, length: int) -> int:
        if offset != 0:
            return 0
        isr, self._isr = self._isr, 0  # reading acknowledges (4.1.4.5)
        return isr

    def _read_device_config(self, offset: int, length: int) -> int:
        return int.from_bytes(self.device.config_space()[offset : offset + length], "little")

    def _write_device_config(self, offset: int, length: int, value: int) -> None:
        if offset + length > self._config_length:
            raise BadRegisterAccess(f"{self.device.name}: config offset={offset:#x}")
        self.device.write_config(offset, value.to_bytes(length, "little"))

    def _write_notify(self, offset: int, length: int, value: int) -> None:
        # The address tells the queue; KVM's ioeventfds take these writes except where the host
        # could not register one, or the driver uses another width.
        index = offset // NOTIFY_MULTIPLIER
        if index >= len(self._kicks):
            raise BadRegisterAccess(f"{self.device.name}: kick of queue {index}")
        if self._is_active:
            self._kicks[index].signal()

    # ---- what the driver's status writes lead to (StatusOwner)

    def accepts(self, features: int) -> bool:
        """Ask the device about a subset of its features."""
        return self.device.accepts(features)

    def driver_ok(self) -> None:
        """Build the queues and start the device; whatever fails makes it need a reset."""
        self._epoch += 1
        try:
            self.device.activate(self._make_activation())
        except (GuestError, HostError, OSError) as err:
            self.device.reset()
            self._need_reset(f"cannot start: {err}")
            return
        self._is_active = True
        self._event_loop.add(self._fault, partial(self._on_fault, self._epoch))
        self._assign_ioeventfds()

    def device_reset(self) -> None:
        """Stop the device and forget what was pending; vectors go with the registers."""
        self._isr = 0
        if not self._is_active:
            return
        self._is_active = False
        self._epoch += 1
        self._deassign_ioeventfds()
        self._event_loop.remove(self._fault)
        self.device.reset()
        for eventfd in (*self._kicks, self._fault):
            eventfd.drain()

    def _make_activation(self) -> Activation:
        queues: dict[int, EnabledQueue] = {}
        features = self._common.negotiated
        for index, regs in enumerate(self._common.queues):
            if not regs.is_enabled:
                continue
            addresses = (Gpa(regs.desc_gpa), Gpa(regs.avail_gpa), Gpa(regs.used_gpa))
            queue = Virtqueue(self._memory, index, regs.size, *addresses, features)
            queues[index] = EnabledQueue(queue, self._kicks[index], self._msix.eventfd(regs.vector))
        return Activation(features, queues, self._fault, self._event_loop, self._memory)

    # ---- from the device to the driver

    def config_changed(self) -> None:
        """Tell the driver that the config space changed; any thread."""
        with self._lock:
            self._common.generation = (self._common.generation + 1) & 0xFF
            self._signal_config()

    def _on_fault(self, epoch: int) -> None:
        reason = self.device.fault_reason()
        with self._lock:
            if epoch != self._epoch:
                if self._is_active:
                    # The signal may be the next driver's, drained by a callback of the last one.
                    self._fault.signal()
            elif reason is not None:
                self._need_reset(reason)

    def _need_reset(self, reason: str) -> None:
        self._guest_log.warning("device needs reset name=%s: %s", self.device.name, reason)
        self._common.status |= STATUS_NEEDS_RESET
        self._signal_config()

    def _signal_config(self) -> None:
        if not self._common.status & STATUS_DRIVER_OK:
            return  # 2.1.2: no notification before DRIVER_OK
        if not self._msix.is_enabled:
            self._isr |= ISR_CONFIG
            return
        eventfd = self._msix.eventfd(self._common.config_vector)
        if eventfd is not None:
            eventfd.signal()

    # ---- ioeventfds: one for each queue while the device runs and its BAR is mapped

    def bar_mapped(self, bar: Bar, gpa: int) -> None:
        """Let kicks go straight to eventfds at the new address."""
        with self._lock:
            self._assign_ioeventfds()

    def bar_unmapped(self, bar: Bar, gpa: int) -> None:
        """Stop that at the old address."""
        with self._lock:
            self._deassign_ioeventfds()

    def _assign_ioeventfds(self) -> None:
        base = self.mapped_at(BAR_INDEX)
        if base is None or not self._is_active:
            return
        for index, kick in enumerate(self._kicks):
            if index in self._ioeventfds:
                continue
            gpa = base + NOTIFY_OFFSET + index * NOTIFY_MULTIPLIER
            try:
                self._vm.assign_ioeventfd(gpa, self._notify_length, kick)
            except KvmError as err:
                # Slower, but not wrong: the write then exits and _write_notify kicks.
                self._guest_log.warning("no ioeventfd name=%s: %s", self.device.name, err)
                continue
            self._ioeventfds[index] = gpa

    def _deassign_ioeventfds(self) -> None:
        for index, gpa in self._ioeventfds.items():
            try:
                self._vm.deassign_ioeventfd(gpa, self._notify_length, self._kicks[index])
            except KvmError as err:
                self._guest_log.warning("ioeventfd stays name=%s: %s", self.device.name, err)
        self._ioeventfds.clear()

    # ---- PCI configuration space

    def config_written(self, register: int, length: int) -> None:
        """React to writes of the MSI-X control word and of the access window to the BAR."""
        control = self._msix_capability + 2
        if overlaps(register, length, control, 2):
            self._msix.set_control(super().config_read(control, 2))
        data = self._pci_cfg + PCI_CFG_DATA
        if overlaps(register, length, data, 4):
            offset, width = self._window()
            self.write(offset, width, super().config_read(data, width))

    def config_read(self, register: int, length: int) -> int:
        """Read configuration bytes; reading the access window reads the BAR (4.1.4.9.1)."""
        data = self._pci_cfg + PCI_CFG_DATA
        if overlaps(register, length, data, 4):
            offset, width = self._window()
            self.poke(data, self.read(offset, width).to_bytes(width, "little"))
        return super().config_read(register, length)

    def _window(self) -> tuple[int, int]:
        """Return where the access window points.

        Raises:
            BadRegisterAccess: outside the BAR, or in a width or alignment that 4.1.4.9 forbids.
        """
        bar = super().config_read(self._pci_cfg + PCI_CFG_BAR, 1)
        place = super().config_read(self._pci_cfg + PCI_CFG_OFFSET, 8)
        offset, width = place & 0xFFFFFFFF, place >> 32
        is_valid = bar == BAR_INDEX and width in (1, 2, 4) and offset % width == 0
        if not is_valid or offset + width > BAR_SIZE_BYTES:
            raise BadRegisterAccess(f"PCI access window bar={bar} offset={offset:#x} {width=}")
        return offset, width

    # ---- life

    def quiesce(self) -> None:
        """Let the device finish what is in flight and hold still (for pause and snapshots).

        Raises:
            TimeoutError: a request took too long; the device runs on.
        """
        self.device.quiesce()

    def resume(self) -> None:
        """Go on after quiesce()."""
        self.device.resume()

    def close(self) -> None:
        """Stop the device and close it and every eventfd; a second call does nothing."""
        with self._lock:
            if self._is_closed:
                return
            self.device_reset()
            self.device.close()
            self._msix.close()
            for eventfd in (*self._kicks, self._fault):
                eventfd.close()
            self._is_closed = True


def _page(offset: int, length: int) -> int:
    page = offset >> PAGE_SHIFT
    if (offset + length - 1) >> PAGE_SHIFT != page:
        raise BadRegisterAccess(f"BAR offset={offset:#x} length={length} spans two structures")
    return page
