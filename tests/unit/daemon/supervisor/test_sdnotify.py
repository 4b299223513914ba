# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What systemd is told, and what it tells."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from daemon.supervisor import sdnotify


def test_a_message_reaches_the_notify_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(path)
        assert sdnotify.notify("READY=1", {"NOTIFY_SOCKET": path})
        assert sock.recv(100) == b"READY=1"


def test_an_abstract_socket_is_understood() -> None:
    name = f"hostel-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + name)
        assert sdnotify.notify("STOPPING=1", {"NOTIFY_SOCKET": "@" + name})
        assert sock.recv(100) == b"STOPPING=1"


def test_without_systemd_nothing_happens() -> None:
    assert not sdnotify.notify("READY=1", {})


def test_a_dead_notify_socket_is_no_failure(tmp_path: Path) -> None:
    assert not sdnotify.notify("READY=1", {"NOTIFY_SOCKET": str(tmp_path / "none")})


def test_the_watchdog_is_fed_twice_in_its_time() -> None:
    assert sdnotify.watchdog_interval_s({"WATCHDOG_USEC": "30000000"}) == 15.0


def test_a_watchdog_for_another_process_is_none_of_ours() -> None:
    assert sdnotify.watchdog_interval_s({"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}) is None
    assert sdnotify.watchdog_interval_s({}) is None


def test_sockets_for_another_process_are_not_taken() -> None:
    assert sdnotify.listen_fds({"LISTEN_PID": "1", "LISTEN_FDS": "1"}) == ()
    assert sdnotify.listen_fds({}) == ()
