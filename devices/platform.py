# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What device models need from the KVM layer, as Protocols.

The classes of kvm_ffi satisfy them; unit tests pass fakes. Kept here, in one place, so that the
whole surface between devices and the kernel can be read at once.
"""

from __future__ import annotations

from typing import Protocol

from kvm_ffi.eventfd import EventFd


class Irq(Protocol):
    """An interrupt that can be raised: an eventfd bound to a GSI, or a test's counter."""

    def signal(self) -> None:
        """Raise the interrupt once (an edge)."""
        ...


class IrqfdVm(Protocol):
    """The part of Vm that binds eventfds to GSIs.

    Source: Linux Documentation/virt/kvm/api.rst, KVM_IRQFD.
    """

    def assign_irqfd(self, gsi: int, eventfd: EventFd) -> None:
        """Raise ``gsi`` whenever ``eventfd`` is signalled."""
        ...

    def deassign_irqfd(self, gsi: int, eventfd: EventFd) -> None:
        """Undo assign_irqfd."""
        ...


class IoeventfdVm(Protocol):
    """The part of Vm that turns guest writes into eventfd signals.

    Source: Linux Documentation/virt/kvm/api.rst, KVM_IOEVENTFD.
    """

    def assign_ioeventfd(self, address: int, length: int, eventfd: EventFd) -> None:
        """Signal ``eventfd`` on a guest write to ``address``; length 0 matches any width."""
        ...

    def deassign_ioeventfd(self, address: int, length: int, eventfd: EventFd) -> None:
        """Undo assign_ioeventfd."""
        ...


class DeviceVm(IrqfdVm, IoeventfdVm, Protocol):
    """What a PCI device needs of a Vm."""


class MsiRouter(Protocol):
    """The part of IrqRouter that owns the GSIs of MSI vectors."""

    def allocate_msi(self) -> int:
        """Return a free GSI."""
        ...

    def free(self, gsi: int) -> None:
        """Give a GSI back."""
        ...

    def set_msi(self, gsi: int, address: int, data: int) -> None:
        """Route ``gsi`` to an MSI message; takes effect at commit()."""
        ...

    def clear_msi(self, gsi: int) -> None:
        """Drop the route of ``gsi``; takes effect at commit()."""
        ...

    def commit(self) -> None:
        """Hand the table to the kernel."""
        ...


class PciConfigStore(Protocol):
    """The part of ExitTable that serves PCI configuration reads in C."""

    def pci_slot(self, slot: int) -> memoryview:
        """Mark ``slot`` present and return its 4096 writable bytes."""
        ...

    def pci_remove(self, slot: int) -> None:
        """Mark ``slot`` absent: it reads as all ones."""
        ...

    def pci_trap_reads(self, slot: int, offset: int, length: int) -> None:
        """Hand reads that touch these registers to Python."""
        ...


class IrqLine:
    """A fixed GSI (a legacy interrupt line) raised through an irqfd.

    Threads: signal() from any; close() once.
    """

    def __init__(self, vm: IrqfdVm, gsi: int) -> None:
        self.gsi = gsi
        self.eventfd = EventFd()
        self._vm = vm
        vm.assign_irqfd(gsi, self.eventfd)

    def signal(self) -> None:
        """Raise the interrupt once; KVM lowers the line again by itself (an edge)."""
        self.eventfd.signal()

    def close(self) -> None:
        """Unbind the GSI and close the eventfd."""
        self._vm.deassign_irqfd(self.gsi, self.eventfd)
        self.eventfd.close()
