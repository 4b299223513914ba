# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A worker's files: its control socket, its logs, its last words."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ..errors import ProtocolError
from ..protocol import Status
from .dirs import Layout

log = logging.getLogger(__name__)

# Status and tail of a worker that has died are small; more is not read.
MAX_LAST_WORDS_BYTES: Final = 64 * 1024
LOG_TAIL_BYTES: Final = 4096
LOG_TAIL_LINES: Final = 5
LISTEN_BACKLOG: Final = 8
# sockaddr_un.sun_path without its terminating NUL: unix(7).
MAX_SOCKET_PATH: Final = 107


@contextlib.contextmanager
def short_path(directory: Path, name: str = "control.sock") -> Iterator[str]:
    """Yield a name of a socket that fits sockaddr_un however deep it lies."""
    path = f"{directory}/{name}"
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH:
        yield path
        return
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{name}"
    finally:
        os.close(fd)


def listen(runtime: Path) -> socket.socket:
    """Bind a fresh control socket; the worker inherits it, already listening.

    Raises:
        OSError: as bind(2).
    """
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{runtime}/control.sock")  # noqa: PTH108 - see open_logs()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        with short_path(runtime) as path:
            sock.bind(path)
        sock.listen(LISTEN_BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def connect(runtime: Path) -> socket.socket:
    """Connect to a worker's control socket.

    Raises:
        OSError: as connect(2); BlockingIOError when its backlog is full.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    sock.setblocking(False)
    try:
        with short_path(runtime) as path:
            sock.connect(path)
    except OSError:
        sock.close()
        raise
    return sock


def open_logs(layout: Layout, vm_id: str, stack: contextlib.ExitStack) -> tuple[int, int, int]:
    """Open console.log, worker.log and last_words for a worker; ``stack`` closes them.

    Raises:
        OSError: no space, for one.
    """
    # Strings and not Paths: on the way of every start, Paths cost more than the system calls.
    state = str(layout.vm_state(vm_id))
    with contextlib.suppress(FileExistsError):
        os.mkdir(state, 0o700)  # noqa: PTH102
    last_words = f"{layout.vm_runtime(vm_id)}/last_words"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(last_words)  # noqa: PTH108
    append = os.O_RDWR | os.O_APPEND
    fds = []
    for path, flags in (
        (f"{state}/console.log", append),
        (f"{state}/worker.log", append),
        # A new one: a worker that was given up on may still write to the one before.
        (last_words, os.O_RDWR | os.O_EXCL),
    ):
        fds.append(os.open(path, flags | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        stack.callback(os.close, fds[-1])
    return fds[0], fds[1], fds[2]


def read_last_words(runtime: Path) -> Status | None:
    """Return the Status that a worker left, None when it left none."""
    try:
        with (runtime / "last_words").open("rb") as file:
            data = file.read(MAX_LAST_WORDS_BYTES)
        return Status.decode(json.loads(data)) if data else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ProtocolError) as err:
        log.warning("last words not understood path=%s error=%s", runtime, err)
        return None


def log_tail(path: Path) -> tuple[str, ...]:
    """Return the last lines of a worker's log."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - LOG_TAIL_BYTES))
            text = file.read(LOG_TAIL_BYTES).decode(errors="replace")
    except OSError:
        return ()
    return tuple(line[:300] for line in text.splitlines()[-LOG_TAIL_LINES:])
