# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from devices.event_loop import EventLoop
from kvm_ffi.eventfd import EventFd


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    loop = EventLoop()
    yield loop
    loop.close()


@pytest.fixture
def eventfd() -> Iterator[EventFd]:
    with EventFd() as fd:
        yield fd


def test_signals_before_a_dispatch_make_one_call(loop: EventLoop, eventfd: EventFd) -> None:
    calls: list[int] = []
    loop.add(eventfd, lambda: calls.append(1))
    eventfd.signal()
    eventfd.signal()
    assert (loop.dispatch(), loop.dispatch(), calls) == (1, 0, [1])


def test_removed_source_is_not_called(loop: EventLoop, eventfd: EventFd) -> None:
    calls: list[int] = []
    loop.add(eventfd, lambda: calls.append(1))
    loop.remove(eventfd)
    loop.remove(eventfd)
    eventfd.signal()
    assert (loop.dispatch(), calls) == (0, [])


def test_source_cannot_be_added_twice(loop: EventLoop, eventfd: EventFd) -> None:
    loop.add(eventfd, lambda: None)
    with pytest.raises(ValueError, match="already watched"):
        loop.add(eventfd, lambda: None)


def test_failing_callback_does_not_stop_the_loop(
    loop: EventLoop, eventfd: EventFd, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("boom")

    loop.add(eventfd, fail)
    eventfd.signal()
    assert loop.dispatch() == 1
    assert "device callback failed" in caplog.text


def test_callback_may_remove_itself(loop: EventLoop, eventfd: EventFd) -> None:
    loop.add(eventfd, lambda: loop.remove(eventfd))
    eventfd.signal()
    assert loop.dispatch() == 1
    eventfd.signal()
    assert loop.dispatch() == 0


def test_thread_serves_signals_until_stopped(loop: EventLoop, eventfd: EventFd) -> None:
    served = threading.Event()
    loop.add(eventfd, served.set)
    loop.start()
    eventfd.signal()
    assert served.wait(10)
    loop.stop()
    assert not [t for t in threading.enumerate() if t.name == "devices"]


def test_second_start_is_an_error(loop: EventLoop) -> None:
    loop.start()
    with pytest.raises(RuntimeError, match="started before"):
        loop.start()
