# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""PCI hotplug through ACPI: which slots have changed, and the guest's leave to take a device out.

A device that has come or gone sets its slot's bit in PCIU, one that shall go the bit in PCID; the
event device interrupts, and the DSDT's methods read both and notify the slots. When the guest has
let go of a device it writes the slot's bit to B0EJ.

A device that was pulled out has both bits set. By the specification a guest finds out by itself
that it is not there any more; Linux looks for new devices only (acpiphp_rescan_slot() in
drivers/pci/hotplug/acpiphp_glue.c), and drops an old one when it is asked to eject it.

The layout is QEMU's, whose users are every guest that knows ACPI.

Source: QEMU docs/specs/acpi_pci_hotplug.rst; ACPI 6.4, 6.3.3 "_EJx", 5.6.6 "Device Object
Notifications".
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final

from devices.bus import Bus
from devices.ratelimit import GuestLog

from .power import GedEvent, GenericEventDevice

log = logging.getLogger(__name__)

PCI_HOTPLUG_PORT: Final = 0x5D0
PCI_HOTPLUG_LENGTH: Final = 12
UP_OFFSET: Final = 0  # PCIU: cleared by reading
DOWN_OFFSET: Final = 4  # PCID: likewise
EJECT_OFFSET: Final = 8  # B0EJ: written only
FIRST_SLOT: Final = 1
LAST_SLOT: Final = 31


class PciHotplug:
    """The registers, and what has been asked of the guest.

    Args:
        events: interrupts the guest.
        on_eject: called with a slot when the guest has let go of what it was asked for, on that
            vCPU's thread and without a lock; when it returns, the guest believes the device gone.

    Threads: any.
    """

    def __init__(self, events: GenericEventDevice, on_eject: Callable[[int], None]) -> None:
        self._events = events
        self._on_eject = on_eject
        self._lock = threading.Lock()
        self._up = 0
        self._down = 0
        self._asked = 0
        self._gone = 0
        self._guest_log = GuestLog(log)

    def attach(self, bus: Bus) -> None:
        """Claim the registers on the PIO bus."""
        bus.add(PCI_HOTPLUG_PORT, PCI_HOTPLUG_LENGTH, self)

    def tell_changed(self, slot: int) -> None:
        """Have the guest look at a slot: there is a device now, or there is none any more."""
        with self._lock:
            self._up |= 1 << slot
        self._events.raise_event(GedEvent.PCI_HOTPLUG)

    def ask_to_eject(self, slot: int) -> None:
        """Ask the guest to let go of a device; may be asked again."""
        with self._lock:
            self._asked |= 1 << slot
            self._down |= 1 << slot
        self._events.raise_event(GedEvent.PCI_HOTPLUG)

    def tell_gone(self, slot: int) -> None:
        """Have the guest drop a device that was taken from it."""
        with self._lock:
            self._asked &= ~(1 << slot)
            self._gone |= 1 << slot
            self._up |= 1 << slot
            self._down |= 1 << slot
        self._events.raise_event(GedEvent.PCI_HOTPLUG)

    def keep(self, slot: int) -> bool:
        """Take ask_to_eject() back; False when nothing was asked, or the guest was faster."""
        with self._lock:
            was_asked = bool(self._asked >> slot & 1)
            self._asked &= ~(1 << slot)
            self._down &= ~(1 << slot)
        return was_asked

    def read(self, offset: int, length: int) -> int:
        """Return a whole register and clear it; anything else, and any other width, reads 0."""
        if length != 4:
            return 0
        with self._lock:
            if offset == UP_OFFSET:
                value, self._up = self._up, 0
            elif offset == DOWN_OFFSET:
                value, self._down = self._down, 0
            else:
                value = 0
        return value

    def write(self, offset: int, length: int, value: int) -> None:
        """Take out what the guest names in B0EJ (guest-controlled), if it was asked for it."""
        if offset != EJECT_OFFSET or length != 4:
            return
        with self._lock:
            granted = value & self._asked
            dropped = value & self._gone & ~granted
            self._asked &= ~granted
            self._gone &= ~value
            self._down &= ~granted
        for slot in range(FIRST_SLOT, LAST_SLOT + 1):
            if granted >> slot & 1:
                self._on_eject(slot)
            elif dropped >> slot & 1:
                # Another may have come into the slot meanwhile, which it has not looked for.
                self.tell_changed(slot)
            elif value >> slot & 1:
                # Its own idea, such as power written to 0 below /sys/bus/pci/slots: the device
                # stays, and a rescan finds it again.
                self._guest_log.warning("ejected without being asked slot=%d", slot)
