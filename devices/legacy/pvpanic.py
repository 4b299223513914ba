# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""pvpanic: the guest tells that it panicked.

Source: QEMU docs/specs/pvpanic.rst; Linux drivers/misc/pvpanic.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Final

from devices.bus import Bus

PVPANIC_PORT: Final = 0x505


class PanicEvent(enum.IntFlag):
    """What happened in the guest."""

    PANICKED = 1
    CRASH_LOADED = 2  # the panic is handled by the guest's own crash kernel


SUPPORTED_EVENTS: Final = PanicEvent.PANICKED | PanicEvent.CRASH_LOADED


class Pvpanic:
    """One-byte port: reads tell the events that are known, a write reports one.

    Args:
        on_panic: called with known events only, on the vCPU's thread, at most once per kind:
            a guest cannot flood its log through it.

    Threads: any vCPU thread.
    """

    def __init__(self, on_panic: Callable[[PanicEvent], None]) -> None:
        self._on_panic = on_panic
        self._seen = PanicEvent(0)

    def attach(self, bus: Bus) -> None:
        """Claim the port on the PIO bus."""
        bus.add(PVPANIC_PORT, 1, self)

    def read(self, offset: int, length: int) -> int:
        """Return the supported events."""
        return int(SUPPORTED_EVENTS)

    def write(self, offset: int, length: int, value: int) -> None:
        """Report events; unknown bits (guest-controlled) are ignored."""
        new = PanicEvent(value & int(SUPPORTED_EVENTS)) & ~self._seen
        self._seen |= new
        if new:
            self._on_panic(new)
