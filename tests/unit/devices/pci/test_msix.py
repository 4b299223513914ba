# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from devices.errors import BadRegisterAccess
from devices.pci.msix import MsixTable
from kvm_ffi.errors import KvmError

if TYPE_CHECKING:
    from tests.unit.devices.conftest import FakeRouter, FakeVm

ENABLE, FUNCTION_MASK = 0x8000, 0x4000
ADDRESS, DATA = 0xFEE00000, 0x41
N_VECTORS = 3


@pytest.fixture
def table(vm: FakeVm, router: FakeRouter) -> Iterator[MsixTable]:
    table = MsixTable(N_VECTORS, vm, router)
    yield table
    table.close()


def program(table: MsixTable, vector: int, *, data: int = DATA, masked: bool = False) -> None:
    """Write an entry as Linux does: address, data, then the control word."""
    table.write_table(16 * vector, 4, ADDRESS)
    table.write_table(16 * vector + 4, 4, 0)
    table.write_table(16 * vector + 8, 4, data)
    table.write_table(16 * vector + 12, 4, int(masked))


def signal(table: MsixTable, vector: int) -> None:
    eventfd = table.eventfd(vector)
    assert eventfd is not None
    eventfd.signal()


def test_entries_start_masked(table: MsixTable) -> None:
    assert [table.read_table(16 * v + 12, 4) for v in range(N_VECTORS)] == [1, 1, 1]


def test_unmasked_vector_of_enabled_table_is_routed_and_bound(
    table: MsixTable, vm: FakeVm, router: FakeRouter
) -> None:
    table.set_control(ENABLE)
    program(table, 1)
    assert vm.irqfds == {(24, table.eventfd(1))}
    assert router.routes == {24: (ADDRESS, DATA)}


def test_nothing_is_bound_while_msix_is_disabled(table: MsixTable, vm: FakeVm) -> None:
    program(table, 1)
    assert vm.irqfds == set()


def test_enabling_binds_all_unmasked_vectors_with_one_commit(
    table: MsixTable, vm: FakeVm, router: FakeRouter
) -> None:
    program(table, 0)
    program(table, 1)
    program(table, 2, masked=True)
    table.set_control(ENABLE)
    assert (len(vm.irqfds), router.commits) == (2, 1)


def test_masking_unbinds_and_a_signal_becomes_pending(table: MsixTable, vm: FakeVm) -> None:
    table.set_control(ENABLE)
    program(table, 1)
    table.write_table(16 + 12, 4, 1)
    assert vm.irqfds == set()
    assert table.read_pending(0, 8) == 0
    signal(table, 1)
    assert table.read_pending(0, 8) == 0b010
    assert table.read_pending(0, 8) == 0b010  # reading does not take it


def test_unmasking_injects_what_is_pending_once_and_clears_the_bit(
    table: MsixTable, vm: FakeVm
) -> None:
    table.set_control(ENABLE)
    program(table, 1, masked=True)
    signal(table, 1)
    signal(table, 1)
    table.write_table(16 + 12, 4, 0)
    assert len(vm.irqfds) == 1
    eventfd = table.eventfd(1)
    assert eventfd is not None
    assert eventfd.drain() == 1  # one new signal, which the kernel takes through the irqfd
    table.write_table(16 + 12, 4, 1)
    assert table.read_pending(0, 8) == 0


def test_function_mask_masks_every_vector(table: MsixTable, vm: FakeVm) -> None:
    table.set_control(ENABLE)
    program(table, 0)
    program(table, 1)
    table.set_control(ENABLE | FUNCTION_MASK)
    assert vm.irqfds == set()
    table.set_control(ENABLE)
    assert len(vm.irqfds) == 2


def test_unchanged_message_is_not_routed_again(table: MsixTable, router: FakeRouter) -> None:
    table.set_control(ENABLE)
    program(table, 0)
    table.write_table(12, 4, 1)
    table.write_table(12, 4, 0)
    assert router.commits == 1


def test_new_message_is_routed(table: MsixTable, router: FakeRouter) -> None:
    table.set_control(ENABLE)
    program(table, 0)
    table.write_table(12, 4, 1)
    program(table, 0, data=0x99)
    assert router.routes == {24: (ADDRESS, 0x99)}


def test_message_that_the_kernel_refuses_leaves_the_routes_of_others(
    table: MsixTable, vm: FakeVm, router: FakeRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    table.set_control(ENABLE)
    program(table, 0)

    def refuse() -> None:
        raise KvmError("KVM_SET_GSI_ROUTING", errno.EINVAL)

    monkeypatch.setattr(router, "commit", refuse)
    program(table, 1)
    monkeypatch.undo()
    assert vm.irqfds == {(24, table.eventfd(0))}
    assert router.staged == {24: (ADDRESS, DATA)}
    table.write_table(16 + 12, 4, 0)
    assert len(vm.irqfds) == 2


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 1), (0, 2), (2, 4), (4, 8), (48, 4), (44, 8), (4096, 4)]
)
def test_odd_table_write_is_a_guest_error(table: MsixTable, offset: int, length: int) -> None:
    with pytest.raises(BadRegisterAccess):
        table.write_table(offset, length, 0)


def test_reserved_control_bits_stay_zero(table: MsixTable) -> None:
    table.write_table(12, 4, 0xFFFFFFFF)
    assert table.read_table(12, 4) == 1


def test_close_gives_everything_back(vm: FakeVm, router: FakeRouter) -> None:
    table = MsixTable(N_VECTORS, vm, router)
    table.set_control(ENABLE)
    program(table, 0)
    table.close()
    assert (vm.irqfds, router.allocated, table.eventfd(0)) == (set(), set(), None)


operations = st.lists(
    st.one_of(
        st.tuples(
            st.just("table"), st.integers(0, 80), st.sampled_from([1, 2, 4, 8]), st.integers(0)
        ),
        st.tuples(st.just("control"), st.integers(0, 0xFFFF), st.just(0), st.just(0)),
        st.tuples(st.just("signal"), st.integers(0, N_VECTORS - 1), st.just(0), st.just(0)),
        st.tuples(st.just("pending"), st.integers(0, 64), st.sampled_from([1, 4, 8]), st.just(0)),
    ),
    max_size=60,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations)
def test_irqfds_are_balanced_whatever_the_guest_writes(
    vm: FakeVm, router: FakeRouter, log: list[tuple[str, int, int, int]]
) -> None:
    table = MsixTable(N_VECTORS, vm, router)
    control = 0
    for what, a, length, value in log:
        if what == "table":
            try:
                table.write_table(a, length, value & ((1 << 8 * length) - 1))
            except BadRegisterAccess:
                continue
        elif what == "control":
            control = a
            table.set_control(a)
        elif what == "signal":
            signal(table, a)
        else:
            assert 0 <= table.read_pending(a, length) < 1 << (8 * length)
        unmasked = [v for v in range(N_VECTORS) if not table.read_table(16 * v + 12, 4)]
        is_open = bool(control & ENABLE) and not control & FUNCTION_MASK
        assert len(vm.irqfds) == (len(unmasked) if is_open else 0)
        assert vm.assigned_count - vm.deassigned_count == len(vm.irqfds)
    table.close()
    assert (vm.irqfds, router.allocated) == (set(), set())
