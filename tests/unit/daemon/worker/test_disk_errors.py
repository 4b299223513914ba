# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""When errors of disks are told: the first at once, then one a minute."""

from __future__ import annotations

import errno
from typing import cast

import pytest

from daemon.worker import disk_errors
from daemon.worker.disk_errors import INTERVAL_S, DiskErrors
from devices.virtio.blk import VirtioBlk


class FailingDisk:
    """A disk with errors, as DiskErrors looks at them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.errors = 0
        self.asked = 0

    def host_errors(self) -> tuple[int, int]:
        return self.errors, errno.ENOSPC if self.errors else 0

    def await_host_error(self) -> None:
        self.asked += 1


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(disk_errors, "time", clock)
    return clock


def look(errors: DiskErrors, *disks: FailingDisk, is_last: bool = False) -> bool:
    return errors.look([cast("VirtioBlk", disk) for disk in disks], is_last=is_last)


def test_the_first_is_told_at_once_and_the_rest_a_minute_later(clock: Clock) -> None:
    errors, disk = DiskErrors(), FailingDisk("root")
    assert not look(errors, disk)
    disk.errors = 1
    assert look(errors, disk)
    assert errors.told == {"root": {"count": 1, "error": "ENOSPC"}}
    disk.errors = 500
    assert not look(errors, disk)
    clock.now += INTERVAL_S
    assert errors.due == clock.now
    assert look(errors, disk)
    assert errors.told["root"]["count"] == 500


def test_a_disk_that_is_well_again_is_asked_once_and_not_looked_at_any_more(clock: Clock) -> None:
    errors, disk = DiskErrors(), FailingDisk("root")
    disk.errors = 1
    look(errors, disk)
    clock.now += INTERVAL_S
    assert not look(errors, disk)
    assert (disk.asked, errors.due) == (1, None)
    disk.errors = 2
    assert look(errors, disk)


def test_disks_do_not_wait_for_each_other(clock: Clock) -> None:
    errors, a, b = DiskErrors(), FailingDisk("a"), FailingDisk("b")
    a.errors = 1
    assert look(errors, a, b)
    b.errors = 2
    assert look(errors, a, b)
    assert {name: told["count"] for name, told in errors.told.items()} == {"a": 1, "b": 2}


def test_a_reset_neither_forgets_errors_nor_tells_them_twice(clock: Clock) -> None:
    errors, disk = DiskErrors(), FailingDisk("root")
    disk.errors = 3
    look(errors, disk)
    fresh = FailingDisk("root")
    assert not look(errors, fresh)
    fresh.errors = 2
    assert not look(errors, fresh)
    clock.now += INTERVAL_S
    assert look(errors, fresh)
    assert errors.told["root"]["count"] == 5


def test_what_would_have_to_wait_is_told_with_the_end(clock: Clock) -> None:
    errors, disk = DiskErrors(), FailingDisk("root")
    disk.errors = 1
    look(errors, disk)
    disk.errors = 4
    assert look(errors, disk, is_last=True)
    assert errors.told["root"]["count"] == 4


def test_a_disk_that_went_is_not_waited_for(clock: Clock) -> None:
    errors, disk = DiskErrors(), FailingDisk("root")
    disk.errors = 1
    look(errors, disk)
    clock.now += INTERVAL_S
    assert not look(errors)
    assert errors.due is None
    # Another of its name goes on where it was.
    again = FailingDisk("root")
    again.errors = 1
    assert look(errors, again)
    assert errors.told["root"]["count"] == 2
