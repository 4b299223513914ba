# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""MC146818 real-time clock and its CMOS RAM at ports 0x70 and 0x71. No alarm, no interrupt.

The guest may set the clock: that shifts its own view by an offset and touches nothing on the
host. Time is UTC.

Source: Motorola MC146818A data sheet; Linux drivers/rtc/rtc-mc146818-lib.c.
"""

from __future__ import annotations

import calendar
import threading
import time
from collections.abc import Callable
from typing import Final

from devices.bus import Bus

INDEX_PORT: Final = 0x70
CMOS_SIZE_BYTES: Final = 128

REG_SECONDS: Final = 0x00
REG_MINUTES: Final = 0x02
REG_HOURS: Final = 0x04
REG_WEEKDAY: Final = 0x06
REG_DAY: Final = 0x07
REG_MONTH: Final = 0x08
REG_YEAR: Final = 0x09
REG_A: Final = 0x0A
REG_B: Final = 0x0B
REG_C: Final = 0x0C
REG_D: Final = 0x0D
REG_CENTURY: Final = 0x32  # the FADT names this index

TIME_REGISTERS: Final = frozenset(
    {REG_SECONDS, REG_MINUTES, REG_HOURS, REG_WEEKDAY, REG_DAY, REG_MONTH, REG_YEAR, REG_CENTURY},
)

REG_A_DIVIDER_32KHZ: Final = 0x26  # update-in-progress (bit 7) is never set: reads are atomic
REG_B_SET: Final = 0x80
REG_B_INTERRUPTS: Final = 0x70
REG_B_BINARY: Final = 0x04
REG_B_24H: Final = 0x02
REG_D_VALID: Final = 0x80
HOUR_PM: Final = 0x80


class CmosRtc:
    """Clock and 114 bytes of scratch RAM (lost at power-off).

    Args:
        clock: seconds since the epoch; a parameter so that tests choose the time.

    Threads: registers from any vCPU thread; one lock inside.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._index = 0
        self._ram = bytearray(CMOS_SIZE_BYTES)
        self._ram[REG_A] = REG_A_DIVIDER_32KHZ
        self._ram[REG_B] = REG_B_24H
        self._offset_s = 0

    def attach(self, bus: Bus) -> None:
        """Claim ports 0x70 and 0x71 on the PIO bus."""
        bus.add(INDEX_PORT, 2, self)

    def read(self, offset: int, length: int) -> int:
        """Return the indexed byte at port 0x71; the index itself is write-only."""
        if offset == 0:
            return 0xFF
        with self._lock:
            return self._read_register(self._index)

    def write(self, offset: int, length: int, value: int) -> None:
        """Select an index (port 0x70; bit 7 is the NMI mask, ignored) or write its byte."""
        with self._lock:
            if offset == 0:
                self._index = value & 0x7F
                if length == 1:
                    return
                value >>= 8  # a 16-bit OUT to 0x70 reaches both ports
            self._write_register(self._index, value & 0xFF)

    def _read_register(self, index: int) -> int:
        if index in TIME_REGISTERS and not self._ram[REG_B] & REG_B_SET:
            self._latch_time()
        if index == REG_C:
            return 0
        if index == REG_D:
            return REG_D_VALID
        return self._ram[index]

    def _write_register(self, index: int, value: int) -> None:
        if index in (REG_C, REG_D):
            return
        if index == REG_A:
            self._ram[REG_A] = value & 0x7F
        elif index == REG_B:
            self._write_reg_b(value & ~REG_B_INTERRUPTS)
        elif index in TIME_REGISTERS and not self._ram[REG_B] & REG_B_SET:
            # One field written while the clock runs: the others keep running values.
            self._latch_time()
            self._ram[index] = value
            self._adopt_time()
        else:
            self._ram[index] = value

    def _write_reg_b(self, value: int) -> None:
        old = self._ram[REG_B]
        if value & REG_B_SET and not old & REG_B_SET:
            self._latch_time()
        self._ram[REG_B] = value
        if old & REG_B_SET and not value & REG_B_SET:
            self._adopt_time()

    def _latch_time(self) -> None:
        now = time.gmtime(self._clock() + self._offset_s)
        hour = now.tm_hour
        if not self._ram[REG_B] & REG_B_24H:
            hour = (hour % 12) or 12
        fields = {
            REG_SECONDS: min(now.tm_sec, 59),
            REG_MINUTES: now.tm_min,
            REG_HOURS: hour,
            REG_WEEKDAY: (now.tm_wday + 1) % 7 + 1,
            REG_DAY: now.tm_mday,
            REG_MONTH: now.tm_mon,
            REG_YEAR: now.tm_year % 100,
            REG_CENTURY: now.tm_year // 100,
        }
        for index, value in fields.items():
            self._ram[index] = self._encode(value)
        if not self._ram[REG_B] & REG_B_24H and now.tm_hour >= 12:
            self._ram[REG_HOURS] |= HOUR_PM

    def _adopt_time(self) -> None:
        """Turn the registers, which the guest wrote, into an offset; nonsense changes nothing."""
        hour = self._decode(self._ram[REG_HOURS] & ~HOUR_PM & 0xFF)
        if not self._ram[REG_B] & REG_B_24H:
            hour = hour % 12 + (12 if self._ram[REG_HOURS] & HOUR_PM else 0)
        year = self._decode(self._ram[REG_CENTURY]) * 100 + self._decode(self._ram[REG_YEAR])
        month = self._decode(self._ram[REG_MONTH])
        day = self._decode(self._ram[REG_DAY])
        minute = self._decode(self._ram[REG_MINUTES])
        second = self._decode(self._ram[REG_SECONDS])
        if not (1970 <= year <= 9999 and 1 <= month <= 12 and 1 <= day <= 31):
            return
        if hour > 23 or minute > 59 or second > 59:
            return
        wanted = calendar.timegm((year, month, day, hour, minute, second))
        self._offset_s = wanted - int(self._clock())

    def _encode(self, value: int) -> int:
        if self._ram[REG_B] & REG_B_BINARY:
            return value
        return (value // 10) << 4 | value % 10

    def _decode(self, value: int) -> int:
        if self._ram[REG_B] & REG_B_BINARY:
            return value
        return (value >> 4) * 10 + (value & 0xF)
