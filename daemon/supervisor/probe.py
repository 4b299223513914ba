# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Measures how the host runs a guest's ring 0: by the processor, or instruction by instruction.

Run as ``python -m daemon.supervisor.probe``, so that a KVM that hangs takes a small process with
it and not hosteld. Prints one JSON object.

A guest of a few bytes in 32-bit protected mode counts down, and then runs one instruction (CLAC)
that KVM's emulator lacks. A processor needs under a nanosecond for an instruction; an interpreter
needs hundreds, and stops at the one that it does not know with KVM_EXIT_INTERNAL_ERROR.
"""

from __future__ import annotations

import json
import struct
import sys
import time
from dataclasses import asdict, dataclass
from typing import Final

from kvm_ffi.exits import EXIT_HLT, EXIT_INTERNAL_ERROR, ExitKind, ExitTable
from kvm_ffi.memory import GuestMemory
from kvm_ffi.system import Kvm
from kvm_ffi.types import Gpa
from kvm_ffi.x86_64 import pvh_boot

RAM_BYTES: Final = 0x10000
CODE_GPA: Final = 0x1000
ROUNDS: Final = 20_000
ATTEMPTS: Final = 3
_HLT: Final = b"\xf4"
_CLAC: Final = b"\x0f\x01\xca"


@dataclass(frozen=True, slots=True)
class Measured:
    """What the probe found.

    Attributes:
        api_version: of KVM.
        capabilities: those that are there, by UAPI name.
        instruction_ns: the time of one instruction in ring 0, in nanoseconds.
        lacks_instruction: whether CLAC ended in KVM_EXIT_INTERNAL_ERROR.
    """

    api_version: int
    capabilities: dict[str, int]
    instruction_ns: float
    lacks_instruction: bool


def measure(kvm: Kvm) -> Measured:
    """Run the probe guest.

    Raises:
        KvmError: the host refuses to make or run it.
    """
    with GuestMemory([(Gpa(0), RAM_BYTES)]) as memory, kvm.create_vm() as vm:
        vm.add_guest_memory(memory)
        with vm.create_vcpu(0, ExitTable()) as vcpu:
            vcpu.set_cpuid(kvm.supported_cpuid())

            def run(code: bytes) -> tuple[int, float]:
                memory.write(Gpa(CODE_GPA), code)
                sregs = vcpu.get_sregs()
                regs = pvh_boot(sregs, CODE_GPA, 0)
                vcpu.set_sregs(sregs)
                vcpu.set_regs(regs)
                began = time.perf_counter()
                kind = vcpu.run()
                return kind, time.perf_counter() - began

            run(_count_down(1))
            empty_s = min(run(_count_down(1))[1] for _ in range(ATTEMPTS))
            loops = [run(_count_down(ROUNDS)) for _ in range(ATTEMPTS)]
            if any(kind != EXIT_HLT for kind, _ in loops):
                raise SystemExit(f"the probe guest ended with {ExitKind(loops[0][0]).name}")
            loop_s = min(seconds for _, seconds in loops)
            last_kind, _ = run(_CLAC + _HLT)
    per_instruction_ns = max(0.0, loop_s - empty_s) / (2 * ROUNDS) * 1e9
    return Measured(
        kvm.capabilities.api_version,
        {name: value for name, value in kvm.capabilities.values.items() if value > 0},
        round(per_instruction_ns, 3),
        last_kind == EXIT_INTERNAL_ERROR,
    )


def _count_down(rounds: int) -> bytes:
    # mov ecx, rounds; again: dec ecx; jnz again; hlt
    return b"\xb9" + struct.pack("<I", rounds) + b"\x49\x75\xfd" + _HLT


def main() -> None:
    """Probe the device named on the command line, /dev/kvm without one."""
    kvm = Kvm.open(sys.argv[1] if len(sys.argv) > 1 else "/dev/kvm")
    json.dump(asdict(measure(kvm)), sys.stdout)


if __name__ == "__main__":
    main()
