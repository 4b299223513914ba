# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Eventfds: a guest's kick to a thread (ioeventfd), an interrupt to a guest (irqfd)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType


class EventFd:
    """A counting, non-blocking eventfd that owns its file descriptor.

    Args:
        fd: an open eventfd to take over; None creates one with count 0.

    Raises:
        OSError: the process has no file descriptors left.

    Threads: any thread may signal or drain; close() comes after the last user.

    Source: eventfd(2).
    """

    __slots__ = ("fd",)

    def __init__(self, fd: int | None = None) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) if fd is None else fd

    def fileno(self) -> int:
        """The file descriptor, for selectors."""
        return self.fd

    def signal(self) -> None:
        """Add one to the count; wakes whoever waits."""
        os.eventfd_write(self.fd, 1)

    def drain(self) -> int:
        """Reset the count and return what it was; 0 if nothing was signalled."""
        try:
            return os.eventfd_read(self.fd)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
