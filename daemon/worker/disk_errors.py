# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Which errors of the host's files hosteld is told of: a disk's first at once, then one a minute.

A guest can bring on any number of them, so what is told is their number. It is that of the worker's
whole life, through resets: hosteld keeps what it was told of, and the difference is news.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from devices.virtio.blk import VirtioBlk

INTERVAL_S: Final = 60.0


@dataclass(slots=True)
class _Disk:
    """One disk's errors; ``seen`` of them were its present device's."""

    device: VirtioBlk | None = None
    seen: int = 0
    total: int = 0
    told: int = 0
    errno: int = 0
    due: float | None = None


class DiskErrors:
    """What there is to tell.

    Attributes:
        told: by disk id {"count": since the worker began, "error": the last one's name}.

    Threads: the worker's main thread.
    """

    def __init__(self) -> None:
        self._disks: dict[str, _Disk] = {}
        self.told: dict[str, dict[str, Any]] = {}

    @property
    def due(self) -> float | None:
        """When to look() again without being called; CLOCK_MONOTONIC."""
        return min((disk.due for disk in self._disks.values() if disk.due), default=None)

    def look(self, devices: Iterable[VirtioBlk], *, is_last: bool = False) -> bool:
        """Look for errors, and return whether there is something new to tell.

        Args:
            devices: the machine's disks.
            is_last: tell what would have to wait.
        """
        now, is_news = time.monotonic(), False
        present = {device.name: device for device in devices}
        for name in self._disks.keys() - present.keys():
            self._disks[name].device = self._disks[name].due = None  # detached
        for device in present.values():
            disk = self._disks.setdefault(device.name, _Disk())
            is_awaited = disk.due is None
            if disk.due is not None and (is_last or now >= disk.due):
                # Awaited again before it is counted: none comes between the two.
                device.await_host_error()
                disk.due, is_awaited = None, True
            _count(disk, device)
            if disk.total > disk.told and is_awaited:
                disk.told, disk.due = disk.total, now + INTERVAL_S
                error = errno.errorcode.get(disk.errno, str(disk.errno))
                self.told = {**self.told, device.name: {"count": disk.told, "error": error}}
                is_news = True
        return is_news


def _count(disk: _Disk, device: VirtioBlk) -> None:
    if disk.device is not device:
        disk.device, disk.seen = device, 0
    count, number = device.host_errors()
    disk.total += count - disk.seen
    disk.seen = count
    disk.errno = number or disk.errno
