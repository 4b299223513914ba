# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""One-shot timers that event loops can wait for."""

from __future__ import annotations

import contextlib
import os

from ._kvm import lib
from .engine import check


class Timer:
    """A timerfd: readable from the moment at which it expires until it is drained or set anew.

    Raises:
        OSError: the process has no file descriptors left.

    Threads: any thread may set or drain it; close() comes after the last user.

    Source: timerfd_create(2), CLOCK_MONOTONIC: it stands still while the host is suspended.
    """

    def __init__(self) -> None:
        self.fd = lib.timer_create_fd()
        check(self.fd)

    def set(self, delay_ns: int) -> None:
        """Have it expire once, after 1 ns or more; 0 stops it. What came before is forgotten."""
        check(lib.timer_set(self.fd, delay_ns))

    def drain(self) -> bool:
        """Whether it has expired since it was set; it is not readable after that."""
        with contextlib.suppress(BlockingIOError):
            return bool(os.read(self.fd, 8))
        return False

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.fd)
