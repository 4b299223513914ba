# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Disks for the tests of the block engine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvm_ffi.blk_engine import BlkEngine, BlkQueue, IoEngine, require_io_uring
from kvm_ffi.eventfd import EventFd
from kvm_ffi.memory import GuestMemory
from kvm_ffi.types import Gpa
from tests.support.disk import PATTERN, SECTORS, Disk, MakeDisk
from tests.support.ring_driver import RingDriver


@pytest.fixture(params=[IoEngine.IO_URING, IoEngine.THREADS], ids=lambda engine: engine.value)
def io_engine(request: pytest.FixtureRequest) -> IoEngine:
    """Both of them: a guest must not be able to tell."""
    engine: IoEngine = request.param
    if engine is IoEngine.IO_URING:
        try:
            require_io_uring()
        except OSError as err:
            pytest.skip(f"io_uring: {err.strerror}")
    return engine


@pytest.fixture
def make_disk(tmp_path: Path, io_engine: IoEngine) -> Iterator[MakeDisk]:
    """Builds a Disk; keywords go to BlkEngine, the rest overrides the defaults."""
    made: list[Disk] = []
    memory = GuestMemory([(Gpa(0), 1 << 20)])

    def make(
        *,
        fd: int | None = None,
        event_idx: bool = False,
        ring_size: int = 16,
        base: int = 0x1000,
        **keywords: object,
    ) -> Disk:
        path = tmp_path / "disk.img"
        path.write_bytes(PATTERN)
        opened = os.open(path, os.O_RDWR) if fd is None else fd
        driver = RingDriver(memory, size=ring_size, base=base)
        kick, irq, fault = EventFd(), EventFd(), EventFd()
        queue = driver.queue(event_idx=event_idx)
        settings: dict[str, Any] = {
            "size_sectors": SECTORS,
            "read_only": False,
            "serial": b"s",
            "io_engine": io_engine,
        }
        wires = BlkQueue(queue, kick, keywords.pop("irq", irq))
        engine = BlkEngine(memory, opened, queues=[wires], fault=fault, **settings | keywords)
        made.append(Disk(memory, driver, queue, engine, opened, path, kick, irq, fault))
        return made[-1]

    yield make
    for disk in made:
        disk.engine.close()
        os.close(disk.fd)
        for event in (disk.kick, disk.irq, disk.fault):
            event.close()
    memory.close()


@pytest.fixture
def disk(make_disk: MakeDisk) -> Disk:
    return make_disk()
