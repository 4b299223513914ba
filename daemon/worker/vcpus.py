# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The vCPU threads: run in C, come back for what Python serves, park when told to."""

from __future__ import annotations

import contextlib
import enum
import errno
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from devices.bus import Bus
from kvm_ffi import exits
from kvm_ffi.errors import KvmError
from kvm_ffi.host_process import name_thread
from kvm_ffi.vcpu import Vcpu

log = logging.getLogger(__name__)

# A vCPU parks within microseconds unless its thread is inside a device's register write; the
# longest of those is a device reset that waits for an engine's I/O in flight.
PARK_TIMEOUT_S: Final = 30.0
# Beside kvm_ffi's exit kinds: the vCPU's thread itself failed; the log has the trace.
EXIT_DEFECT: Final = -1
EXIT_MEMORY_LOST: Final = -2  # the guest used memory that the host cannot give it
# There is no page behind an address: its file has no room, or has shrunk.
_NO_PAGE: Final = ("KVM_RUN", errno.EFAULT)


class PciConfig(Protocol):
    """The part of devices.pci.host.PciHost that vCPU exits reach."""

    def config_read(self, address: int, length: int) -> int:
        """Return a register that C does not serve itself."""
        ...

    def config_write(self, address: int, length: int, value: int) -> None:
        """Take a guest's write to PCI configuration space."""
        ...


class _Gate(enum.Enum):
    PARK = enum.auto()
    RUN = enum.auto()
    END = enum.auto()


class VcpuThreads:
    """One thread per vCPU; all run, park and end together.

    Args:
        on_fatal: called on a vCPU's thread when that vCPU cannot go on (triple fault, KVM error);
            the thread parks after it. Must not block.

    Threads: park, run and end on the worker's main thread; request_park on any.
    """

    def __init__(
        self,
        vcpus: Sequence[Vcpu],
        pio: Bus,
        mmio: Bus,
        pci: PciConfig,
        on_fatal: Callable[[Vcpu, int], None],
    ) -> None:
        self._vcpus = tuple(vcpus)
        self._pio = pio
        self._mmio = mmio
        self._pci = pci
        self._on_fatal = on_fatal
        self._gate = _Gate.PARK
        self._changed = threading.Condition()  # guards _gate and _parked
        self._parked: set[int] = set()
        self._threads = [
            threading.Thread(target=self._main, args=(vcpu,), name=f"vcpu{vcpu.index}", daemon=True)
            for vcpu in self._vcpus
        ]

    def run(self) -> None:
        """Let every vCPU run; the threads begin with the first time."""
        with self._changed:
            self._gate = _Gate.RUN
            self._changed.notify_all()
        for thread in self._threads:
            if thread.ident is None:
                thread.start()

    def run_after_pause(self) -> None:
        """Let every vCPU run, and tell each guest CPU that it was stopped.

        Without that a guest takes the pause for a lockup of its own and says so.

        Source: Linux Documentation/virt/kvm/api.rst 4.68 KVM_KVMCLOCK_CTRL.
        """
        for vcpu in self._vcpus:
            with contextlib.suppress(KvmError):  # EINVAL: this vCPU's guest uses no kvmclock
                vcpu.kvmclock_ctrl()
        self.run()

    def request_park(self) -> None:
        """Have every vCPU leave the guest and park; does not wait.

        A device's callback may call this on a vCPU's own thread: it parks after the access.
        """
        with self._changed:
            if self._gate is _Gate.RUN:
                self._gate = _Gate.PARK
        for vcpu in self._vcpus:
            vcpu.kick()

    def park(self) -> None:
        """Have every vCPU leave the guest, and wait until all have parked.

        Raises:
            TimeoutError: a vCPU is stuck in a device for PARK_TIMEOUT_S.
        """
        self.request_park()
        running = {
            vcpu.index
            for vcpu, thread in zip(self._vcpus, self._threads, strict=True)
            if thread.ident is not None
        }
        with self._changed:
            if not self._changed.wait_for(lambda: self._parked >= running, PARK_TIMEOUT_S):
                stuck = sorted(running - self._parked)
                raise TimeoutError(f"vcpus {stuck} did not park within {PARK_TIMEOUT_S:g} s")

    def end(self) -> None:
        """End the threads and wait for them; they cannot be started again."""
        with self._changed:
            self._gate = _Gate.END
            self._changed.notify_all()
        for vcpu in self._vcpus:
            vcpu.kick()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _main(self, vcpu: Vcpu) -> None:
        name_thread(f"vcpu{vcpu.index}")
        while self._wait_at_gate(vcpu):
            try:
                kind = self._run_until_told(vcpu)
            except Exception as err:
                # The border "device kick": KVM_RUN failed or a device model has a defect. The VM
                # stops with its state kept; the worker lives to tell.
                log.exception("vcpu failed vcpu=%d", vcpu.index)
                kind = EXIT_DEFECT
                if isinstance(err, KvmError) and (err.request, err.errno) == _NO_PAGE:
                    kind = EXIT_MEMORY_LOST
            if kind != exits.EXIT_KICKED:
                self.request_park()
                self._on_fatal(vcpu, kind)

    def _wait_at_gate(self, vcpu: Vcpu) -> bool:
        """Park while the gate is shut; False when the thread shall end."""
        with self._changed:
            if self._gate is _Gate.PARK:
                self._parked.add(vcpu.index)
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._gate is not _Gate.PARK)
                self._parked.discard(vcpu.index)
            if self._gate is _Gate.END:
                return False
            # Under the lock: a kick that comes after this belongs to the next change of the gate.
            vcpu.clear_kick()
            return True

    def _run_until_told(self, vcpu: Vcpu) -> int:
        """Run the guest, serving exits, until a kick or an exit that ends it; returns that kind."""
        exit_ = vcpu.exit
        pio, mmio, pci = self._pio, self._mmio, self._pci
        while True:
            kind = vcpu.run()
            if kind == exits.EXIT_PIO_WRITE:
                pio.write(exit_.addr, exit_.len, exit_.value)
            elif kind == exits.EXIT_PIO_READ:
                exit_.value = pio.read(exit_.addr, exit_.len)
            elif kind == exits.EXIT_MMIO_WRITE:
                mmio.write(exit_.addr, exit_.len, exit_.value)
            elif kind == exits.EXIT_MMIO_READ:
                exit_.value = mmio.read(exit_.addr, exit_.len)
            elif kind == exits.EXIT_PCI_CONFIG_WRITE:
                pci.config_write(exit_.addr, exit_.len, exit_.value)
            elif kind == exits.EXIT_PCI_CONFIG_READ:
                exit_.value = pci.config_read(exit_.addr, exit_.len)
            else:
                return kind
