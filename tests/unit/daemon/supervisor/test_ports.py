# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The sockets of a VM's console ports: where they are, and what is in their way."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from api.errors import HostFailure
from daemon.supervisor.ports import open_ports
from daemon.supervisor.records import PortRecord


def ports_in(directory: Path, *names: str) -> list[PortRecord]:
    return [PortRecord(name, False, str(directory / "ports" / name)) for name in names]


def close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def test_each_port_has_a_socket_that_takes_connections(tmp_path: Path) -> None:
    fds = open_ports(ports_in(tmp_path, "tty", "agent"))
    assert stat.S_IMODE((tmp_path / "ports").stat().st_mode) == 0o700
    for name in ("tty", "agent"):
        with socket.socket(socket.AF_UNIX) as program:
            program.connect(str(tmp_path / "ports" / name))
    close(fds)


def test_socket_of_an_ended_worker_is_no_obstacle(tmp_path: Path) -> None:
    for _ in range(2):
        close(open_ports(ports_in(tmp_path, "agent")))


def test_socket_lies_as_deep_as_it_must(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    close(open_ports(ports_in(deep, "agent")))
    assert stat.S_ISSOCK((deep / "ports" / "agent").stat().st_mode)


def test_what_cannot_be_bound_is_named_and_nothing_stays_open(tmp_path: Path) -> None:
    (tmp_path / "ports" / "agent").mkdir(parents=True)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - as short as it is
    with pytest.raises(HostFailure, match="ports/agent") as caught:
        open_ports(ports_in(tmp_path, "tty", "agent"))
    assert (caught.value.code, caught.value.field) == ("port_failed", "ports.1")
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208 - as above
