# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The machine of one VM: from a spec and open descriptors to running vCPUs, and back to nothing."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import socket
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from devices.acpi.config import AcpiConfig
from devices.acpi.power import GenericEventDevice, PowerControl
from devices.acpi.tables import build_tables
from devices.acpi.watchdog import Watchdog
from devices.bus import AddressWindow, Bus
from devices.errors import BackendError
from devices.event_loop import EventLoop
from devices.legacy.boot_timer import BootTimer
from devices.legacy.cmos_rtc import CmosRtc
from devices.legacy.i8042 import I8042
from devices.legacy.pvpanic import PanicEvent, Pvpanic
from devices.legacy.serial import SerialPort
from devices.pci.host import PciHost
from devices.platform import IrqLine
from devices.virtio.blk import VirtioBlk
from devices.virtio.device import VirtioDevice
from devices.virtio.net import VirtioNet
from devices.virtio.pci import VirtioPci
from devices.virtio.vhost_user.device import VhostUserDevice
from kvm_ffi import exits, x86_64
from kvm_ffi.blk_engine import SECTOR_BYTES
from kvm_ffi.errors import KvmError
from kvm_ffi.exits import ExitTable
from kvm_ffi.irq_routing import IrqRouter
from kvm_ffi.memory import GuestMemory
from kvm_ffi.rate_limiter import RateLimit
from kvm_ffi.system import HostFacts, Kvm
from kvm_ffi.types import Gpa
from kvm_ffi.vcpu import Vcpu

from ..errors import WorkerError
from ..protocol import MachineSpec, NicWishes
from . import boot, layout
from .device_makers import MachineFds, make_rate_groups, make_with_copies, virtio_devices
from .device_stats import device_stats
from .machine_event import MachineEvent
from .pmem import add_memory
from .slots import VirtioSlots
from .vcpus import EXIT_DEFECT, EXIT_MEMORY_LOST, VcpuThreads

_generations = itertools.count(1)


