# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Logging that a guest cannot flood.

Everything that a guest can trigger goes through a GuestLog: a token bucket per device, so that
a hostile guest fills neither the host's disk nor the reader's patience.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

DEFAULT_BURST: Final = 10
DEFAULT_PER_SECOND: Final = 0.2


class RateLimiter:
    """A token bucket.

    Args:
        burst: events let through at once after a quiet time, at least 1.
        per_second: events let through per second in the long run.
        clock: seconds, monotonic; a parameter so that tests need no waiting.

    Threads: any.
    """

    def __init__(
        self,
        burst: int = DEFAULT_BURST,
        per_second: float = DEFAULT_PER_SECOND,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._burst = float(burst)
        self._per_second = per_second
        self._clock = clock
        self._tokens = float(burst)
        self._last = clock()
        self._suppressed = 0
        self._lock = threading.Lock()

    def admit(self) -> int | None:
        """Take a token.

        Returns:
            None when there is none left; else how many events were refused since the last
            one that was let through.
        """
        with self._lock:
            now = self._clock()
            self._tokens = min(self._burst, self._tokens + (now - self._last) * self._per_second)
            self._last = now
            if self._tokens < 1:
                self._suppressed += 1
                return None
            self._tokens -= 1
            suppressed, self._suppressed = self._suppressed, 0
            return suppressed


class GuestLog:
    """A logger for what guests cause: warnings, a few at a time, counted when left out.

    Threads: any.
    """

    def __init__(self, logger: logging.Logger, limiter: RateLimiter | None = None) -> None:
        self._logger = logger
        self._limiter = limiter or RateLimiter()

    def warning(self, message: str, *args: object) -> None:
        """Log ``message % args`` as a warning, unless the guest caused too many already."""
        suppressed = self._limiter.admit()
        if suppressed is None:
            return
        if suppressed:
            message, args = message + " suppressed=%d", (*args, suppressed)
        self._logger.warning(message, *args)
