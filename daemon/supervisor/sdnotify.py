# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""systemd: readiness, status, watchdog and socket activation, without a library.

Source: sd_notify(3), sd_watchdog_enabled(3), sd_listen_fds(3).
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from typing import Final

log = logging.getLogger(__name__)

LISTEN_FDS_START: Final = 3


def notify(message: str, environ: Mapping[str, str] | None = None) -> bool:
    """Tell the service manager, such as ``READY=1``; False when there is none or it is deaf."""
    environ = os.environ if environ is None else environ
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto(message.encode(), address)
        except OSError as err:
            log.warning("sd_notify failed error=%s", err.strerror)
            return False
    return True


def watchdog_interval_s(environ: Mapping[str, str] | None = None) -> float | None:
    """Return how often to send WATCHDOG=1: half of what systemd allows; None without a watchdog."""
    environ = os.environ if environ is None else environ
    usec = environ.get("WATCHDOG_USEC", "")
    pid = environ.get("WATCHDOG_PID", str(os.getpid()))
    if not usec.isdecimal() or int(usec) == 0 or pid != str(os.getpid()):
        return None
    return int(usec) / 2_000_000


def listen_fds(environ: Mapping[str, str] | None = None) -> tuple[int, ...]:
    """Return the listening sockets that systemd passed; they belong to the caller."""
    environ = os.environ if environ is None else environ
    count = environ.get("LISTEN_FDS", "")
    if environ.get("LISTEN_PID") != str(os.getpid()) or not count.isdecimal():
        return ()
    fds = tuple(range(LISTEN_FDS_START, LISTEN_FDS_START + int(count)))
    for fd in fds:
        os.set_inheritable(fd, False)
    return fds
