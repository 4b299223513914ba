# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The console's and the worker's log: bounded on disk, offsets that stay, a disk that is full."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon.worker.console import KEEP_BYTES, BoundedLog, WorkerLog


@pytest.fixture
def log_path(tmp_path: Path) -> Path:
    return tmp_path / "console.log"


@pytest.fixture
def log_fd(log_path: Path) -> Iterator[int]:
    fd = os.open(log_path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600)
    yield fd
    os.close(fd)


def test_what_is_printed_is_in_the_file(log_fd: int, log_path: Path) -> None:
    log = BoundedLog(log_fd)
    log.append(b"hello ")
    log.append(b"world")
    assert log_path.read_bytes() == b"hello world"


def test_log_keeps_its_end_at_its_offset_and_frees_the_rest(log_fd: int, log_path: Path) -> None:
    log = BoundedLog(log_fd)
    line = b"x" * 4095 + b"\n"
    count = 4 * KEEP_BYTES // len(line)
    for _ in range(count):
        log.append(line)
    log.append(b"the end")
    assert log_path.stat().st_size == count * len(line) + len(b"the end")
    assert log_path.stat().st_blocks * 512 < 2 * KEEP_BYTES
    assert os.pread(log_fd, KEEP_BYTES, count * len(line) - KEEP_BYTES + 7).endswith(b"the end")


def test_log_goes_on_where_an_earlier_worker_ended(log_fd: int, log_path: Path) -> None:
    BoundedLog(log_fd).append(b"first")
    BoundedLog(log_fd).append(b"second")
    assert log_path.read_bytes() == b"firstsecond"


def test_full_disk_loses_output_but_not_the_worker() -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        log = BoundedLog(fd)
        log.append(b"lost")
        assert log.lost_bytes == 4
    finally:
        os.close(fd)


def test_worker_log_keeps_its_end(log_fd: int, log_path: Path) -> None:
    handler = logging.StreamHandler(WorkerLog(log_fd))
    for number in range(4096):
        handler.handle(logging.makeLogRecord({"msg": f"{number} \ud800" + "x" * 1000}))
    assert log_path.stat().st_blocks * 512 < 2 * KEEP_BYTES
    end = os.pread(log_fd, 2000, log_path.stat().st_size - 2000)
    assert end.endswith(b"\n4095 \\ud800" + b"x" * 1000 + b"\n")


def test_log_that_cannot_be_shortened_says_so_and_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with open(os.devnull, "ab", buffering=0) as nothing:  # it takes all and knows no holes
        handler = logging.StreamHandler(WorkerLog(nothing.fileno()))
        logging.getLogger().addHandler(handler)
        try:
            for _ in range(4):
                handler.handle(logging.makeLogRecord({"msg": "x" * KEEP_BYTES}))
        finally:
            logging.getLogger().removeHandler(handler)
    warnings = [record for record in caplog.records if "not shortened" in record.message]
    assert len(warnings) == 3
