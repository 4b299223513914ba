# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Power: sleep control and reset registers of hardware-reduced ACPI, and the event device (GED).

Source: ACPI 6.4, 4.8.3.7 "Sleep Control and Status Registers", 4.8.3.6 "Reset Register",
5.6.9 "Interrupt-signaled ACPI events".
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable
from typing import Final

from devices.bus import Bus
from devices.platform import Irq

GED_PORT: Final = 0x5C0  # event register, 4 bytes, cleared by reading
SLEEP_CONTROL_PORT: Final = 0x5C4
SLEEP_STATUS_PORT: Final = 0x5C5
RESET_PORT: Final = 0x5C6

RESET_VALUE: Final = 0x01
SLEEP_TYPE_S5: Final = 5  # what the DSDT gives in \_S5
SLEEP_ENABLE: Final = 0x20
SLEEP_TYPE_SHIFT: Final = 2
SLEEP_TYPE_MASK: Final = 0x07
WAKE_STATUS: Final = 0x80


class GedEvent(enum.IntFlag):
    """Bits of the event register; the DSDT's _EVT method tells them apart."""

    POWER_BUTTON = 1
    PCI_HOTPLUG = 2


class PowerControl:
    """Sleep control, sleep status and reset: one byte each from SLEEP_CONTROL_PORT.

    Args:
        on_poweroff: called when the guest enters S5, on the vCPU's thread.
        on_reset: called when the guest writes the reset register, on the vCPU's thread.

    Threads: any vCPU thread.
    """

    def __init__(self, on_poweroff: Callable[[], None], on_reset: Callable[[], None]) -> None:
        self._on_poweroff = on_poweroff
        self._on_reset = on_reset

    def attach(self, bus: Bus) -> None:
        """Claim the three ports on the PIO bus."""
        bus.add(SLEEP_CONTROL_PORT, RESET_PORT - SLEEP_CONTROL_PORT + 1, self)

    def read(self, offset: int, length: int) -> int:
        """Return 0: nothing is asleep, and no wake event is told."""
        return 0

    def write(self, offset: int, length: int, value: int) -> None:
        """Enter S5 or reset; other sleep types, and the status register, do nothing."""
        port = SLEEP_CONTROL_PORT + offset
        value &= 0xFF
        if port == SLEEP_CONTROL_PORT and value & SLEEP_ENABLE:
            if (value >> SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK == SLEEP_TYPE_S5:
                self._on_poweroff()
        elif port == RESET_PORT and value == RESET_VALUE:
            self._on_reset()


class GenericEventDevice:
    """Event register of the GED; reading it clears it.

    Threads: any.
    """

    def __init__(self, irq: Irq) -> None:
        self._irq = irq
        self._pending = GedEvent(0)
        self._lock = threading.Lock()

    def attach(self, bus: Bus) -> None:
        """Claim the register on the PIO bus."""
        bus.add(GED_PORT, 4, self)

    def power_button(self) -> None:
        """Press the power button: the guest's own policy decides what happens."""
        self.raise_event(GedEvent.POWER_BUTTON)

    def raise_event(self, event: GedEvent) -> None:
        """Make an event pending and interrupt the guest."""
        with self._lock:
            self._pending |= event
        self._irq.signal()

    def read(self, offset: int, length: int) -> int:
        """Return the pending events and clear them; only offset 0 holds any."""
        if offset != 0:
            return 0
        with self._lock:
            pending, self._pending = self._pending, GedEvent(0)
        return int(pending)

    def write(self, offset: int, length: int, value: int) -> None:
        """Ignore the write: the register is read-only."""
