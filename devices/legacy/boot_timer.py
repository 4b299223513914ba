# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Boot-timer port: the guest says "I am up" by writing 123, and the host notes when."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from devices.bus import Bus

BOOT_TIMER_PORT: Final = 0x5B0
BOOT_DONE: Final = 123


class BootTimer:
    """One-byte, write-only port; only the first 123 counts.

    Args:
        on_boot: called once with the time of the write, on the vCPU's thread.
        clock_ns: monotonic nanoseconds.

    Threads: any vCPU thread.
    """

    def __init__(
        self,
        on_boot: Callable[[int], None],
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._on_boot = on_boot
        self._clock_ns = clock_ns
        self.booted_at_ns: int | None = None

    def attach(self, bus: Bus) -> None:
        """Claim the port on the PIO bus."""
        bus.add(BOOT_TIMER_PORT, 1, self)

    def read(self, offset: int, length: int) -> int:
        """Return all ones: there is nothing to read."""
        return 0xFF

    def write(self, offset: int, length: int, value: int) -> None:
        """Note the time of the first 123; every other value is ignored."""
        if value & 0xFF == BOOT_DONE and self.booted_at_ns is None:
            self.booted_at_ns = self._clock_ns()
            self._on_boot(self.booted_at_ns)
