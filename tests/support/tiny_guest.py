# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A real VM of one vCPU and 64 KiB, for guests of a few bytes in real mode.

The code starts at CODE with every segment at 0. Anything above RAM_SIZE is MMIO; to reach it, a
test moves the base of DS or ES there.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from kvm_ffi.exits import EXIT_HLT, ExitKind, ExitTable
from kvm_ffi.memory import GuestMemory
from kvm_ffi.system import Kvm
from kvm_ffi.types import Gpa
from kvm_ffi.vm import Vm
from kvm_ffi.x86_64 import real_mode_boot

RAM_SIZE = 0x10000
CODE = 0x1000
STACK = 0x8000
HLT = b"\xf4"
SPIN = b"\xeb\xfe"  # jmp $


class TinyGuest:
    """One VM, made ready to run a few bytes."""

    def __init__(
        self, kvm: Kvm, *, exit_table: ExitTable | None = None, has_irqchip: bool = False
    ) -> None:
        self.exits = exit_table or ExitTable()
        self.memory = GuestMemory([(Gpa(0), RAM_SIZE)])
        self.vm: Vm = kvm.create_vm()
        self.vm.add_guest_memory(self.memory, log_dirty=True)
        if has_irqchip:
            self.vm.create_irqchip()
        self.vcpu = self.vm.create_vcpu(0, self.exits)
        self.vcpu.set_cpuid(kvm.supported_cpuid())

    def load(
        self, code: bytes, *, ds_base: int = 0, es_base: int = 0, regs: dict[str, int] | None = None
    ) -> None:
        """Put code at CODE and point the vCPU at it."""
        self.memory.write(Gpa(CODE), code)
        sregs = self.vcpu.get_sregs()
        general = real_mode_boot(sregs, CODE)
        sregs.ds.base, sregs.es.base = ds_base, es_base
        self.vcpu.set_sregs(sregs)
        general.rsp = STACK
        for name, value in (regs or {}).items():
            setattr(general, name, value)
        self.vcpu.set_regs(general)

    def run(self) -> ExitKind:
        """Run to the next exit that comes to Python."""
        return ExitKind(self.vcpu.run())

    def accesses(self, answers: dict[int, int] | None = None) -> list[tuple[str, int, int, int]]:
        """Run to HLT.

        Args:
            answers: what reads get, by address.

        Returns:
            (kind, address, length, value) of each exit before that; the value of a read is the
            answer.
        """
        seen: list[tuple[str, int, int, int]] = []
        exit_: Any = self.vcpu.exit
        while (kind := self.vcpu.run()) != EXIT_HLT:
            name = ExitKind(kind).name
            if name.endswith("READ"):
                exit_.value = (answers or {})[exit_.addr]
            elif not name.endswith("WRITE"):
                raise AssertionError(f"{name} at rip={self.vcpu.get_regs().rip:#x}: {seen}")
            seen.append((name, exit_.addr, exit_.len, exit_.value))
        return seen

    def close(self) -> None:
        self.vm.close()
        self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
