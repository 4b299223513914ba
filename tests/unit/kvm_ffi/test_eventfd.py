# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from __future__ import annotations

import os

import pytest

from kvm_ffi.eventfd import EventFd


def test_signals_add_up_until_drained() -> None:
    with EventFd() as eventfd:
        eventfd.signal()
        eventfd.signal()
        assert eventfd.drain() == 2
        assert eventfd.drain() == 0


def test_it_is_not_inherited_by_programs_and_does_not_block() -> None:
    with EventFd() as eventfd:
        assert not os.get_inheritable(eventfd.fd)
        assert not os.get_blocking(eventfd.fd)


def test_it_takes_over_an_open_descriptor() -> None:
    fd = os.eventfd(3, os.EFD_NONBLOCK)
    with EventFd(fd) as eventfd:
        assert eventfd.drain() == 3
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_closing_twice_does_nothing() -> None:
    eventfd = EventFd()
    eventfd.close()
    eventfd.close()
    assert eventfd.fd == -1
