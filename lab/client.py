# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Talks to the agent in a lab: runs commands there as if they were here."""

import contextlib
import json
import math
import os
import secrets
import selectors
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from lab.errors import TIMED_OUT, LabError

HEADER: Final = struct.Struct("!cI")
STATUS: Final = struct.Struct("!i")
CHUNK_BYTES: Final = 1 << 16
CONNECT_S: Final = 20.0
# QEMU 7.2 now and then loses the timer interrupt of an emulated CPU that runs a nested guest. The
# lab's kernel then schedules nothing, for minutes, until any other interrupt comes: we send one.
HEARTBEAT_S: Final = 1.0
HEARTBEAT: Final = HEADER.pack(b"n", 0)
GRACE_S: Final = 5.0  # how long a command may take to end once it was asked to
FORWARDED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
STUBBORN_COUNT: Final = 3  # this many signals mean: don't wait, kill it


@dataclass(frozen=True)
class Endpoint:
    """Where a lab's agent listens on this machine, and the secret that it wants to see."""

    port: int
    token: str

    def request(self, do: str, **details: Any) -> socket.socket:  # noqa: ANN401 (JSON)
        """Open a connection and send one request on it.

        Raises:
            LabError: nobody answers.
        """
        line = json.dumps({"token": self.token, "do": do, **details}).encode() + b"\n"
        try:
            connection = socket.create_connection(("127.0.0.1", self.port), timeout=CONNECT_S)
            connection.sendall(line)
        except OSError as err:
            raise LabError(f"the lab does not answer: {err}") from err
        return connection

    def call(self, do: str, **details: Any) -> bool:  # noqa: ANN401 (JSON)
        """Make a request that is answered at once; return whether it was."""
        try:
            with self.request(do, **details) as connection:
                return len(connection.recv(HEADER.size + STATUS.size)) > 0
        except (LabError, OSError):
            return False


@dataclass(frozen=True)
class Command:
    """What to run in a lab."""

    argv: Sequence[str]
    cwd: str
    env: Mapping[str, str]
    forward_stdin: bool = False
    timeout_s: float | None = None
    has_heartbeat: bool = True


def frames(buffer: bytearray) -> Iterator[tuple[bytes, bytes]]:
    """Take the complete frames out of `buffer`, leaving the rest of it."""
    while len(buffer) >= HEADER.size:
        kind, length = HEADER.unpack_from(buffer)
        end = HEADER.size + length
        if len(buffer) < end:
            return
        payload = bytes(buffer[HEADER.size : end])
        del buffer[:end]
        yield kind, payload


