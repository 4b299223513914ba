# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The GSI table: which interrupt a global system interrupt number stands for.

Source: Linux Documentation/virt/kvm/api.rst 4.52 KVM_SET_GSI_ROUTING, 4.24 KVM_CREATE_IRQCHIP.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ._kvm import lib
from .errors import HostError

if TYPE_CHECKING:
    from .vm import Vm

IOAPIC_PINS: Final = 24
_PIC_PINS: Final = 8


@dataclass(frozen=True, slots=True)
class IrqchipRoute:
    """A GSI that is a pin of an in-kernel controller (KVM_IRQCHIP_*)."""

    gsi: int
    irqchip: int
    pin: int


@dataclass(frozen=True, slots=True)
class MsiRoute:
    """A GSI that is a message; ``address`` and ``data`` are guest-controlled."""

    gsi: int
    address: int
    data: int


GsiRoute = IrqchipRoute | MsiRoute


def default_routes() -> list[GsiRoute]:
    """GSI n is IOAPIC pin n, and pin n of the two PICs below 16: the same as KVM starts with.

    IRQ 0 is pin 0, so an ACPI MADT needs no interrupt source override.
    """
    routes: list[GsiRoute] = []
    for gsi in range(IOAPIC_PINS):
        if gsi < _PIC_PINS:
            routes.append(IrqchipRoute(gsi, lib.KVM_IRQCHIP_PIC_MASTER, gsi))
        elif gsi < 2 * _PIC_PINS:
            routes.append(IrqchipRoute(gsi, lib.KVM_IRQCHIP_PIC_SLAVE, gsi - _PIC_PINS))
        routes.append(IrqchipRoute(gsi, lib.KVM_IRQCHIP_IOAPIC, gsi))
    return routes


class IrqRouter:
    """Owns a VM's GSI table: pins 0 to 23, and messages from 24 on.

    Changes gather here; commit() gives KVM the table, at 0.05-0.14 ms a time, if it has changed.

    Threads: any; the lock is taken before KVM's own.
    """

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._lock = threading.Lock()
        self._fixed = default_routes()
        self._limit = vm.capabilities.max_gsi_routes - len(self._fixed)
        # GSI to its message; None while it is allocated but masked or not programmed yet.
        self._messages: dict[int, MsiRoute | None] = {}
        self._is_dirty = False

    def allocate_msi(self) -> int:
        """Reserve the lowest free GSI for a message.

        Raises:
            HostError: the host's table is full.
        """
        with self._lock:
            if len(self._messages) >= self._limit:
                raise HostError(f"all {self._limit} message interrupts of this VM are in use")
            gsi = IOAPIC_PINS
            while gsi in self._messages:
                gsi += 1
            self._messages[gsi] = None
            return gsi

    def free(self, gsi: int) -> None:
        """Give a GSI of allocate_msi() back; its irqfd must be gone. Takes effect with commit().

        Raises:
            KeyError: it is not allocated.
        """
        with self._lock:
            self._is_dirty |= self._messages.pop(gsi) is not None

    def set_msi(self, gsi: int, address: int, data: int) -> None:
        """Say what a GSI sends. Takes effect with commit().

        Args:
            gsi: from allocate_msi().
            address: message address; guest-controlled, 64 bits.
            data: message data; guest-controlled, 32 bits.

        Raises:
            KeyError: it is not allocated.
        """
        self._replace(gsi, MsiRoute(gsi, address, data))

    def clear_msi(self, gsi: int) -> None:
        """Make a GSI send nothing. Takes effect with commit().

        Raises:
            KeyError: it is not allocated.
        """
        self._replace(gsi, None)

    def _replace(self, gsi: int, route: MsiRoute | None) -> None:
        with self._lock:
            if self._messages[gsi] != route:
                self._messages[gsi] = route
                self._is_dirty = True

    def commit(self) -> None:
        """Give KVM the table if it has changed since the last time.

        Raises:
            KvmError: KVM refused it; the next commit() tries again.
        """
        with self._lock:
            if not self._is_dirty:
                return
            messages = [route for route in self._messages.values() if route is not None]
            self._vm.set_gsi_routing([*self._fixed, *messages])
            self._is_dirty = False