class Machine:
    """A built machine: KVM VM, memory, devices and vCPUs; no thread runs before start().

    Built in one go and taken down in one go; a reset builds another one from the same spec.

    Args:
        post: told of every MachineEvent, on any thread.
        facts: of this host, where they are known; None asks /dev/kvm.
        is_after_watchdog: the watchdog reset the machine before this one.

    Raises:
        KvmError, OSError, BootError: it cannot be built; nothing is left behind.

    Threads: the worker's main thread.
    """

    def __init__(
        self,
        spec: MachineSpec,
        fds: MachineFds,
        post: Callable[[MachineEvent], None],
        facts: HostFacts | None = None,
        *,
        is_after_watchdog: bool = False,
    ) -> None:
        self.generation = next(_generations)
        self._post = post
        self._backends = fds.backends
        self._watchdog: Watchdog | None = None
        with contextlib.ExitStack() as stack:
            self._build(spec, fds, facts, stack, is_after_watchdog)
            self._stack = stack.pop_all()

    def _build(
        self,
        spec: MachineSpec,
        fds: MachineFds,
        facts: HostFacts | None,
        stack: contextlib.ExitStack,
        is_after_watchdog: bool,
    ) -> None:
        kvm = Kvm(os.dup(fds[spec.kvm_fd]), facts)
        stack.callback(kvm.close)
        self._vm = vm = kvm.create_vm()
        stack.callback(vm.close)
        self._memory = memory = GuestMemory(
            [(Gpa(gpa), size) for gpa, size in layout.ram_regions(spec.memory_bytes)]
        )
        stack.callback(memory.close)
        # All memslots before the irqchip and the first vCPU: after either, each costs an SRCU
        # grace period of some milliseconds.
        add_memory(vm, memory, spec, fds, stack)
        vm.set_tss_address(Gpa(layout.TSS_GPA))
        vm.set_identity_map_address(Gpa(layout.IDENTITY_MAP_GPA))
        vm.create_irqchip()
        self._table = ExitTable()
        self._pio = Bus("pio", self._table.claim_pio, self._table.unclaim_pio)
        self._mmio = Bus("mmio", self._table.claim_mmio, self._table.unclaim_mmio)
        self.event_loop = EventLoop()
        stack.callback(self.event_loop.close)
        self._add_legacy(stack)
        if spec.watchdog is not None:
            self._watchdog = self._add_watchdog(stack, is_after_watchdog)
        acpi = self._acpi_config(spec)
        self.rate_groups = make_rate_groups(spec)
        self._add_pci(spec, fds, acpi, stack)
        for gpa, blob in build_tables(acpi).blobs:
            memory.write(Gpa(gpa), blob)
        boot_state = boot.load(memory, _boot_source(spec, fds))
        vcpus = self._create_vcpus(kvm, spec, boot_state, stack)
        self._vcpus = VcpuThreads(vcpus, self._pio, self._mmio, self._pci, self._on_fatal)
        stack.callback(self._vcpus.end)

    def _add_legacy(self, stack: contextlib.ExitStack) -> None:
        vm, pio = self._vm, self._pio
        self.serial = SerialPort(vm, self._table, gsi=layout.COM1_GSI)
        stack.callback(self.serial.close)
        keyboard_irq = IrqLine(vm, layout.I8042_GSI)
        stack.callback(keyboard_irq.close)
        self._keyboard = I8042(keyboard_irq, self._on_guest_reboot)
        self._keyboard.attach(pio)
        ged_irq = IrqLine(vm, layout.GED_GSI)
        stack.callback(ged_irq.close)
        self._ged = GenericEventDevice(ged_irq)
        self._ged.attach(pio)
        PowerControl(self._on_guest_poweroff, self._on_guest_reboot).attach(pio)
        CmosRtc().attach(pio)
        Pvpanic(self._on_guest_panic).attach(pio)
        BootTimer(self._on_boot_timer).attach(pio)

    def _add_watchdog(self, stack: contextlib.ExitStack, is_after_watchdog: bool) -> Watchdog:
        watchdog = Watchdog(self._on_watchdog, has_reset=is_after_watchdog)
        stack.callback(watchdog.close)
        watchdog.attach(self._pio)
        self.event_loop.watch(watchdog.timer.fd, select.EPOLLIN, watchdog.expire)
        stack.callback(self.event_loop.unwatch, watchdog.timer.fd)
        return watchdog

    def _acpi_config(self, spec: MachineSpec) -> AcpiConfig:
        return AcpiConfig(
            n_vcpus=spec.vcpus,
            ecam=AddressWindow(layout.ECAM_GPA, layout.ECAM_BYTES),
            pci_window_32=AddressWindow(layout.PCI_MMIO32_START, layout.PCI_MMIO32_BYTES),
            pci_window_64=AddressWindow(
                layout.pci_mmio64_start(spec.memory_bytes, [p.size_bytes for p in spec.pmem]),
                layout.PCI_MMIO64_BYTES,
            ),
            rsdp_gpa=layout.ACPI_GPA,
            tables_end=layout.ACPI_LIMIT,
            lapic_gpa=layout.LAPIC_GPA,
            ioapic_gpa=layout.IOAPIC_GPA,
            com1_gsi=layout.COM1_GSI,
            i8042_gsi=layout.I8042_GSI,
            ged_gsi=layout.GED_GSI,
            has_watchdog=spec.watchdog is not None,
        )

    def _add_pci(
        self,
        spec: MachineSpec,
        fds: MachineFds,
        acpi: AcpiConfig,
        stack: contextlib.ExitStack,
    ) -> None:
        self._table.set_ecam(layout.ECAM_GPA, layout.ECAM_BYTES)
        self._pci = PciHost(self._table, self._mmio, acpi.pci_window_32, acpi.pci_window_64)
        router = IrqRouter(self._vm)
        has_wildcard = self._vm.check_extension("KVM_CAP_IOEVENTFD_ANY_LENGTH")
        transport = partial(
            VirtioPci,
            vm=self._vm,
            router=router,
            memory=self._memory,
            event_loop=self.event_loop,
            notify_length=0 if has_wildcard else 2,
        )

        def wrap(device: VirtioDevice) -> VirtioPci:
            if isinstance(device, VirtioBlk):
                device.on_host_error = self._on_disk_error
            return transport(device)

        self._virtio = VirtioSlots(self._pci, self._ged, self._pio, wrap, self._on_ejected)
        stack.callback(self._virtio.close)
        for make, device_fds, slots in virtio_devices(spec, fds, self.rate_groups):
            self._virtio.add(make_with_copies(make, device_fds), slots, device_fds)
        self._backends.serve(
            self.event_loop, partial(self._report, "backend_lost", "a back end is lost")
        )
        stack.callback(self._backends.rest)

    def _create_vcpus(
        self, kvm: Kvm, spec: MachineSpec, state: boot.BootState, stack: contextlib.ExitStack
    ) -> list[Vcpu]:
        supported = kvm.supported_cpuid()
        vcpus = []
        for index in range(spec.vcpus):
            vcpu = self._vm.create_vcpu(index, self._table)
            stack.callback(vcpu.close)
            vcpu.set_cpuid(x86_64.vcpu_cpuid(supported, index, spec.vcpus, kvm.capabilities))
            vcpu.set_msrs(x86_64.boot_msrs())
            vcpus.append(vcpu)
        boot.enter(vcpus[0], state)
        return vcpus

    # --- life

    def start(self) -> None:
        """Let the guest run for the first time."""
        self._vcpus.run()

    def pause(self) -> None:
        """Park the vCPUs, then have every device finish what is in flight.

        Raises:
            TimeoutError: a vCPU or a device is stuck; the guest runs on.
        """
        try:
            self._vcpus.park()
            self._hold_watchdog()
            for device in self._virtio:
                device.quiesce()
        except TimeoutError:
            self.resume()
            raise

    def resume(self) -> None:
        """Let devices and vCPUs go on."""
        for device in self._virtio:
            device.resume()
        if self._watchdog is not None:
            self._watchdog.release()
        self._vcpus.run_after_pause()

    def stop(self) -> None:
        """Park the vCPUs for good; the console's last output can still be read."""
        with contextlib.suppress(TimeoutError):
            # close() waits for the threads without a deadline of its own: a vCPU that is stuck in
            # a device now is told again there, and hosteld's deadline ends the process.
            self._vcpus.park()
        self._hold_watchdog()

    def _hold_watchdog(self) -> None:
        if self._watchdog is not None:
            self._watchdog.hold()

    def close(self) -> None:
        """Take everything down, in the reverse order of its building."""
        self._stack.close()

    def press_power_button(self) -> None:
        """Tell the guest's ACPI that the power button was pressed."""
        self._ged.power_button()

    def press_ctrl_alt_del(self) -> bool:
        """Type Ctrl-Alt-Del; False when it was lost, as I8042.ctrl_alt_del() tells."""
        return self._keyboard.ctrl_alt_del()

    def refresh_disk(self, disk_id: str) -> int:
        """Look at a disk's size anew and tell the guest; returns it in bytes.

        Raises:
            WorkerError: the VM has no such disk.
        """
        return self.disk(disk_id).refresh_size() * SECTOR_BYTES

    def swap_disk(self, disk_id: str, fd: int) -> None:
        """Put another file, of which the caller keeps ``fd``, behind a disk.

        Raises:
            WorkerError: the VM has no such disk, or it keeps the file that it has, and why.
        """
        disk, copy = self.disk(disk_id), os.dup(fd)
        try:
            disk.swap(copy)
        except BaseException as err:
            os.close(copy)
            if isinstance(err, TimeoutError):
                raise WorkerError("disk_busy", f"disk {disk_id}: {err}") from err
            if isinstance(err, OSError):
                raise WorkerError(
                    "disk_lost_writes",
                    f"disk {disk_id}: what was written to its old file cannot be made durable:"
                    f" {err.strerror}; to leave it nevertheless, ask again",
                ) from err
            if isinstance(err, BackendError):
                raise WorkerError("disk_unusable", str(err)) from err
            raise

    def disks(self) -> list[VirtioBlk]:
        """Return the disks that this process serves itself."""
        return [device for device in self._virtio if isinstance(device, VirtioBlk)]

    def disk(self, disk_id: str) -> VirtioBlk:
        """Return one of these.

        Raises:
            WorkerError: the VM has no such disk.
        """
        device = self._virtio.get(disk_id)
        if not isinstance(device, VirtioBlk):
            raise WorkerError("no_such_disk", f"the VM has no disk {disk_id!r}")
        return device

    def set_nic(self, nic_id: str, wishes: NicWishes) -> None:
        """Change an interface's limits, and plug or unplug its cable.

        Raises:
            WorkerError: the VM has no such interface, a limit is none or out of range, vhost
                serves the interface and knows no limits, or its tap is gone.
        """
        device = self._virtio.get(nic_id)
        if not isinstance(device, VirtioNet):
            raise WorkerError("no_such_nic", f"the VM has no interface {nic_id!r}")
        try:
            device.set_limits(RateLimit(**wishes.rx_limit), RateLimit(**wishes.tx_limit))
            device.set_link(wishes.is_link_up)
        except BackendError as err:
            raise WorkerError("vhost_unlimited", str(err)) from err
        except (TypeError, ValueError) as err:
            raise WorkerError("bad_limit", f"interface {nic_id}: {err}") from err
        except TimeoutError as err:
            raise WorkerError("nic_busy", f"interface {nic_id}: {err}") from err
        except OSError as err:
            raise WorkerError("tap_lost", f"interface {nic_id}: {err.strerror}") from err

    def attach(self, spec: MachineSpec, fds: MachineFds) -> None:
        """Add the disks and network interfaces of a spec, and tell the guest; all or none.

        Raises:
            HostError, OSError, ValueError: the host cannot, or there is no slot for them.
        """
        added: list[str] = []
        try:
            for make, device_fds, slots in virtio_devices(spec, fds, self.rate_groups):
                device = make_with_copies(make, device_fds)
                self._virtio.add(device, slots, device_fds)
                added.append(device.name)
        except BaseException:
            for name in added:
                self._virtio.pull(name)
            raise
        for name in added:
            self._virtio.tell_added(name)

    def ask_to_eject(self, device_id: str) -> None:
        """Ask the guest to let go of a device.

        Raises:
            WorkerError: there is none.
        """
        self._virtio.ask_to_eject(device_id)

    def keep(self, device_id: str) -> None:
        """Take ask_to_eject() back, where it is not too late."""
        self._virtio.keep(device_id)

    def pull(self, device_id: str) -> tuple[int, ...]:
        """Take a device out without asking; return the descriptors that it had copies of.

        Raises:
            WorkerError: there is none.
        """
        return self._virtio.pull(device_id)

    def collect_ejected(self) -> dict[str, tuple[int, ...]]:
        """Close what the guest has let go of; return ids, and descriptors as pull() does."""
        return self._virtio.collect()

    def attach_backend(self, device_id: str, sock: socket.socket) -> None:
        """Go on with a device's new back end; ``sock`` is owned from now on.

        Raises:
            WorkerError: the VM has no such device, or the back end is not usable.
        """
        device = self._virtio.get(device_id)
        if not isinstance(device, VhostUserDevice):
            sock.close()
            raise WorkerError("no_such_backend", f"no back end serves a device {device_id!r}")
        try:
            self._backends.attach(device_id, sock, device.negotiated)
            device.reattach()
        except BackendError as err:
            raise WorkerError("backend_refused", str(err)) from err

    def stats(self) -> dict[str, Any]:
        """Return counters as api/models/vms.py's VmStats has them."""
        return {
            "vcpu_exits": self._table.counters(),
            "console_dropped_bytes": self.serial.stats()["dropped_bytes"],
            **device_stats(self._virtio),
        }

    # --- what the guest does; called on vCPU threads

    def _report(self, code: str, message: str, detail: dict[str, Any] | None = None) -> None:
        self._post(MachineEvent(self.generation, code, message, detail or {}))

    def _on_boot_timer(self, _at_ns: int) -> None:
        self._report("boot_timer", "the guest wrote its boot timer")

    def _on_guest_poweroff(self) -> None:
        self._vcpus.request_park()
        self._report("guest_poweroff", "the guest powered itself off")

    def _on_guest_reboot(self) -> None:
        self._vcpus.request_park()
        self._report("guest_reboot", "the guest reset itself")

    def _on_ejected(self) -> None:
        self._report("ejected", "the guest let go of a device")

    def _on_disk_error(self) -> None:
        self._report("disk_error", "the file of a disk has failed")

    def _on_guest_panic(self, event: PanicEvent) -> None:
        self._report("guest_panic", f"the guest reported a panic: {event.name}")

    def _on_watchdog(self) -> None:
        self._report("watchdog", "the guest did not reset its watchdog in time")

    def _on_fatal(self, vcpu: Vcpu, kind: int) -> None:
        code, message = _FATAL.get(kind, ("kvm_error", f"the vCPU stopped with exit {kind}"))
        exit_ = vcpu.exit
        detail: dict[str, Any] = {"vcpu": vcpu.index}
        with contextlib.suppress(KvmError):
            detail["rip"] = f"{vcpu.get_regs().rip:#x}"
        if kind == exits.EXIT_INTERNAL_ERROR:
            detail["suberror"] = exit_.suberror
            detail["instruction"] = vcpu.instruction_bytes().hex()
        elif kind not in (EXIT_DEFECT, EXIT_MEMORY_LOST):
            detail["reason"] = exit_.suberror
            detail["hardware_reason"] = f"{exit_.data[0]:#x}" if exit_.ndata else ""
        self._report(code, f"vcpu {vcpu.index}: {message}", detail)


_FATAL: Final = {
    exits.EXIT_SHUTDOWN: ("triple_fault", "triple fault"),
    exits.EXIT_INTERNAL_ERROR: ("kvm_internal_error", "KVM cannot emulate an instruction"),
    exits.EXIT_FAIL_ENTRY: ("kvm_fail_entry", "the processor refused to enter the guest"),
    exits.EXIT_HLT: ("guest_halted", "halted without interrupts"),
    EXIT_MEMORY_LOST: (
        "memory_lost",
        "the host has no memory behind an address that it used; the file system of a pmem file is"
        " full, or the file was shrunk",
    ),
    EXIT_DEFECT: ("worker_defect", "its thread failed; the worker's log has the trace"),
}


def _boot_source(spec: MachineSpec, fds: MachineFds) -> boot.BootSource:
    return boot.BootSource(
        kernel_fd=fds[spec.kernel_fd],
        entry=spec.entry,
        cmdline=spec.cmdline,
        initrd_fd=None if spec.initrd_fd is None else fds[spec.initrd_fd],
        setup_header=bytes.fromhex(spec.setup_header),
    )
