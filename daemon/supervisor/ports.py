# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The host's side of a VM's console ports: a Unix socket for each, in its runtime directory."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from api.errors import HostFailure

from .records import PortRecord
from .worker_files import short_path

# One program at a time is served; so many more wait.
BACKLOG: Final = 16


def open_ports(ports: Sequence[PortRecord]) -> list[int]:
    """Return a listening socket for each port of a VM.

    Raises:
        HostFailure: one cannot be bound.

    Threads: any.
    """
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(_listen(index, port)) for index, port in enumerate(ports)]
        return [sock.detach() for sock in made]


def _listen(index: int, port: PortRecord) -> socket.socket:
    path = Path(port.path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        # The worker that comes makes the directory above, if it is not there yet, as well.
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # noqa: PTH108 - of the worker before, which has ended
        with short_path(path.parent, path.name) as name:
            sock.bind(name)
        sock.listen(BACKLOG)
    except OSError as err:
        sock.close()
        text = f"{path}: {err.strerror}"
        raise HostFailure("port_failed", text, field=f"ports.{index}") from err
    return sock
