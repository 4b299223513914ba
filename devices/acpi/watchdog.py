# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A watchdog that ACPI's WDAT table describes, so that a guest needs no driver for this one chip.

Four registers of 4 bytes; a guest learns from the table which of them does what. Linux drives it
by wdat_wdt, Windows by what it has built in.

Source: Microsoft, "Hardware Watchdog Timers Design Specification", 1.01; Linux
drivers/watchdog/wdat_wdt.c.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable
from typing import Final

from devices.bus import Bus
from kvm_ffi.timer import Timer

WATCHDOG_PORT: Final = 0x5E0
WATCHDOG_LENGTH: Final = 16
CONTROL: Final = 0  # 1: it runs; a write of 1 starts it from the top
COUNTDOWN: Final = 4  # counts that it starts from; a write starts a running one from the top
LEFT: Final = 8  # counts that are left; a write of anything starts a running one from the top
STATUS: Final = 12  # 1: it caused the last reset; a write of 1 clears that

COUNT_MS: Final = 100
MIN_COUNT: Final = 10
MAX_COUNT: Final = 36_000
FIRST_COUNT: Final = 300
_COUNT_NS: Final = COUNT_MS * 1_000_000

# Actions and instructions of the table.
_ACTIONS: Final = {
    "RESET": 1,
    "QUERY_LEFT": 4,
    "QUERY_COUNTDOWN": 5,
    "SET_COUNTDOWN": 6,
    "QUERY_RUNNING": 8,
    "SET_RUNNING": 9,
    "QUERY_STOPPED": 10,
    "SET_STOPPED": 11,
    "QUERY_STATUS": 32,
    "SET_STATUS": 33,
}
_READ_VALUE, _READ_COUNT, _WRITE_VALUE, _WRITE_COUNT = range(4)
_INSTRUCTIONS: Final = (
    ("RESET", _WRITE_VALUE, LEFT, 1),
    ("QUERY_LEFT", _READ_COUNT, LEFT, 0),
    ("QUERY_COUNTDOWN", _READ_COUNT, COUNTDOWN, 0),
    ("SET_COUNTDOWN", _WRITE_COUNT, COUNTDOWN, 0),
    ("QUERY_RUNNING", _READ_VALUE, CONTROL, 1),
    ("SET_RUNNING", _WRITE_VALUE, CONTROL, 1),
    ("QUERY_STOPPED", _READ_VALUE, CONTROL, 0),
    ("SET_STOPPED", _WRITE_VALUE, CONTROL, 0),
    ("QUERY_STATUS", _READ_VALUE, STATUS, 1),
    ("SET_STATUS", _WRITE_VALUE, STATUS, 1),
)
_NO_PCI: Final = 0xFF
_FLAG_ENABLED: Final = 1
_FLAG_STOPPED_IN_SLEEP: Final = 0x80
_WDAT_HEADER_LENGTH: Final = 32
_ALL_BITS: Final = 0xFFFFFFFF


def wdat_body() -> bytes:
    """Return the WDAT table without its ACPI header."""
    header = struct.pack(
        "<IHBBB3xIIIB3xI",
        _WDAT_HEADER_LENGTH,
        *(_NO_PCI, _NO_PCI, _NO_PCI, _NO_PCI),
        *(COUNT_MS, MAX_COUNT, MIN_COUNT),
        _FLAG_ENABLED | _FLAG_STOPPED_IN_SLEEP,
        len(_INSTRUCTIONS),
    )
    entries = (
        # The register is a Generic Address Structure: 32 bits in I/O space, in one access.
        struct.pack(
            "<BBH4BQII",
            *(_ACTIONS[action], instruction, 0),
            *(1, 32, 0, 3, WATCHDOG_PORT + register),
            *(value, _ALL_BITS),
        )
        for action, instruction, register, value in _INSTRUCTIONS
    )
    return header + b"".join(entries)


class Watchdog:
    """Counts down unless the guest starts it from the top again and again.

    Once expired it counts no more until the guest writes to it again.

    Args:
        on_expired: called when it has expired, on expire()'s thread.
        has_reset: whether it caused the reset that this machine comes from.
        clock: nanoseconds, monotonic; a parameter so that tests need no waiting.

    Attributes:
        timer: readable when expire() has something to do.

    Threads: registers from any vCPU thread, the rest from any; one lock inside.
    """

    def __init__(
        self,
        on_expired: Callable[[], None],
        *,
        has_reset: bool = False,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._on_expired = on_expired
        self._has_reset = has_reset
        self._clock = clock
        self._lock = threading.Lock()
        self._count = FIRST_COUNT
        self._is_running = False
        self._due_ns: int | None = None
        self._held_ns: int | None = None  # what is left, while it is held; 0: it does not count
        self.timer = Timer()

    def attach(self, bus: Bus) -> None:
        """Claim the registers on the PIO bus."""
        bus.add(WATCHDOG_PORT, WATCHDOG_LENGTH, self)

    def read(self, offset: int, length: int) -> int:
        """Return a register; 0 for anything but a whole one."""
        if length != 4:
            return 0
        with self._lock:
            if offset == CONTROL:
                return int(self._is_running)
            if offset == COUNTDOWN:
                return self._count
            if offset == LEFT:
                return self._left_ns() // _COUNT_NS
            return int(offset == STATUS and self._has_reset)

    def write(self, offset: int, length: int, value: int) -> None:
        """Take a register's value (guest-controlled); nothing happens for part of a register."""
        if length != 4:
            return
        with self._lock:
            if offset == CONTROL:
                self._is_running = bool(value & 1)
            elif offset == COUNTDOWN:
                self._count = min(max(value, MIN_COUNT), MAX_COUNT)
            elif offset == STATUS:
                self._has_reset = self._has_reset and not value & 1
            if offset in (CONTROL, COUNTDOWN, LEFT):
                self._restart(self._count * _COUNT_NS if self._is_running else 0)

    def expire(self) -> None:
        """Look at the timer, and tell if it has expired."""
        with self._lock:
            # A vCPU may have started it from the top since the timer was seen to be readable.
            if not self.timer.drain():
                return
            self._due_ns = None
        self._on_expired()

    def hold(self) -> None:
        """Stop the clock, for a guest that cannot run."""
        with self._lock:
            if self._held_ns is None:
                self._held_ns = self._left_ns()
                self.timer.set(0)

    def release(self) -> None:
        """Let the clock go on after hold()."""
        with self._lock:
            left_ns, self._held_ns = self._held_ns, None
            if left_ns is not None:
                self._restart(left_ns)

    def close(self) -> None:
        """Stop it for good; no vCPU runs any more."""
        self.timer.close()

    def _left_ns(self) -> int:
        if self._held_ns is not None:
            return self._held_ns
        # One that is due and was not looked at yet still is to expire.
        return 0 if self._due_ns is None else max(1, self._due_ns - self._clock())

    def _restart(self, delay_ns: int) -> None:
        if self._held_ns is not None:
            self._held_ns = delay_ns
            return
        self._due_ns = self._clock() + delay_ns if delay_ns else None
        self.timer.set(delay_ns)
