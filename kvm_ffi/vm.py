# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A VM descriptor: memslots, interrupt controllers, ioeventfds, irqfds, the clock."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from ._kvm import ffi, lib
from .errors import CapabilityMissing
from .exits import ExitTable
from .ioctl import check, get_blob, ioctl_int, ioctl_ptr, new_array, set_blob
from .irq_routing import IrqchipRoute
from .vcpu import Vcpu

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from .capabilities import Capabilities
    from .eventfd import EventFd
    from .irq_routing import GsiRoute
    from .memory import GuestMemory
    from .types import Gpa, Hva

_PAGE_SIZE: Final = 4096  # of the guest's dirty bitmap: x86-64 has no other


@dataclass(frozen=True, slots=True)
class ClockState:
    """The VM's kvmclock (struct kvm_clock_data).

    Attributes:
        clock_ns: what guests see.
        flags: KVM_CLOCK_*: which of the others are valid.
        realtime_ns: host CLOCK_REALTIME at the same moment.
        host_tsc: host TSC at the same moment.
    """

    clock_ns: int
    flags: int = 0
    realtime_ns: int = 0
    host_tsc: int = 0


class Vm:
    """One VM. Made by Kvm.create_vm().

    Set every memslot before create_irqchip() and the first create_vcpu(): each one costs 0.1-0.2 ms
    before, and 2-7 ms after either (an SRCU grace period in the kernel).

    Every method raises KvmError, naming the ioctl, when the host refuses.

    Threads: any; KVM serializes what needs it. close() comes last, when no thread is in Vcpu.run().

    Source: Linux Documentation/virt/kvm/api.rst, the section named with each method.
    """

    def __init__(self, fd: int, capabilities: Capabilities, run_size_bytes: int) -> None:
        self.fd = fd
        self.capabilities = capabilities
        self._run_size_bytes = run_size_bytes
        self._vcpus: list[Vcpu] = []

    # Memory

    def set_memslot(
        self,
        slot_id: int,
        gpa: Gpa,
        size_bytes: int,
        hva: Hva,
        *,
        log_dirty: bool = False,
        read_only: bool = False,
    ) -> None:
        """Back a guest-physical range by host memory; size 0 deletes the slot (4.35).

        Args:
            slot_id: 0 to capabilities.max_memslots - 1.
            gpa: page aligned.
            size_bytes: whole pages.
            hva: page aligned; must stay mapped as long as the slot is there.
            log_dirty: let get_dirty_log() see the guest's writes.
            read_only: make guest writes exit as MMIO.
        """
        flags = (lib.KVM_MEM_LOG_DIRTY_PAGES if log_dirty else 0) | (
            lib.KVM_MEM_READONLY if read_only else 0
        )
        region = ffi.new(
            "struct kvm_userspace_memory_region *",
            {
                "slot": slot_id,
                "flags": flags,
                "guest_phys_addr": gpa,
                "memory_size": size_bytes,
                "userspace_addr": hva,
            },
        )
        ioctl_ptr(self.fd, "KVM_SET_USER_MEMORY_REGION", region)

    def add_guest_memory(self, memory: GuestMemory, *, log_dirty: bool = False) -> None:
        """Make each region of guest RAM a memslot, in order from slot 0."""
        for slot_id, region in enumerate(memory.regions):
            self.set_memslot(
                slot_id, region.gpa, region.size_bytes, region.hva, log_dirty=log_dirty
            )

    def get_dirty_log(self, slot_id: int, size_bytes: int) -> bytes:
        """Fetch and clear the bitmap of pages written since the last call (4.8).

        Args:
            slot_id: a slot that was set with log_dirty.
            size_bytes: of the whole slot, as it was set.

        Returns:
            One bit per 4 KiB page, least significant first, padded to 8 bytes.
        """
        pages = -(-size_bytes // _PAGE_SIZE)
        bitmap = ffi.new("uint8_t[]", -(-pages // 64) * 8)
        check("KVM_GET_DIRTY_LOG", lib.kvm_get_dirty_log(self.fd, slot_id, bitmap))
        return bytes(ffi.buffer(bitmap))

    def set_tss_address(self, gpa: Gpa) -> None:
        """Give Intel hosts three pages below 4 GiB that no memslot covers (4.36)."""
        ioctl_int(self.fd, "KVM_SET_TSS_ADDR", gpa)

    def set_identity_map_address(self, gpa: Gpa) -> None:
        """Give Intel hosts one more such page; before the first vCPU (4.41)."""
        ioctl_ptr(self.fd, "KVM_SET_IDENTITY_MAP_ADDR", ffi.new("uint64_t *", gpa))

    # Interrupt controllers and timers

    def create_irqchip(self) -> None:
        """Create the PICs, the IOAPIC and, in every later vCPU, the local APIC (4.24)."""
        ioctl_int(self.fd, "KVM_CREATE_IRQCHIP")

    def create_pit(self) -> None:
        """Create the i8254, with port 0x61 served by KVM as well; after create_irqchip() (4.71)."""
        config = ffi.new("struct kvm_pit_config *", {"flags": lib.KVM_PIT_SPEAKER_DUMMY})
        ioctl_ptr(self.fd, "KVM_CREATE_PIT2", config)

    def get_irqchip(self, chip_id: int) -> bytes:
        """Save one controller: KVM_IRQCHIP_PIC_MASTER, _PIC_SLAVE or _IOAPIC (4.26)."""
        chip = ffi.new("struct kvm_irqchip *", {"chip_id": chip_id})
        ioctl_ptr(self.fd, "KVM_GET_IRQCHIP", chip)
        return bytes(ffi.buffer(chip))

    def set_irqchip(self, state: bytes) -> None:
        """Restore what get_irqchip() saved; the bytes know which controller they are (4.27)."""
        set_blob(self.fd, "KVM_SET_IRQCHIP", "struct kvm_irqchip", state)

    def get_pit(self) -> bytes:
        """Save the i8254 (4.72)."""
        return get_blob(self.fd, "KVM_GET_PIT2", "struct kvm_pit_state2")

    def set_pit(self, state: bytes) -> None:
        """Restore what get_pit() saved (4.73)."""
        set_blob(self.fd, "KVM_SET_PIT2", "struct kvm_pit_state2", state)

    def get_clock(self) -> ClockState:
        """Read the VM's kvmclock (4.29)."""
        data = ffi.new("struct kvm_clock_data *")
        ioctl_ptr(self.fd, "KVM_GET_CLOCK", data)
        return ClockState(data.clock, data.flags, data.realtime, data.host_tsc)

    def set_clock(self, state: ClockState, *, add_elapsed: bool = False) -> None:
        """Set the VM's kvmclock (4.30).

        Args:
            state: what get_clock() returned, here or on another host.
            add_elapsed: let the clock have run on by host CLOCK_REALTIME since then.
        """
        flags = lib.KVM_CLOCK_REALTIME if add_elapsed else 0
        data = ffi.new(
            "struct kvm_clock_data *",
            {"clock": state.clock_ns, "flags": flags, "realtime": state.realtime_ns},
        )
        ioctl_ptr(self.fd, "KVM_SET_CLOCK", data)

    # Interrupts

    def set_gsi_routing(self, routes: Sequence[GsiRoute]) -> None:
        """Replace the whole GSI table (4.52); see irq_routing.IrqRouter, which owns it."""
        _memory, header, entries = new_array(
            "struct kvm_irq_routing", "struct kvm_irq_routing_entry", len(routes)
        )
        header.nr = len(routes)
        for i, route in enumerate(routes):
            if isinstance(route, IrqchipRoute):
                lib.kvm_route_to_irqchip(entries + i, route.gsi, route.irqchip, route.pin)
            else:
                lib.kvm_route_to_msi(entries + i, route.gsi, route.address, route.data)
        ioctl_ptr(self.fd, "KVM_SET_GSI_ROUTING", header)

    def set_irq_line(self, gsi: int, level: bool) -> None:
        """Raise or lower an interrupt line (4.25); an edge needs both."""
        check("KVM_IRQ_LINE", lib.kvm_set_irq_line(self.fd, gsi, int(level)))

    def signal_msi(self, address: int, data: int) -> bool:
        """Deliver one MSI (4.70).

        Returns:
            Whether a local APIC took it; False if the guest blocks it.
        """
        msi = ffi.new(
            "struct kvm_msi *",
            {"address_lo": address & 0xFFFF_FFFF, "address_hi": address >> 32, "data": data},
        )
        return ioctl_ptr(self.fd, "KVM_SIGNAL_MSI", msi) > 0

    def assign_irqfd(self, gsi: int, eventfd: EventFd) -> None:
        """Inject a GSI whenever the eventfd is signalled; a count it already has counts (4.75)."""
        self._irqfd(gsi, eventfd, 0)

    def deassign_irqfd(self, gsi: int, eventfd: EventFd) -> None:
        """Stop that; returns when no injection is under way. Later signals stay in the eventfd."""
        self._irqfd(gsi, eventfd, lib.KVM_IRQFD_FLAG_DEASSIGN)

    def _irqfd(self, gsi: int, eventfd: EventFd, flags: int) -> None:
        irqfd = ffi.new("struct kvm_irqfd *", {"fd": eventfd.fd, "gsi": gsi, "flags": flags})
        ioctl_ptr(self.fd, "KVM_IRQFD", irqfd)

    # Guest-to-host notifications

    def assign_ioeventfd(
        self,
        address: int,
        length: int,
        eventfd: EventFd,
        *,
        is_pio: bool = False,
        datamatch: int | None = None,
    ) -> None:
        """Turn a guest write into an eventfd signal, without an exit to user space (4.59).

        Args:
            address: gpa, or port if is_pio.
            length: 1, 2, 4 or 8: only writes of this width match; 0 matches any width.
            eventfd: signalled once per write.
            is_pio: a port instead of memory.
            datamatch: only a write of this value matches; None matches any.
        """
        self._ioeventfd(address, length, eventfd, is_pio, datamatch, 0)

    def deassign_ioeventfd(
        self,
        address: int,
        length: int,
        eventfd: EventFd,
        *,
        is_pio: bool = False,
        datamatch: int | None = None,
    ) -> None:
        """Undo assign_ioeventfd(); the arguments must be the same."""
        flags = lib.KVM_IOEVENTFD_FLAG_DEASSIGN
        self._ioeventfd(address, length, eventfd, is_pio, datamatch, flags)

    def _ioeventfd(
        self,
        address: int,
        length: int,
        eventfd: EventFd,
        is_pio: bool,
        datamatch: int | None,
        flags: int,
    ) -> None:
        if is_pio:
            flags |= lib.KVM_IOEVENTFD_FLAG_PIO
        if datamatch is not None:
            flags |= lib.KVM_IOEVENTFD_FLAG_DATAMATCH
        ioeventfd = ffi.new(
            "struct kvm_ioeventfd *",
            {
                "addr": address,
                "len": length,
                "fd": eventfd.fd,
                "flags": flags,
                "datamatch": datamatch or 0,
            },
        )
        ioctl_ptr(self.fd, "KVM_IOEVENTFD", ioeventfd)

    def register_coalesced_pio(self, port: int, length: int) -> None:
        """Let KVM gather guest writes to ports in a ring instead of exiting (4.116).

        Vcpu.take_coalesced_writes() empties the ring, which has room for 170 writes; the next one
        exits.
        """
        self._coalesce("KVM_REGISTER_COALESCED_MMIO", port, length, is_pio=True)

    def register_coalesced_mmio(self, gpa: Gpa, length: int) -> None:
        """The same for a range of guest-physical addresses (4.116)."""
        self._coalesce("KVM_REGISTER_COALESCED_MMIO", gpa, length, is_pio=False)

    def unregister_coalesced_pio(self, port: int, length: int) -> None:
        """Undo register_coalesced_pio() with the same arguments."""
        self._coalesce("KVM_UNREGISTER_COALESCED_MMIO", port, length, is_pio=True)

    def unregister_coalesced_mmio(self, gpa: Gpa, length: int) -> None:
        """Undo register_coalesced_mmio() with the same arguments."""
        self._coalesce("KVM_UNREGISTER_COALESCED_MMIO", gpa, length, is_pio=False)

    def _coalesce(self, request: str, address: int, length: int, *, is_pio: bool) -> None:
        number = getattr(lib, request)
        check(request, lib.kvm_coalesced_zone(self.fd, number, address, length, is_pio))

    # The rest

    def create_vcpu(self, index: int, exit_table: ExitTable | None = None) -> Vcpu:
        """Create a vCPU; its index is its APIC id (4.7).

        Args:
            index: 0 to capabilities.max_vcpus - 1; vCPU 0 boots, the others wait for INIT and SIPI.
            exit_table: which exits come to Python; None claims nothing, so that C serves all.

        Raises:
            KvmError: EEXIST if there is one with this index, EINVAL for an index out of range.
        """
        fd = ioctl_int(self.fd, "KVM_CREATE_VCPU", index)
        try:
            vcpu = Vcpu(
                index, fd, self._run_size_bytes, self.capabilities, exit_table or ExitTable()
            )
        except BaseException:
            os.close(fd)
            raise
        self._vcpus.append(vcpu)
        return vcpu

    def check_extension(self, name: str) -> int:
        """What KVM_CHECK_EXTENSION says for this VM, which may be less than for the host (4.4)."""
        return ioctl_int(self.fd, "KVM_CHECK_EXTENSION", getattr(lib, name))

    def enable_cap(self, name: str, *args: int) -> None:
        """Switch a capability on for this VM (4.37).

        Args:
            name: UAPI name.
            args: up to four, as api.rst 7 says for that capability.

        Raises:
            CapabilityMissing: the host lacks it.
        """
        if not self.capabilities.has(name):
            raise CapabilityMissing(name)
        cap = ffi.new("struct kvm_enable_cap *", {"cap": getattr(lib, name), "args": args})
        ioctl_ptr(self.fd, "KVM_ENABLE_CAP", cap)

    def close(self) -> None:
        """Close the vCPUs and the VM; KVM frees it when the last user of the descriptor is gone.

        Raises:
            KvmError: EBUSY, a thread is in Vcpu.run(); kick it and wait for it first.
        """
        while self._vcpus:
            self._vcpus[-1].close()
            self._vcpus.pop()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
