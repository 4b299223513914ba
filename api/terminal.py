# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""An interactive console: a WebSocket to the daemon, and this process's terminal in raw mode."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator
from typing import Final

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.sync.client import ClientConnection, connect, unix_connect

from .client import Unreachable, url_path
from .endpoint import Endpoint
from .errors import ApiError, Conflict, error_from_problem
from .models.common import Problem

# Ctrl-], as telnet and `virsh console` have it; a guest seldom needs it.
ESCAPE: Final = b"\x1d"
READ_BYTES: Final = 4096
CONNECT_S: Final = 10.0
# After the end of piped input: the guest answers until it is silent, or for so long at most.
SILENCE_S: Final = 0.5
MAX_LISTEN_S: Final = 10.0

Show = Callable[[bytes], None]


@contextlib.contextmanager
def open_console(
    endpoint: Endpoint, ref: str, offset: int | None = None
) -> Iterator[ClientConnection]:
    """Attach to a VM's console, for as long as the context lasts.

    Args:
        endpoint: the daemon.
        ref: name or id of the VM.
        offset: where to begin in the log; None for the last 16 KiB.

    Raises:
        ApiError: the daemon refuses.
        Unreachable: there is no daemon.
    """
    query = "" if offset is None else f"?offset={offset}"
    path = url_path("vms", ref, "console")
    address = f"ws{endpoint.base_url.removeprefix('http')}{path}{query}"
    headers = {} if endpoint.token is None else {"Authorization": f"Bearer {endpoint.token}"}
    with contextlib.ExitStack() as stack:
        try:
            if endpoint.url is None:
                opened = unix_connect(
                    endpoint.socket, address, open_timeout=CONNECT_S, compression=None
                )
            else:
                opened = connect(
                    address,
                    additional_headers=headers,
                    open_timeout=CONNECT_S,
                    compression=None,
                    proxy=None,
                )
            # Only as a context does it mean the same in every version of websockets.
            connection: ClientConnection = stack.enter_context(opened)
        except InvalidStatus as err:
            raise _refusal(err) from None
        except (OSError, InvalidHandshake) as err:
            raise Unreachable(endpoint, str(err)) from err
        yield connection


def _refusal(err: InvalidStatus) -> ApiError:
    return error_from_problem(Problem.model_validate_json(err.response.body or b""))


def attach(connection: ClientConnection, *, source: int, show: Show) -> None:
    """Join a terminal and a console until one of them ends or Ctrl-] is typed.

    After the end of a pipe or a file, the guest's answer is shown until it is silent for
    ``SILENCE_S``, for at most ``MAX_LISTEN_S``.

    Args:
        connection: from `open_console`; closed at the end.
        source: file descriptor of what is typed; a terminal is raw meanwhile.
        show: called with what the guest prints, on another thread.

    Raises:
        ApiError: the daemon ended it, with its reason.
    """
    wake_read, wake_write = os.pipe()
    outcome: list[ApiError] = []
    heard = threading.Event()

    def show_and_tell(data: bytes) -> None:
        heard.set()
        show(data)

    def print_output() -> None:
        try:
            outcome.extend(_print_output(connection, show_and_tell))
        finally:
            os.close(wake_write)

    printer = threading.Thread(target=print_output, name="console-output", daemon=True)
    with raw_terminal(source):
        printer.start()
        try:
            _send_typed(connection, source, wake_read, heard)
        finally:
            connection.close()
            printer.join()
            os.close(wake_read)
    if outcome:
        raise outcome[0]


def _print_output(connection: ClientConnection, show: Show) -> list[ApiError]:
    """Show what comes until the connection ends; return the daemon's reason if it gave one."""
    try:
        for message in connection:
            show(message if isinstance(message, bytes) else message.encode())
    except ConnectionClosed as err:
        if err.rcvd is not None and err.rcvd_then_sent:
            return [Conflict("console_closed", err.rcvd.reason or "the console was closed")]
    except BrokenPipeError:
        return []  # whoever read our output has had enough
    return []


def _send_typed(
    connection: ClientConnection, source: int, wake: int, heard: threading.Event
) -> None:
    """Type until Ctrl-], the end of the input or of the connection."""
    with selectors.DefaultSelector() as selector:
        selector.register(wake, selectors.EVENT_READ)
        is_file = False
        try:
            selector.register(source, selectors.EVENT_READ)
        except PermissionError:
            is_file = True  # always readable, and epoll takes none
        while True:
            ready = {key.fd for key, _ in selector.select(0 if is_file else None)}
            if wake in ready:
                return
            data = os.read(source, READ_BYTES)
            if not data:
                break
            before, escape, _ = data.partition(ESCAPE)
            with contextlib.suppress(ConnectionClosed):
                if before:
                    connection.send(before)
            if escape:
                return
    _await_silence(wake, heard)


def _await_silence(wake: int, heard: threading.Event) -> None:
    """Give the guest a moment to answer what a pipe or a file has typed."""
    with selectors.DefaultSelector() as selector:
        selector.register(wake, selectors.EVENT_READ)
        end = time.monotonic() + MAX_LISTEN_S
        while time.monotonic() < end:
            heard.clear()
            if selector.select(SILENCE_S) or not heard.is_set():
                return


@contextlib.contextmanager
def raw_terminal(fd: int) -> Iterator[None]:
    """Make a terminal raw, and give it back as it was on every way out, signals included."""
    if not os.isatty(fd):
        yield
        return
    before = termios.tcgetattr(fd)
    handlers = {number: signal.signal(number, _leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        tty.setraw(fd)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSAFLUSH, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _leave(number: int, _frame: object) -> None:
    """Turn a deadly signal into an exception, so that the terminal is given back."""
    raise SystemExit(128 + number)


def show_bytes(data: bytes) -> None:
    """Write to standard output as it is."""
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def show_json(data: bytes) -> None:
    """Write one JSON object a line."""
    sys.stdout.write(json.dumps({"output": data.decode(errors="replace")}) + "\n")
    sys.stdout.flush()
