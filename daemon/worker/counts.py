# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What of a guest's doings is told as a number, so that no guest floods who reads the events."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from devices.virtio.blk import VirtioBlk

from .disk_errors import INTERVAL_S, DiskErrors


class Tally:
    """How often something happened: the first time is told at once, the rest once a minute.

    Attributes:
        told: as far as it is time to tell.
        due: when to look() again without being called; CLOCK_MONOTONIC.

    Threads: the worker's main thread.
    """

    def __init__(self) -> None:
        self._total = 0
        self.told = 0
        self.due: float | None = None

    def add(self) -> None:
        """Count one; look() says whether it is told."""
        self._total += 1

    def look(self, *, is_last: bool = False) -> bool:
        """Return whether there is something new to tell; as Counts.look()."""
        now = time.monotonic()
        if self.due is not None and now >= self.due:
            self.due = None
        if self._total == self.told or (self.due is not None and not is_last):
            return False
        self.told, self.due = self._total, now + INTERVAL_S
        return True


class Counts:
    """The numbers of one worker's life.

    Threads: the worker's main thread.
    """

    def __init__(self) -> None:
        self._errors = DiskErrors()
        self._watchdog = Tally()

    @property
    def due(self) -> float | None:
        """When to look() again without being called; CLOCK_MONOTONIC."""
        dues = (self._errors.due, self._watchdog.due)
        return min((due for due in dues if due is not None), default=None)

    @property
    def is_due(self) -> bool:
        """Whether that time has come."""
        return self.due is not None and time.monotonic() >= self.due

    @property
    def told(self) -> dict[str, Any]:
        """What a Status has of them."""
        return {"disk_errors": self._errors.told, "watchdog_expired": self._watchdog.told}

    def add_watchdog(self) -> None:
        """Count an expired watchdog."""
        self._watchdog.add()

    def look(self, devices: Iterable[VirtioBlk], *, is_last: bool = False) -> bool:
        """Return whether there is something new to tell.

        Args:
            devices: the machine's disks.
            is_last: tell what would have to wait.
        """
        is_news = self._errors.look(devices, is_last=is_last)
        return self._watchdog.look(is_last=is_last) or is_news
