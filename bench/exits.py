# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What a vCPU exit costs: served in C, served in Python, as a kick, against a bare ioctl loop.

A guest of a few bytes writes to a port 20,000 times. The floor is the same guest under a C loop
that calls KVM_RUN and nothing else. Needs a /dev/kvm that this user may open, and a C compiler.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.common import Goal, Row, document, interleave, medians, parser, row, show
from devices.bus import Bus
from kvm_ffi.eventfd import EventFd
from kvm_ffi.exits import EXIT_HLT, EXIT_PIO_WRITE
from kvm_ffi.ioctl import ioctl_int
from kvm_ffi.system import Kvm
from kvm_ffi.uart import Uart
from kvm_ffi.vcpu import install_kick_signal
from tests.support.tiny_guest import HLT, SPIN, TinyGuest

ROUNDS = 15
WRITES = 20_000
C_GOAL = 1.05
PYTHON_GOAL = 1.6
UNCLAIMED_PORT, CLAIMED_PORT, KICK_PORT, COM1 = 0x510, 0x520, 0x530, 0x3F8
# again: out dx, al; dec cx; jnz again
LOOP = b"\xee\x49\x75\xfc" + HLT
# A native decrement and jump take less than a nanosecond, interpreted ones nearly a microsecond.
NATIVE_LIMIT_US = 0.1


class Scratch:
    """A device whose register is the last value written."""

    def __init__(self) -> None:
        self.value = 0

    def read(self, offset: int, length: int) -> int:
        """Return the last value."""
        del offset, length
        return self.value

    def write(self, offset: int, length: int, value: int) -> None:
        """Keep the value."""
        del offset, length
        self.value = value


class Exits:
    """One VM, in which every case runs the same loop on another port."""

    def __init__(self, kvm: Kvm, bare_loop: Callable[[int, int], int]) -> None:
        self.guest = TinyGuest(kvm)
        self.run_size_bytes = ioctl_int(kvm.fd, "KVM_GET_VCPU_MMAP_SIZE")
        self.bare_loop = bare_loop
        self.bus = Bus("pio", self.guest.exits.claim_pio)
        self.bus.add(CLAIMED_PORT, 1, Scratch())
        self.uart = Uart()
        self.guest.exits.attach_uart(self.uart, COM1)
        self.kick = EventFd()
        self.guest.vm.assign_ioeventfd(KICK_PORT, 1, self.kick, is_pio=True)

    def bare(self) -> float:
        """The floor."""
        return self._per_write(UNCLAIMED_PORT, self._run_bare)

    def unclaimed(self) -> float:
        """C drops the write."""
        return self._per_write(UNCLAIMED_PORT, self._run_to_halt)

    def serial(self) -> float:
        """C keeps the byte for a console."""
        cost = self._per_write(COM1, self._run_to_halt)
        self.uart.read_output()
        return cost

    def kicked(self) -> float:
        """KVM signals an eventfd; nothing exits."""
        cost = self._per_write(KICK_PORT, self._run_to_halt)
        assert self.kick.drain() == WRITES
        return cost

    def python(self) -> float:
        """The bus finds a device in Python."""
        return self._per_write(CLAIMED_PORT, self._run_python)

    def _per_write(self, port: int, run: Callable[[], None]) -> float:
        """Microseconds of CPU for each turn of the guest's loop: other load hardly touches it."""
        self.guest.load(LOOP, regs={"rcx": WRITES, "rdx": port})
        began = time.thread_time()
        run()
        return (time.thread_time() - began) / WRITES * 1e6

    def _run_bare(self) -> None:
        assert self.bare_loop(self.guest.vcpu.fd, self.run_size_bytes) == WRITES

    def _run_to_halt(self) -> None:
        assert self.guest.vcpu.run() == EXIT_HLT

    def _run_python(self) -> None:
        vcpu, write = self.guest.vcpu, self.bus.write
        exit_ = vcpu.exit
        while vcpu.run() == EXIT_PIO_WRITE:
            write(exit_.addr, exit_.len, exit_.value)

    def instruction(self) -> float:
        """Microseconds for one instruction at CPL 0: what kind of host this is."""
        count = 10_000
        self.guest.load(b"\x49\x75\xfd" + HLT, regs={"rcx": count})  # again: dec cx; jnz again
        began = time.perf_counter()
        self._run_to_halt()
        return (time.perf_counter() - began) / (2 * count) * 1e6

    def kick_latency(self) -> float:
        """Microseconds from kick() to the end of run(), with the guest spinning."""
        returned: list[float] = []
        vcpu = self.guest.vcpu
        self.guest.load(SPIN)

        def run() -> None:
            vcpu.run()
            returned.append(time.perf_counter())

        thread = threading.Thread(target=run)
        thread.start()
        time.sleep(0.005)
        began = time.perf_counter()
        vcpu.kick()
        thread.join()
        vcpu.clear_kick()
        return (returned[0] - began) * 1e6


def build_bare_loop(directory: Path) -> Callable[[int, int], int]:
    """Compile bare_loop.c; ctypes drops the GIL around the call, as cffi does."""
    library = directory / "bare_loop.so"
    source = Path(__file__).with_name("bare_loop.c")
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
    function: Any = ctypes.CDLL(str(library)).bare_loop
    function.argtypes = [ctypes.c_int, ctypes.c_ulong]
    function.restype = ctypes.c_long
    return lambda fd, size: int(function(fd, size))


def rows(middle: dict[str, float]) -> list[Row]:
    """Judge the medians."""
    bare = ("bare KVM_RUN loop in C", middle["bare"])
    in_c, in_python = (Goal.RATIO_AT_MOST, C_GOAL), (Goal.RATIO_AT_MOST, PYTHON_GOAL)
    return [
        row("port write to nobody, served in C", "us", middle["unclaimed"], bare, in_c),
        row("UART write, served in C", "us", middle["serial"], bare),
        row("port write, served in Python", "us", middle["python"], bare, in_python),
        row("ioeventfd kick, no exit", "us", middle["kick"], bare),
        row("kick of a spinning vCPU to the end of run()", "us", middle["latency"]),
    ]


def main() -> int:
    """Measure, and print the result."""
    options = parser(__doc__).parse_args()
    install_kick_signal()
    with tempfile.TemporaryDirectory() as directory, Kvm.open() as kvm:
        exits = Exits(kvm, build_bare_loop(Path(directory)))
        tier = "full" if exits.instruction() < NATIVE_LIMIT_US else "direct"
        cases = {
            "bare": exits.bare,
            "unclaimed": exits.unclaimed,
            "serial": exits.serial,
            "python": exits.python,
            "kick": exits.kicked,
            "latency": exits.kick_latency,
        }
        middle = medians(interleave(cases, ROUNDS))
    show(document("exits", tier, rows(middle)), as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
