# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Disks for the tests of the block engine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvm_ffi.blk_engine import BlkEngine
from kvm_ffi.eventfd import EventFd
from kvm_ffi.memory import GuestMemory
from kvm_ffi.types import Gpa
from tests.support.disk import PATTERN, SECTORS, Disk, MakeDisk
from tests.support.ring_driver import RingDriver


@pytest.fixture
def make_disk(tmp_path: Path) -> Iterator[MakeDisk]:
    """Builds a Disk; keywords go to BlkEngine, `fd` and `event_idx` override the defaults."""
    made: list[Disk] = []
    memory = GuestMemory([(Gpa(0), 1 << 20)])

    def make(*, fd: int | None = None, event_idx: bool = False, **keywords: object) -> Disk:
        path = tmp_path / "disk.img"
        path.write_bytes(PATTERN)
        opened = os.open(path, os.O_RDWR) if fd is None else fd
        driver = RingDriver(memory, size=16)
        kick, irq, fault = EventFd(), EventFd(), EventFd()
        settings: dict[str, Any] = {"size_sectors": SECTORS, "read_only": False, "serial": b"s"}
        settings |= {"queue": driver.queue(event_idx=event_idx), "irq": irq} | keywords
        engine = BlkEngine(memory, opened, kick=kick, fault=fault, **settings)
        made.append(Disk(memory, driver, settings["queue"], engine, opened, path, kick, irq, fault))
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
