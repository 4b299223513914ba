# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Disks that share a budget, each served by an engine of its own."""

from __future__ import annotations

import time
from contextlib import ExitStack

from kvm_ffi.rate_limiter import UNLIMITED, RateGroup, RateLimit, RateLimiter
from tests.support.disk import Disk, MakeDisk
from tests.support.engine_thread import running, wait_until

OPS = 100


def together(make_disk: MakeDisk, group: RateGroup, count: int, reads: int) -> list[Disk]:
    """Disks with reads in their rings that nobody has looked at."""
    disks = []
    for index in range(count):
        disk = make_disk(group=group, base=0x1000 + 0x8000 * index)
        disk.offer_reads(reads)
        disks.append(disk)
    return disks


def served(disks: list[Disk]) -> list[int]:
    return [disk.driver.used_idx for disk in disks]


def test_two_disks_have_one_budget_in_sum_until_it_is_lifted(make_disk: MakeDisk) -> None:
    group = RateGroup(RateLimit(ops_per_s=OPS, ops_burst=4))
    began = time.monotonic()
    disks = together(make_disk, group, 2, 16)
    with ExitStack() as stack:
        for disk in disks:
            stack.enter_context(running(disk.engine))
        wait_until(disks[0].irq, lambda: disks[0].driver.used_idx >= 12)
        both = served(disks)
        assert sum(both) <= 4 + OPS * (time.monotonic() - began)
        # Without another kick: it is the new limit that lets the rest go.
        group.set(UNLIMITED)
        for disk in disks:
            wait_until(disk.irq, lambda disk=disk: disk.driver.used_idx == 16)  # type: ignore[misc]
    assert min(both) >= 1
    assert all(disk.engine.stats()["throttled"] for disk in disks)


def test_a_disk_s_own_limit_holds_in_a_group_too(make_disk: MakeDisk) -> None:
    group = RateGroup(RateLimit(ops_per_s=1_000_000))
    own = RateLimiter(RateLimit(ops_per_s=1, ops_burst=3))
    disk = make_disk(group=group, limiter=own)
    disk.offer_reads(6)
    began = time.monotonic()
    with running(disk.engine):
        wait_until(disk.irq, lambda: disk.driver.used_idx >= 3)
        assert disk.driver.used_idx <= 3 + (time.monotonic() - began)
        own.set(UNLIMITED)
        disk.engine.wake()
        wait_until(disk.irq, lambda: disk.driver.used_idx == 6)


def test_a_disk_that_goes_while_it_waits_leaves_its_turn_to_the_others(
    make_disk: MakeDisk,
) -> None:
    group = RateGroup(RateLimit(ops_per_s=OPS, ops_burst=1))
    gone, stays = together(make_disk, group, 2, 16)
    with running(stays.engine):
        with running(gone.engine):
            wait_until(gone.irq, lambda: gone.driver.used_idx >= 2)
        gone.engine.close()
        group.set(RateLimit(ops_per_s=10 * OPS))
        wait_until(stays.irq, lambda: stays.driver.used_idx == 16)


def test_a_pause_of_one_disk_does_not_hold_up_the_other(make_disk: MakeDisk) -> None:
    group = RateGroup(RateLimit(ops_per_s=OPS, ops_burst=1))
    held, runs = disks = together(make_disk, group, 2, 16)
    with running(held.engine), running(runs.engine):
        wait_until(held.irq, lambda: held.driver.used_idx >= 1)
        held.engine.quiesce()
        at = held.driver.used_idx
        wait_until(runs.irq, lambda: runs.driver.used_idx == 16)
        assert held.driver.used_idx == at
        held.engine.resume()
        wait_until(held.irq, lambda: held.driver.used_idx == 16)
    assert served(disks) == [16, 16]
