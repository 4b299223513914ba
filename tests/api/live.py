# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The real server on a real socket, in a thread, with a daemon in memory behind it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from api.app import create_app
from api.server import serve
from tests.api.fake_service import FakeService

T = TypeVar("T")
DEADLINE_S = 20.0


class LiveServer:
    """Serves on a Unix socket and on loopback TCP until it is closed."""

    def __init__(self, directory: Path, token: str) -> None:
        self.path = str(directory / "hostel.sock")
        self.service = FakeService()
        self._unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._unix.bind(self.path)
        self._tcp = socket.socket()
        self._tcp.bind(("127.0.0.1", 0))
        self.port: int = self._tcp.getsockname()[1]
        for listening in (self._unix, self._tcp):
            listening.listen()
        self.app = create_app(self.service, token=token, version="0.1.0")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="live-server")
        self._thread.start()
        assert self._ready.wait(DEADLINE_S)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._loop.call_soon(self._ready.set)
        await serve(self.app, socket=self._unix, tcp_socket=self._tcp, stop=self._stop, grace_s=0.2)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the server's loop."""
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(DEADLINE_S)

    def wait_until(self, claim: Callable[[], bool]) -> None:
        """Return once ``claim`` holds on the server's loop; fail after a long time."""

        async def poll() -> None:
            async with asyncio.timeout(DEADLINE_S):
                while not claim():  # noqa: ASYNC110 - the claim has no event to wait for
                    await asyncio.sleep(0.005)

        self.run(poll())

    def begin_stop(self) -> None:
        """Ask the server to stop."""
        assert self._loop is not None
        assert self._stop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: it has stopped before
            self._loop.call_soon_threadsafe(self._stop.set)

    def close(self) -> None:
        """Stop and wait for the end."""
        self.begin_stop()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()

    def connect(self) -> socket.socket:
        """Open a raw connection to the Unix socket."""
        raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        raw.settimeout(DEADLINE_S)
        raw.connect(self.path)
        return raw


def read_all(raw: socket.socket) -> bytes:
    """Read to the end of a connection."""
    parts = b""
    while piece := raw.recv(65536):
        parts += piece
    return parts
