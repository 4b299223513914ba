# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The control socket: one hosteld at a time, the newest wins, and junk harms nobody."""

from __future__ import annotations

import os
import selectors
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon import protocol
from daemon.errors import WorkerError
from daemon.worker.control import ControlServer


class Worker:
    """A control server with an echo for a machine, stepped by hand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.selector = selectors.DefaultSelector()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(path))
        listener.listen()
        self.server = ControlServer(listener, self.selector, self.handle)

    def handle(self, op: str, args: dict[str, Any], fds: tuple[int, ...]) -> dict[str, Any]:
        protocol.close_all(fds)
        if op == "refuse":
            raise WorkerError("wrong_state", "not now")
        if op == "break":
            raise KeyError("a defect")
        return {"op": op, **args}

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(str(self.path))
        self.step()
        return sock

    def step(self) -> None:
        for key, _ in self.selector.select(0):
            key.data()

    def ask(self, sock: socket.socket, body: dict[str, Any]) -> dict[str, Any] | None:
        protocol.send(sock, body)
        self.step()
        message = protocol.receive(sock)
        return None if message is None else message.body


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    worker = Worker(tmp_path / "control.sock")
    yield worker
    worker.server.close()
    worker.selector.close()


def test_request_is_answered_with_its_id(worker: Worker) -> None:
    with worker.connect() as sock:
        assert worker.ask(sock, {"id": 3, "op": "echo", "args": {"a": 1}}) == {
            "id": 3, "ok": {"op": "echo", "a": 1},
        }  # fmt: skip


def test_refusal_carries_its_code(worker: Worker) -> None:
    with worker.connect() as sock:
        answer = worker.ask(sock, {"id": 1, "op": "refuse"})
    assert answer == {"id": 1, "error": {"code": "wrong_state", "message": "not now"}}


def test_defect_in_one_request_is_told_and_survived(worker: Worker) -> None:
    with worker.connect() as sock:
        answer = worker.ask(sock, {"id": 1, "op": "break"})
        assert answer is not None
        assert answer["error"]["code"] == "worker_defect"
        assert worker.ask(sock, {"id": 2, "op": "echo"}) == {"id": 2, "ok": {"op": "echo"}}


def test_newer_hosteld_replaces_the_older(worker: Worker) -> None:
    with worker.connect() as old, worker.connect() as new:
        assert protocol.receive(old) is None
        assert worker.ask(new, {"id": 1, "op": "echo"}) == {"id": 1, "ok": {"op": "echo"}}


@pytest.mark.parametrize("junk", [b"\x00", b"[1]", b'{"id": 1'])
def test_junk_ends_the_connection_and_the_next_one_works(worker: Worker, junk: bytes) -> None:
    with worker.connect() as sock:
        sock.send(junk)
        worker.step()
        assert protocol.receive(sock) is None
    with worker.connect() as sock:
        assert worker.ask(sock, {"id": 1, "op": "echo"}) == {"id": 1, "ok": {"op": "echo"}}


@pytest.mark.parametrize("body", [{"id": 1}, {"id": 1, "op": 7}, {"id": 1, "op": "x", "args": []}])
def test_misshapen_request_is_refused_and_its_descriptors_closed(
    worker: Worker, body: dict[str, Any]
) -> None:
    with worker.connect() as sock:
        read_end, write_end = os.pipe()
        protocol.send(sock, body, (write_end,))
        before = len(list(Path("/proc/self/fd").iterdir()))
        worker.step()
        assert len(list(Path("/proc/self/fd").iterdir())) == before
        message = protocol.receive(sock)
        protocol.close_all((read_end, write_end))
    assert message is not None
    assert message.body["error"]["code"] == "bad_request"


def test_hosteld_that_is_slow_to_read_loses_nothing(worker: Worker) -> None:
    with worker.connect() as sock:
        for number in range(200):
            worker.server.notify("state", {"number": number, "x": "y" * 2000})
        seen = []
        while len(seen) < 200:
            message = protocol.receive(sock)
            assert message is not None
            seen.append(message.body["data"]["number"])
            worker.step()
        assert seen == list(range(200))
        assert worker.ask(sock, {"id": 1, "op": "echo"}) == {"id": 1, "ok": {"op": "echo"}}


def test_hosteld_that_does_not_read_is_hung_up_on(worker: Worker) -> None:
    with worker.connect() as sock:
        for _ in range(10_000):
            worker.server.notify("state", {"x": "y" * 1000})
        received = 0
        while protocol.receive(sock) is not None:
            received += 1
    assert 0 < received < 10_000
