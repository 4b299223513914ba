# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import cast

import pytest

from kvm_ffi.errors import HostError, KvmError
from kvm_ffi.irq_routing import IOAPIC_PINS, GsiRoute, IrqRouter, MsiRoute, default_routes
from kvm_ffi.vm import Vm

LAPIC = 0xFEE0_0000
FIXED = default_routes()


class FakeVm:
    """Remembers every table that it was given; refuses the next one if ``fails``."""

    def __init__(self, max_routes: int = 4096) -> None:
        self.capabilities = SimpleNamespace(max_gsi_routes=max_routes)
        self.tables: list[list[GsiRoute]] = []
        self.fails = False

    def set_gsi_routing(self, routes: list[GsiRoute]) -> None:
        if self.fails:
            raise KvmError("KVM_SET_GSI_ROUTING", errno.EINVAL)
        self.tables.append(routes)

    def router(self) -> IrqRouter:
        return IrqRouter(cast("Vm", self))


def test_the_pins_are_routed_as_kvm_does_by_itself() -> None:
    assert len(FIXED) == IOAPIC_PINS + 16
    assert {route.gsi for route in FIXED} == set(range(IOAPIC_PINS))


def test_messages_come_after_the_pins() -> None:
    router = FakeVm().router()
    assert [router.allocate_msi() for _ in range(3)] == [24, 25, 26]


def test_a_freed_gsi_is_used_again() -> None:
    router = FakeVm().router()
    first = router.allocate_msi()
    router.allocate_msi()
    router.free(first)
    assert router.allocate_msi() == first


def test_kvm_gets_the_whole_table_once_per_commit() -> None:
    vm = FakeVm()
    router = vm.router()
    gsi = router.allocate_msi()
    router.set_msi(gsi, LAPIC, 0x41)
    router.commit()
    router.commit()
    assert vm.tables == [[*FIXED, MsiRoute(gsi, LAPIC, 0x41)]]


def test_an_allocation_alone_changes_nothing() -> None:
    vm = FakeVm()
    router = vm.router()
    router.allocate_msi()
    router.commit()
    assert vm.tables == []


def test_setting_the_same_message_again_changes_nothing() -> None:
    vm = FakeVm()
    router = vm.router()
    gsi = router.allocate_msi()
    for _ in range(2):
        router.set_msi(gsi, LAPIC, 0x41)
        router.commit()
    assert len(vm.tables) == 1


@pytest.mark.parametrize("take_away", [IrqRouter.clear_msi, IrqRouter.free])
def test_a_message_that_is_taken_away_leaves_the_table(take_away: object) -> None:
    vm = FakeVm()
    router = vm.router()
    gsi = router.allocate_msi()
    router.set_msi(gsi, LAPIC, 0x41)
    router.commit()
    assert callable(take_away)
    take_away(router, gsi)
    router.commit()
    assert vm.tables[-1] == FIXED


def test_a_refused_table_is_tried_again() -> None:
    vm = FakeVm()
    router = vm.router()
    router.set_msi(router.allocate_msi(), LAPIC, 0x41)
    vm.fails = True
    with pytest.raises(KvmError, match="KVM_SET_GSI_ROUTING"):
        router.commit()
    vm.fails = False
    router.commit()
    assert len(vm.tables) == 1


def test_a_full_table_is_a_host_error() -> None:
    router = FakeVm(max_routes=len(FIXED) + 2).router()
    router.allocate_msi()
    router.allocate_msi()
    with pytest.raises(HostError, match="all 2 message interrupts"):
        router.allocate_msi()


def test_a_gsi_that_is_not_allocated_is_refused() -> None:
    router = FakeVm().router()
    with pytest.raises(KeyError):
        router.set_msi(24, LAPIC, 0)
    with pytest.raises(KeyError):
        router.free(4)
