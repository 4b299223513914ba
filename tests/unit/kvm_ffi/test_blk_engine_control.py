# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The block engine as a thread: kicks, interrupts, quiesce, stop."""

from __future__ import annotations

import errno
import functools
import os
import threading
import time

import pytest

from kvm_ffi.blk_engine import IoEngine
from kvm_ffi.engine import EngineFault
from kvm_ffi.eventfd import EventFd
from tests.support.disk import DATA, GET_ID, HEADER, STATUS, Disk, MakeDisk
from tests.support.engine_thread import running, wait_signal, wait_until
from tests.support.ring_driver import WRITE


def test_event_idx_saves_interrupts(make_disk: MakeDisk) -> None:
    disk = make_disk(event_idx=True)
    disk.driver.set_used_event(9)
    for _ in range(5):
        disk.offer_reads(3)
        assert disk.serve() == 0
    assert disk.engine.stats()["interrupts"] == 1
    assert disk.irq.drain() == 1
    assert len(disk.driver.take_used()) == 15


def test_a_batch_has_one_interrupt(make_disk: MakeDisk, io_engine: IoEngine) -> None:
    disk = make_disk()
    # Asked for its name a disk has nothing to wait for, so the batch is what was offered.
    disk.header(GET_ID)
    head = disk.driver.chain([(HEADER, 16, 0), (DATA, 20, WRITE), (STATUS, 1, WRITE)])
    disk.driver.offer(*[head] * 16)
    began_ns = time.monotonic_ns()
    assert disk.serve() == 0
    took_ns = time.monotonic_ns() - began_ns
    # Threads show what they have after each 50 us: a host that runs them late sees more.
    more = took_ns // 50_000 if io_engine is IoEngine.THREADS else 0
    assert 1 <= disk.irq.drain() <= 1 + more
    assert disk.engine.stats()["get_ids"] == len(disk.driver.take_used()) == 16


def test_each_interrupt_is_counted(disk: Disk) -> None:
    disk.offer_reads(16)
    assert disk.serve() == 0
    assert disk.irq.drain() == disk.engine.stats()["interrupts"] > 0


def test_a_running_engine_serves_kicks_until_stopped(disk: Disk) -> None:
    with running(disk.engine) as thread:
        for expected in range(1, 4):
            disk.offer_reads(1)
            disk.kick.signal()
            wait_until(disk.irq, functools.partial(disk.has_used, expected))
    assert thread.stopped is True
    assert disk.engine.stats()["reads"] == 3


def test_chains_that_came_before_the_start_are_served_without_a_kick(disk: Disk) -> None:
    disk.offer_reads(1)
    with running(disk.engine):
        wait_signal(disk.irq)
    assert disk.driver.used_idx == 1


def test_a_broken_ring_ends_the_run_and_signals_the_fault(disk: Disk) -> None:
    with running(disk.engine) as thread:
        disk.driver.set_avail_idx(0x8000)
        disk.kick.signal()
        assert wait_signal(disk.fault) == 1
    assert thread.stopped is False
    assert disk.engine.fault is EngineFault.RING


def test_kicks_during_a_quiesce_are_served_after_it(disk: Disk) -> None:
    with running(disk.engine):
        disk.engine.quiesce()
        disk.offer_reads(2)
        disk.kick.signal()
        assert disk.driver.used_idx == 0
        disk.engine.quiesce()
        disk.engine.resume()
        wait_until(disk.irq, lambda: disk.driver.used_idx == 2)


def test_a_quiesced_engine_leaves_nothing_half_done(disk: Disk) -> None:
    stop = threading.Event()

    def keep_busy() -> None:
        done = 0
        while not stop.is_set():
            if disk.driver.used_idx == done & 0xFFFF:
                disk.offer_reads(4)
                done += 4
                disk.kick.signal()

    busy = threading.Thread(target=keep_busy)
    queue = disk.queue
    with running(disk.engine):
        busy.start()
        try:
            for _ in range(200):
                disk.engine.quiesce()
                state = queue.state
                assert state.next_avail == state.next_used == disk.driver.used_idx
                disk.engine.resume()
        finally:
            stop.set()
            busy.join()


def test_a_quiesce_before_the_start_holds_the_engine(disk: Disk) -> None:
    disk.engine.quiesce()
    disk.offer_reads(1)
    with running(disk.engine):
        disk.engine.quiesce()
        assert disk.driver.used_idx == 0
        disk.engine.resume()
        wait_signal(disk.irq)


def test_a_quiesced_engine_can_be_stopped(disk: Disk) -> None:
    with running(disk.engine) as thread:
        disk.engine.quiesce()
    assert thread.stopped is True


def test_a_quiesce_that_takes_too_long_raises_and_lets_go(make_disk: MakeDisk) -> None:
    # A blocking eventfd whose counter is full holds the engine in its interrupt for as long as
    # the test likes.
    with EventFd(os.eventfd(0)) as irq:
        os.eventfd_write(irq.fd, (1 << 64) - 2)
        disk = make_disk(irq=irq)
        disk.offer_reads(1)
        with running(disk.engine):
            while disk.driver.used_idx == 0:
                os.sched_yield()
            with pytest.raises(TimeoutError, match="still busy"):
                disk.engine.quiesce(timeout_s=0.01)
            os.eventfd_read(irq.fd)
            wait_signal(irq)
            disk.offer_reads(1)
            disk.kick.signal()
            wait_until(irq, lambda: disk.driver.used_idx == 2)
            disk.engine.quiesce()


def test_only_one_thread_may_run_an_engine(disk: Disk) -> None:
    with running(disk.engine):
        disk.offer_reads(1)
        disk.kick.signal()
        wait_signal(disk.irq)
        with pytest.raises(OSError, match="busy") as caught:
            disk.engine.run()
    assert caught.value.errno == errno.EBUSY


def test_a_running_engine_cannot_be_closed(disk: Disk) -> None:
    disk.offer_reads(1)
    with running(disk.engine):
        wait_signal(disk.irq)
        with pytest.raises(OSError, match="still runs"):
            disk.engine.close()
    disk.engine.close()
    disk.engine.close()
    with pytest.raises(ValueError, match="closed"):
        disk.engine.stats()
