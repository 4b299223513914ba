# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Runs an engine in a thread and gives it back stopped, whatever the test did."""

from __future__ import annotations

import contextlib
import select
import threading
from collections.abc import Callable, Iterator
from typing import Final

from kvm_ffi.engine import Engine
from kvm_ffi.eventfd import EventFd

LONG_S: Final = 30.0  # a test that waits this long has failed


class EngineThread(threading.Thread):
    """`stopped` is what run() returned; None while it runs."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(name="engine")
        self.engine = engine
        self.stopped: bool | None = None

    def run(self) -> None:
        self.stopped = self.engine.run()


@contextlib.contextmanager
def running(engine: Engine) -> Iterator[EngineThread]:
    thread = EngineThread(engine)
    thread.start()
    try:
        yield thread
    finally:
        engine.stop()
        thread.join(LONG_S)
        assert not thread.is_alive()


def wait_signal(event: EventFd) -> int:
    """Wait for an eventfd; its count."""
    ready, _, _ = select.select([event.fd], [], [], LONG_S)
    assert ready, "no signal"
    return event.drain()


def wait_until(event: EventFd, is_done: Callable[[], bool]) -> None:
    """Wait, driven by an eventfd, until a condition holds."""
    while not is_done():
        wait_signal(event)
