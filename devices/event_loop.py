# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A thread that turns eventfd signals into calls: kicks and faults of the slow devices.

Fast devices have C engines with threads of their own; what is left here is rare.
"""

from __future__ import annotations

import logging
import select
import threading
from collections.abc import Callable
from typing import Final

from kvm_ffi.eventfd import EventFd

from .ratelimit import RateLimiter

log = logging.getLogger(__name__)

MAX_EVENTS: Final = 64


class EventLoop:
    """epoll over eventfds; one per worker.

    A callback runs on the loop's thread, after the eventfd was drained. remove() does not wait
    for a callback that is already running: a device guards its own state.

    Threads: every method from any thread, callbacks included.
    """

    def __init__(self, name: str = "devices") -> None:
        self._name = name
        self._epoll = select.epoll()
        self._lock = threading.Lock()
        # The eventfd of add(), None for what watch() was given.
        self._sources: dict[int, tuple[EventFd | None, Callable[[], None]]] = {}
        self._wake = EventFd()
        self._epoll.register(self._wake.fd, select.EPOLLIN)
        self._is_stopping = False
        self._thread: threading.Thread | None = None
        self._limiter = RateLimiter()

    def add(self, eventfd: EventFd, callback: Callable[[], None]) -> None:
        """Call ``callback`` whenever ``eventfd`` is signalled.

        Raises:
            ValueError: the eventfd is already watched.
        """
        with self._lock:
            if eventfd.fd in self._sources:
                raise ValueError(f"fd={eventfd.fd} is already watched")
            self._sources[eventfd.fd] = (eventfd, callback)
            self._epoll.register(eventfd.fd, select.EPOLLIN)

    def remove(self, eventfd: EventFd) -> None:
        """Stop watching ``eventfd``; not an error when it is not watched."""
        self.unwatch(eventfd.fd)

    def watch(self, fd: int, events: int, callback: Callable[[], None]) -> None:
        """Call ``callback`` as long as ``events`` of epoll(7) hold for a descriptor.

        Raises:
            ValueError: the descriptor is already watched.
        """
        with self._lock:
            if fd in self._sources:
                raise ValueError(f"fd={fd} is already watched")
            self._sources[fd] = (None, callback)
            self._epoll.register(fd, events)

    def unwatch(self, fd: int) -> None:
        """Stop watching a descriptor that is still open; not an error when it is not watched."""
        with self._lock:
            if self._sources.pop(fd, None) is not None:
                self._epoll.unregister(fd)

    def fileno(self) -> int:
        """Return a descriptor that is readable when dispatch() has something to do.

        For a caller that has a loop of its own and no need of start().
        """
        return self._epoll.fileno()

    def start(self) -> None:
        """Start the thread.

        Raises:
            RuntimeError: it was started before.
        """
        if self._thread is not None:
            raise RuntimeError("the event loop was started before")
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Let the thread end and wait for it; the loop cannot be started again."""
        self._is_stopping = True
        self._wake.signal()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def close(self) -> None:
        """Stop, and release the file descriptors that the loop itself owns."""
        self.stop()
        self._epoll.close()
        self._wake.close()

    def dispatch(self, timeout_s: float = 0) -> int:
        """Serve what is signalled now and return how many callbacks ran (the thread's one step)."""
        served = 0
        for fd, _events in self._epoll.poll(timeout_s, MAX_EVENTS):
            with self._lock:
                source = self._sources.get(fd)
            if source is None:
                continue
            self._serve(*source)
            served += 1
        return served

    def _run(self) -> None:
        while not self._is_stopping:
            self.dispatch(timeout_s=-1)

    def _serve(self, eventfd: EventFd | None, callback: Callable[[], None]) -> None:
        # The border "device kick": whatever one device does wrong must not stop the others. Its
        # eventfd may even be closed by now, when another thread removed it a moment ago.
        try:
            if eventfd is not None:
                eventfd.drain()
            callback()
        except Exception:
            if self._limiter.admit() is not None:
                log.exception("device callback failed callback=%r", callback)
