# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvm_ffi.system import Kvm
from kvm_ffi.vcpu import install_kick_signal
from tests.support.tiny_guest import TinyGuest


@pytest.fixture(scope="session", autouse=True)
def kick_signal() -> None:
    install_kick_signal()


@pytest.fixture
def guest(kvm: Kvm) -> Iterator[TinyGuest]:
    with TinyGuest(kvm) as tiny:
        yield tiny


@pytest.fixture
def irq_guest(kvm: Kvm) -> Iterator[TinyGuest]:
    """One with interrupt controllers: its HLT waits inside KVM, so its code ends at a port."""
    with TinyGuest(kvm, has_irqchip=True) as tiny:
        yield tiny
