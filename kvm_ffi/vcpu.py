# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A vCPU descriptor: run it, kick it, read and write its state."""

from __future__ import annotations

import errno
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from ._kvm import ffi, lib
from .errors import KvmError
from .ioctl import check, get_blob, ioctl_int, ioctl_ptr, new_array, set_blob
from .types import Gpa
from .x86_state import (
    CpuidEntry,
    Regs,
    Sregs,
    cpuid_from_c,
    cpuid_to_c,
    regs_from_c,
    regs_to_c,
    sregs_from_c,
    sregs_to_c,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import TracebackType

    from ._kvm import CData
    from .capabilities import Capabilities
    from .exits import ExitTable

_MAX_CPUID_ENTRIES: Final = 256


def install_kick_signal() -> None:
    """Make SIGRTMIN interrupt a thread instead of killing the process; once, before the first kick.

    The handler is in C and does nothing; Python's signal machinery is not involved. Threads that
    run vCPUs must not block the signal.

    Raises:
        KvmError: sigaction failed.

    Source: Linux Documentation/virt/kvm/api.rst 5 "The kvm_run structure", immediate_exit.
    """
    check("sigaction", lib.vcpu_install_kick_signal())


@dataclass(frozen=True, slots=True)
class CoalescedWrite:
    """One guest write that KVM gathered: ``address`` is a port if ``is_pio``, else a gpa."""

    address: int
    value: int
    length: int
    is_pio: bool


class Vcpu:
    """One vCPU. Made by Vm.create_vcpu().

    Attributes:
        index: from 0; also the APIC id.
        exit: what run() stopped for, a struct vcpu_exit with the fields kind, len, addr, value,
            suberror, ndata and data[]; changes with every run(). Everything in it is
            guest-controlled.

    Every method raises KvmError, naming the ioctl, when the host refuses.

    Threads: run() by one thread at a time; kick() by any. Reading and writing state is for a vCPU
        that no
    thread runs (KVM would block the caller until the guest exits).

    Source: Linux Documentation/virt/kvm/api.rst, the section named with each method.
    """

    def __init__(
        self,
        index: int,
        fd: int,
        run_size_bytes: int,
        capabilities: Capabilities,
        exit_table: ExitTable,
    ) -> None:
        self.index = index
        self.fd = fd
        self._capabilities = capabilities
        self._raw: CData = ffi.new("struct vcpu *")
        check("mmap of KVM_CREATE_VCPU", lib.vcpu_init(self._raw, fd, run_size_bytes))
        self.exit: CData = self._raw.exit
        # Orders kick() against close(), which takes away what a kick writes to.
        self._kick_lock = threading.Lock()
        self._exit_table = exit_table
        exit_table.add_vcpu(self._raw)

    # Running

    def run(self) -> int:
        """Run the guest until an exit that C cannot serve (4.10).

        For a kind whose name ends in READ, put the answer into ``exit.value`` before the next call.

        Returns:
            The ExitKind, as a plain int; ``exit`` has the rest.

        Raises:
            KvmError: KVM_RUN failed; EBUSY if another thread runs this vCPU, or after close().

        Threads: the GIL is released while the guest runs.
        """
        kind = lib.vcpu_run(self._raw)
        if kind < 0:
            raise KvmError("KVM_RUN", -kind)
        return kind

    def kick(self) -> None:
        """Make run() return EXIT_KICKED, now or at its next call, until clear_kick().

        No kick is lost: csrc/vcpu_loop.c has the argument. A vCPU that returns for a kick has no
        half-done I/O inside KVM, so its state can be saved. Needs install_kick_signal().

        Threads: any; after close() it does nothing.
        """
        with self._kick_lock:
            if self.fd >= 0:
                lib.vcpu_kick(self._raw)

    def clear_kick(self) -> None:
        """Let run() run again. Clear first, then look at what the kick was for, then run()."""
        with self._kick_lock:
            if self.fd >= 0:
                lib.vcpu_clear_kick(self._raw)

    def instruction_bytes(self) -> bytes:
        """After EXIT_INTERNAL_ERROR: the instruction that KVM could not emulate; empty if unknown.

        Source: struct kvm_run, emulation_failure.
        """
        error = self.exit
        has_bytes = lib.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
        if error.suberror != lib.KVM_INTERNAL_ERROR_EMULATION or error.ndata < 3:
            return b""
        if not error.data[0] & has_bytes:
            return b""
        raw = bytes(ffi.buffer(error.data))[8:24]
        return raw[1 : 1 + min(raw[0], 15)]

    def take_coalesced_writes(self) -> list[CoalescedWrite]:
        """Empty the VM's ring of coalesced writes, oldest first (4.116).

        The ring belongs to the VM: take from any one vCPU, and not from two at once.
        """
        page = self._capabilities.value("KVM_CAP_COALESCED_MMIO")
        write = ffi.new("struct coalesced_write *")
        writes = []
        while check("coalesced ring", lib.vcpu_take_coalesced(self._raw, page, write)):
            writes.append(CoalescedWrite(write.addr, write.value, write.len, bool(write.is_pio)))
        return writes

    # State that a boot sets

    def get_regs(self) -> Regs:
        """Read the general registers (4.11)."""
        regs = ffi.new("struct kvm_regs *")
        ioctl_ptr(self.fd, "KVM_GET_REGS", regs)
        return regs_from_c(regs)

    def set_regs(self, value: Regs) -> None:
        """Write the general registers (4.12)."""
        regs = ffi.new("struct kvm_regs *")
        regs_to_c(value, regs)
        ioctl_ptr(self.fd, "KVM_SET_REGS", regs)

    def get_sregs(self) -> Sregs:
        """Read the special registers (4.13)."""
        sregs = ffi.new("struct kvm_sregs *")
        ioctl_ptr(self.fd, "KVM_GET_SREGS", sregs)
        return sregs_from_c(sregs)

    def set_sregs(self, value: Sregs) -> None:
        """Write the special registers (4.14)."""
        sregs = ffi.new("struct kvm_sregs *")
        sregs_to_c(value, sregs)
        ioctl_ptr(self.fd, "KVM_SET_SREGS", sregs)

    def set_cpuid(self, entries: Sequence[CpuidEntry]) -> None:
        """Set what CPUID answers; once, before the first run() (4.64)."""
        _memory, header, c_entries = new_array(
            "struct kvm_cpuid2", "struct kvm_cpuid_entry2", len(entries)
        )
        header.nent = len(entries)
        for i, entry in enumerate(entries):
            cpuid_to_c(entry, c_entries[i])
        ioctl_ptr(self.fd, "KVM_SET_CPUID2", header)

    def get_cpuid(self) -> list[CpuidEntry]:
        """Read back what set_cpuid() set, with what KVM keeps up to date in it (4.65)."""
        _memory, header, entries = new_array(
            "struct kvm_cpuid2", "struct kvm_cpuid_entry2", _MAX_CPUID_ENTRIES
        )
        header.nent = _MAX_CPUID_ENTRIES
        ioctl_ptr(self.fd, "KVM_GET_CPUID2", header)
        return [cpuid_from_c(entries[i]) for i in range(header.nent)]

    def get_msrs(self, indices: Iterable[int], *, skip_unreadable: bool = False) -> dict[int, int]:
        """Read model-specific registers (4.18).

        Args:
            indices: which, such as Kvm.msr_index_list().
            skip_unreadable: leave out those that KVM does not let us read (it lists some that
                depend on CPUID bits) instead of raising.

        Raises:
            KvmError: EINVAL naming the MSR that cannot be read.
        """
        todo = list(indices)
        values: dict[int, int] = {}
        while todo:
            values.update(self._read_msrs(todo))
            # KVM stops at the first that it refuses.
            refused = next((i for i, index in enumerate(todo) if index not in values), None)
            if refused is None:
                break
            if not skip_unreadable:
                raise KvmError(f"KVM_GET_MSRS msr={todo[refused]:#x}", errno.EINVAL)
            todo = todo[refused + 1 :]
        return values

    def _read_msrs(self, indices: list[int]) -> dict[int, int]:
        _memory, header, entries = new_array(
            "struct kvm_msrs", "struct kvm_msr_entry", len(indices)
        )
        header.nmsrs = len(indices)
        for i, index in enumerate(indices):
            entries[i].index = index
        done = ioctl_ptr(self.fd, "KVM_GET_MSRS", header)
        return {entries[i].index: entries[i].data for i in range(done)}

    def set_msrs(self, values: Mapping[int, int]) -> None:
        """Write model-specific registers, in the mapping's order (4.19).

        Raises:
            KvmError: EINVAL naming the MSR that KVM refused; those before it are set.
        """
        _memory, header, entries = new_array("struct kvm_msrs", "struct kvm_msr_entry", len(values))
        header.nmsrs = len(values)
        for i, (index, value) in enumerate(values.items()):
            entries[i].index = index
            entries[i].data = value
        done = ioctl_ptr(self.fd, "KVM_SET_MSRS", header)
        if done < len(values):
            raise KvmError(f"KVM_SET_MSRS msr={entries[done].index:#x}", errno.EINVAL)

    # State that a snapshot keeps; bytes whose layout is the UAPI's

    def get_fpu(self) -> bytes:
        """Save x87 and SSE registers (struct kvm_fpu, 4.22)."""
        return get_blob(self.fd, "KVM_GET_FPU", "struct kvm_fpu")

    def set_fpu(self, state: bytes) -> None:
        """Restore what get_fpu() saved (4.23)."""
        set_blob(self.fd, "KVM_SET_FPU", "struct kvm_fpu", state)

    def get_lapic(self) -> bytes:
        """Save the local APIC's registers (4.57); needs Vm.create_irqchip()."""
        return get_blob(self.fd, "KVM_GET_LAPIC", "struct kvm_lapic_state")

    def set_lapic(self, state: bytes) -> None:
        """Restore what get_lapic() saved (4.58)."""
        set_blob(self.fd, "KVM_SET_LAPIC", "struct kvm_lapic_state", state)

    def get_vcpu_events(self) -> bytes:
        """Save pending exceptions, interrupts and NMIs (4.31)."""
        return get_blob(self.fd, "KVM_GET_VCPU_EVENTS", "struct kvm_vcpu_events")

    def set_vcpu_events(self, state: bytes) -> None:
        """Restore what get_vcpu_events() saved (4.32)."""
        set_blob(self.fd, "KVM_SET_VCPU_EVENTS", "struct kvm_vcpu_events", state)

    def get_debug_regs(self) -> bytes:
        """Save DR0-3, DR6, DR7 (4.33)."""
        return get_blob(self.fd, "KVM_GET_DEBUGREGS", "struct kvm_debugregs")

    def set_debug_regs(self, state: bytes) -> None:
        """Restore what get_debug_regs() saved (4.34)."""
        set_blob(self.fd, "KVM_SET_DEBUGREGS", "struct kvm_debugregs", state)

    def get_xcrs(self) -> bytes:
        """Save XCR0 (4.44)."""
        return get_blob(self.fd, "KVM_GET_XCRS", "struct kvm_xcrs")

    def set_xcrs(self, state: bytes) -> None:
        """Restore what get_xcrs() saved; before set_xsave() (4.45)."""
        set_blob(self.fd, "KVM_SET_XCRS", "struct kvm_xcrs", state)

    def get_xsave(self) -> bytes:
        """Save the extended processor state: 4 KiB, or more if the host has AMX (4.42, 4.134)."""
        state, request = self._new_xsave()
        ioctl_ptr(self.fd, request, state)
        return bytes(ffi.buffer(state))

    def set_xsave(self, state: bytes) -> None:
        """Restore what get_xsave() saved (4.43).

        Raises:
            ValueError: it has another length than this host's.
        """
        c_state, _ = self._new_xsave()
        buffer = ffi.buffer(c_state)
        if len(state) != len(buffer):
            raise ValueError(f"KVM_SET_XSAVE: {len(state)} bytes, must be {len(buffer)}")
        buffer[:] = state
        ioctl_ptr(self.fd, "KVM_SET_XSAVE", c_state)

    def _new_xsave(self) -> tuple[CData, str]:
        legacy = ffi.sizeof("struct kvm_xsave")
        size = max(self._capabilities.value("KVM_CAP_XSAVE2"), legacy)
        request = "KVM_GET_XSAVE2" if self._capabilities.has("KVM_CAP_XSAVE2") else "KVM_GET_XSAVE"
        return ffi.new("uint8_t[]", size), request

    def get_mp_state(self) -> int:
        """Read KVM_MP_STATE_*: running, halted, waiting for INIT or SIPI (4.38)."""
        state = ffi.new("struct kvm_mp_state *")
        ioctl_ptr(self.fd, "KVM_GET_MP_STATE", state)
        return int(state.mp_state)

    def set_mp_state(self, mp_state: int) -> None:
        """Write KVM_MP_STATE_* (4.39)."""
        state = ffi.new("struct kvm_mp_state *", {"mp_state": mp_state})
        ioctl_ptr(self.fd, "KVM_SET_MP_STATE", state)

    # Clocks, addresses, events

    def get_tsc_khz(self) -> int:
        """The guest's TSC frequency (4.56)."""
        return ioctl_int(self.fd, "KVM_GET_TSC_KHZ")

    def set_tsc_khz(self, tsc_khz: int) -> None:
        """Set the guest's TSC frequency, for a VM that comes from another host (4.55)."""
        ioctl_int(self.fd, "KVM_SET_TSC_KHZ", tsc_khz)

    def kvmclock_ctrl(self) -> None:
        """Tell the guest that it was paused, so that its soft-lockup watchdog keeps quiet (4.68).

        Raises:
            KvmError: EINVAL if the guest has not set up kvmclock.
        """
        ioctl_int(self.fd, "KVM_KVMCLOCK_CTRL")

    def translate(self, gva: int) -> Gpa | None:
        """Walk the guest's current page tables (4.15); None if nothing is mapped there."""
        walk = ffi.new("struct kvm_translation *", {"linear_address": gva})
        ioctl_ptr(self.fd, "KVM_TRANSLATE", walk)
        return Gpa(walk.physical_address) if walk.valid else None

    def nmi(self) -> None:
        """Queue a non-maskable interrupt (4.76)."""
        ioctl_int(self.fd, "KVM_NMI")

    def close(self) -> None:
        """Close the descriptor; a second call does nothing.

        Raises:
            KvmError: EBUSY, a thread is in run().
        """
        with self._kick_lock:
            if self.fd < 0:
                return
            check("close of a running vCPU", lib.vcpu_deinit(self._raw))
            os.close(self.fd)
            self.fd = -1
        self._exit_table.remove_vcpu(self._raw)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
