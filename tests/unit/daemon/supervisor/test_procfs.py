# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Processes are told apart, also from later ones with the same pid."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from daemon.supervisor import procfs


def test_a_process_is_recognised_again() -> None:
    identity = procfs.identify(os.getpid())
    assert identity is not None
    pidfd = procfs.open_if_same(identity)
    assert pidfd is not None
    os.close(pidfd)


def test_a_process_that_started_later_or_in_another_boot_is_another() -> None:
    identity = procfs.identify(os.getpid())
    assert identity is not None
    assert procfs.open_if_same(replace(identity, start_ticks=1)) is None
    assert procfs.open_if_same(replace(identity, boot_id="x")) is None


def test_a_process_that_has_gone_is_nobody() -> None:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    assert procfs.identify(done.pid) is None
    assert procfs.rss_bytes(done.pid) == 0


def test_a_command_name_with_blanks_and_brackets_does_not_confuse(tmp_path: Path) -> None:
    script = tmp_path / "a) R 1 (b"
    script.symlink_to(sys.executable)
    with subprocess.Popen([script, "-c", "input()"], stdin=subprocess.PIPE) as process:
        ticks = procfs.start_ticks(process.pid)
        process.kill()
    assert ticks is not None
    assert ticks > 1000


def test_memory_is_plausible() -> None:
    total, available = procfs.memory()
    assert 0 < available <= total
    assert procfs.rss_bytes(os.getpid()) > 1 << 20