class Execution:
    """One command on its way; passes on output, input and signals until it has ended."""

    def __init__(self, endpoint: Endpoint, command: Command) -> None:
        self._endpoint = endpoint
        self._command = command
        self._id = secrets.token_hex(8)
        self._signals: list[int] = []
        self._signal_count = 0
        self._deadline = time.monotonic() + command.timeout_s if command.timeout_s else None
        self._status_if_late: int | None = None  # set once the command was asked to end
        self._is_late = False

    def run(self) -> int:
        """Run the command to its end and return its exit status.

        Returns:
            128 + N if signal N ended it, 124 if it ran past its time, 126 or 127 if it could
            not be started.

        Raises:
            LabError: the lab went away.
        """
        command = self._command
        connection = self._endpoint.request(
            "exec",
            id=self._id,
            argv=list(command.argv),
            cwd=command.cwd,
            env=dict(command.env),
            stdin=command.forward_stdin,
        )
        with connection, self._catch_signals() as wakeup, selectors.DefaultSelector() as selector:
            selector.register(connection, selectors.EVENT_READ)
            selector.register(wakeup, selectors.EVENT_READ)
            if command.forward_stdin:
                self._watch_stdin(selector, connection)
            return self._loop(connection, wakeup, selector)

    def _loop(
        self,
        connection: socket.socket,
        wakeup: socket.socket,
        selector: selectors.BaseSelector,
    ) -> int:
        buffer = bytearray()
        # Between pieces of standard input, which may fill the connection, there is none.
        has_heartbeat = self._command.has_heartbeat and not self._command.forward_stdin
        longest = HEARTBEAT_S if has_heartbeat else math.inf
        while True:
            left = math.inf if self._deadline is None else self._deadline - time.monotonic()
            if left <= 0 and self._out_of_time():
                assert self._status_if_late is not None
                return self._status_if_late
            wait_s = min(left, longest)
            events = selector.select(None if wait_s == math.inf else wait_s)
            if not events and has_heartbeat:
                self._beat(connection)
            for key, _ in events:
                if key.fileobj is wakeup:
                    wakeup.recv(CHUNK_BYTES)
                    self._pass_signals()
                elif key.fileobj is connection:
                    status = self._receive(connection, buffer)
                    if status is not None:
                        return TIMED_OUT if self._is_late else status
                else:
                    self._send_stdin(selector, connection)

    def _beat(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):  # what is left to receive says how it ended
            connection.sendall(HEARTBEAT)

    def _receive(self, connection: socket.socket, buffer: bytearray) -> int | None:
        """Pass on what has come; return the exit status once it is there."""
        try:
            data = connection.recv(CHUNK_BYTES)
        except OSError as err:
            raise LabError(f"lost the lab: {err.strerror}") from err
        if not data:
            raise LabError("lost the lab: it closed the connection before the command ended")
        buffer += data
        for kind, payload in frames(buffer):
            match kind:
                case b"o":
                    _write(1, payload)
                case b"e":
                    _write(2, payload)
                case b"x":
                    return int(STATUS.unpack(payload)[0])
                case b"f":
                    print(f"lab: {payload[STATUS.size :].decode()}", file=sys.stderr)
                    return int(STATUS.unpack_from(payload)[0])
                case _:
                    raise LabError(f"the lab's agent sent nonsense: frame {kind!r}")
        return None

    def _out_of_time(self) -> bool:
        """Ask the command to end when its time is up; return whether it had that chance."""
        if self._status_if_late is not None:
            self._signal(signal.SIGKILL)
            return True
        self._status_if_late = TIMED_OUT
        self._is_late = True
        print(f"lab: ran past {self._command.timeout_s:g} s, ending it", file=sys.stderr)
        self._signal(signal.SIGTERM)
        self._deadline = time.monotonic() + GRACE_S
        return False

    def _pass_signals(self) -> None:
        """Hand each caught signal to the command's process group, and set a limit for its end."""
        while self._signals:
            number = self._signals.pop(0)
            self._signal_count += 1
            self._signal(signal.SIGKILL if self._signal_count >= STUBBORN_COUNT else number)
            if self._status_if_late is None:
                self._status_if_late = 128 + number
                self._deadline = time.monotonic() + GRACE_S

    def _signal(self, number: int) -> None:
        # A connection of its own: the command's may be full of input that it does not read.
        self._endpoint.call("signal", id=self._id, signal=number)

    @contextlib.contextmanager
    def _catch_signals(self) -> Iterator[socket.socket]:
        """Collect signals instead of dying of them; yield a socket that wakes the selector."""
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        before = {n: signal.signal(n, lambda n, _: self._signals.append(n)) for n in FORWARDED}
        previous = signal.set_wakeup_fd(writer.fileno())
        try:
            yield reader
        finally:
            signal.set_wakeup_fd(previous)
            for number, handler in before.items():
                signal.signal(number, handler)
            reader.close()
            writer.close()

    def _watch_stdin(self, selector: selectors.BaseSelector, connection: socket.socket) -> None:
        try:
            selector.register(0, selectors.EVENT_READ)
        except PermissionError:
            # epoll refuses regular files. They never block: send all of it at once.
            while _send_input(connection):
                pass

    def _send_stdin(self, selector: selectors.BaseSelector, connection: socket.socket) -> None:
        if not _send_input(connection):
            selector.unregister(0)


def _send_input(connection: socket.socket) -> bool:
    """Send a piece of standard input, or its end; return whether to go on."""
    data = os.read(0, CHUNK_BYTES)
    try:
        connection.sendall(HEADER.pack(b"i", len(data)) + data)
    except OSError:
        return False  # the command has ended; what is left to receive says how
    return bool(data)


def _write(fd: int, data: bytes) -> None:
    """Write to standard output or error; a reader that is gone ends us like any filter."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
