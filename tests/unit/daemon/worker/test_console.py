# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The console log: bounded on disk, offsets that stay, and a disk that is full."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon.worker.console import KEEP_BYTES, ConsoleLog


@pytest.fixture
def log_path(tmp_path: Path) -> Path:
    return tmp_path / "console.log"


@pytest.fixture
def log_fd(log_path: Path) -> Iterator[int]:
    fd = os.open(log_path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600)
    yield fd
    os.close(fd)


def test_what_is_printed_is_in_the_file(log_fd: int, log_path: Path) -> None:
    log = ConsoleLog(log_fd)
    log.append(b"hello ")
    log.append(b"world")
    assert log_path.read_bytes() == b"hello world"


def test_log_keeps_its_end_at_its_offset_and_frees_the_rest(log_fd: int, log_path: Path) -> None:
    log = ConsoleLog(log_fd)
    line = b"x" * 4095 + b"\n"
    count = 4 * KEEP_BYTES // len(line)
    for _ in range(count):
        log.append(line)
    log.append(b"the end")
    assert log_path.stat().st_size == count * len(line) + len(b"the end")
    assert log_path.stat().st_blocks * 512 < 2 * KEEP_BYTES
    assert os.pread(log_fd, KEEP_BYTES, count * len(line) - KEEP_BYTES + 7).endswith(b"the end")


def test_log_goes_on_where_an_earlier_worker_ended(log_fd: int, log_path: Path) -> None:
    ConsoleLog(log_fd).append(b"first")
    ConsoleLog(log_fd).append(b"second")
    assert log_path.read_bytes() == b"firstsecond"


def test_full_disk_loses_output_but_not_the_worker() -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        log = ConsoleLog(fd)
        log.append(b"lost")
        assert log.lost_bytes == 4
    finally:
        os.close(fd)
