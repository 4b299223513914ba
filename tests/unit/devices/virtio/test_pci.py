# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from devices.virtio.rng import VirtioRng

if TYPE_CHECKING:
    from collections.abc import Callable

    from devices.virtio.device import VirtioDevice
    from tests.unit.devices.conftest import FakeVm
    from tests.unit.devices.virtio.conftest import Machine

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET = 1, 2, 4, 8, 64
VERSION_1, EVENT_IDX, RING_RESET, NOTIFICATION_DATA = 1 << 32, 1 << 29, 1 << 40, 1 << 38
DATA_GPA, BAR0 = 0x40000, 0xC0000000
NOTIFY = BAR0 + 0x3000


@pytest.fixture
def machine(make_machine: Callable[[VirtioDevice], Machine]) -> Machine:
    machine = make_machine(VirtioRng())
    machine.enable_memory()
    return machine


def test_identity_is_a_modern_device(machine: Machine) -> None:
    assert machine.config_read(0x00, 4) == 0x1044_1AF4
    assert machine.config_read(0x08, 1) == 1
    assert machine.config_read(0x2C, 2) == 0x1AF4
    assert machine.config_read(0x2E, 2) >= 0x40


def test_capabilities_tell_every_structure(machine: Machine) -> None:
    structures = machine.structures()
    assert {1, 2, 3, 5} == set(structures)  # an rng has no device config
    assert structures[1][1:] == (0x0000, 56)
    assert structures[2][1:] == (0x3000, 4)
    at, _, _ = structures[2]
    assert machine.config_read(at + 16, 4) == 4  # notify_off_multiplier
    assert machine.config_read(at + 2, 1) == 20


def test_msix_capability_has_a_vector_per_queue_and_one_for_config(machine: Machine) -> None:
    at = next(at for cap_id, at in machine.capabilities() if cap_id == 0x11)
    assert machine.config_read(at + 2, 2) == 1
    assert (machine.config_read(at + 4, 4), machine.config_read(at + 8, 4)) == (0x4000, 0x5000)


def test_queue_reset_and_notification_data_are_not_offered(machine: Machine) -> None:
    assert machine.offered() & VERSION_1
    assert not machine.offered() & (RING_RESET | NOTIFICATION_DATA)


def test_feature_select_beyond_one_reads_zero(machine: Machine) -> None:
    machine.write(0x00, 4, 2)
    assert machine.read(0x04, 4) == 0
    machine.write(0x00, 4, 0xFFFFFFFF)
    assert machine.read(0x04, 4) == 0


@pytest.mark.parametrize("features", [VERSION_1 | 1, VERSION_1 | 1 << 63, 0, EVENT_IDX], ids=hex)
def test_features_not_offered_or_without_version_1_are_refused(
    machine: Machine, features: int
) -> None:
    machine.set_status(ACKNOWLEDGE | DRIVER)
    machine.accept(features)
    machine.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK)
    assert machine.status == ACKNOWLEDGE | DRIVER


def test_feature_bits_beyond_64_are_refused(machine: Machine) -> None:
    machine.accept(VERSION_1)
    machine.write(0x08, 4, 7)
    machine.write(0x0C, 4, 1)
    machine.set_status(FEATURES_OK)
    assert machine.status == 0


def test_driver_ok_before_features_ok_is_refused(machine: Machine) -> None:
    machine.set_status(ACKNOWLEDGE | DRIVER | DRIVER_OK)
    assert machine.status == ACKNOWLEDGE | DRIVER


def test_status_bits_cannot_be_taken_back(machine: Machine) -> None:
    machine.set_status(ACKNOWLEDGE | DRIVER)
    machine.set_status(ACKNOWLEDGE)
    assert machine.status == ACKNOWLEDGE | DRIVER


def test_driver_cannot_set_needs_reset(machine: Machine) -> None:
    machine.set_status(NEEDS_RESET | ACKNOWLEDGE)
    assert machine.status == ACKNOWLEDGE


def test_features_are_fixed_after_features_ok(machine: Machine) -> None:
    machine.accept(VERSION_1)
    machine.set_status(FEATURES_OK)
    machine.accept(VERSION_1 | EVENT_IDX)
    machine.write(0x08, 4, 0)
    assert machine.read(0x0C, 4) == 0


def test_vector_out_of_range_reads_back_as_none(machine: Machine) -> None:
    machine.write(0x10, 2, 2)
    machine.write(0x1A, 2, 0x7FF)
    assert (machine.read(0x10, 2), machine.read(0x1A, 2)) == (0xFFFF, 0xFFFF)


def test_vector_in_range_reads_back(machine: Machine) -> None:
    machine.write(0x10, 2, 1)
    machine.write(0x1A, 2, 0)
    assert (machine.read(0x10, 2), machine.read(0x1A, 2)) == (1, 0)


@pytest.mark.parametrize("size", [0, 3, 512, 0xFFFF])
def test_bad_queue_size_is_ignored(machine: Machine, size: int) -> None:
    machine.write(0x18, 2, size)
    assert machine.read(0x18, 2) == 256


def test_queue_that_does_not_exist_has_size_zero(machine: Machine) -> None:
    machine.write(0x16, 2, 1)
    machine.write(0x18, 2, 8)
    machine.write(0x1C, 2, 1)
    assert (machine.read(0x18, 2), machine.read(0x1C, 2)) == (0, 0)


def test_ring_address_is_written_in_two_halves(machine: Machine) -> None:
    machine.write(0x20, 4, 0x89ABCDEF)
    machine.write(0x24, 4, 0x01234567)
    assert machine.read(0x20, 8) == 0x0123456789ABCDEF


def test_enabled_queue_is_immutable(machine: Machine) -> None:
    machine.setup_queue(0)
    machine.write(0x18, 2, 4)
    machine.write(0x20, 4, 0)
    assert (machine.read(0x18, 2), machine.read(0x20, 4)) == (8, 0x10000)


def test_queue_cannot_be_disabled(machine: Machine) -> None:
    machine.setup_queue(0)
    machine.write(0x1C, 2, 0)
    assert machine.read(0x1C, 2) == 1


def test_kick_is_served_and_interrupts(machine: Machine) -> None:
    machine.start()
    machine.post(0, [(DATA_GPA, 32, True)])
    machine.kick(0)
    machine.loop.dispatch()
    assert machine.used(0) == [(0, 32)]
    assert machine.interrupts(1) == 1
    assert machine.memory.read(DATA_GPA, 32) != bytes(32)


def test_kick_before_driver_ok_is_ignored(machine: Machine) -> None:
    machine.setup_queue(0)
    machine.kick(0)
    assert machine.loop.dispatch() == 0


def test_kick_of_a_queue_that_does_not_exist_is_ignored(machine: Machine) -> None:
    machine.start()
    machine.write(0x3FFC, 4, 0)
    assert machine.loop.dispatch() == 0


def test_queue_without_vector_is_served_without_interrupt(machine: Machine) -> None:
    machine.start(queues=())
    machine.start(queues=())
    machine.set_status(0)
    machine.accept(VERSION_1)
    machine.set_status(FEATURES_OK)
    machine.setup_queue(0)
    machine.set_status(DRIVER_OK)
    machine.post(0, [(DATA_GPA, 8, True)])
    machine.kick(0)
    machine.loop.dispatch()
    assert machine.used(0) == [(0, 8)]
    assert machine.interrupts(1) == 0


def test_running_device_has_an_ioeventfd_per_queue(machine: Machine, vm: FakeVm) -> None:
    assert vm.ioeventfds == {}
    machine.start()
    assert set(vm.ioeventfds) == {(NOTIFY, 0)}
    machine.set_status(0)
    assert vm.ioeventfds == {}


def test_moving_the_bar_moves_the_ioeventfd(machine: Machine, vm: FakeVm) -> None:
    machine.start()
    machine.config_write(0x10, 4, BAR0 + 0x100000)
    assert set(vm.ioeventfds) == {(NOTIFY + 0x100000, 0)}
    machine.config_write(0x04, 2, 0)
    assert vm.ioeventfds == {}


def test_bar_moved_out_of_the_window_leaves_no_ioeventfd(machine: Machine, vm: FakeVm) -> None:
    machine.start()
    machine.config_write(0x10, 4, 0x1000)
    assert vm.ioeventfds == {}
    machine.config_write(0x10, 4, BAR0)
    assert set(vm.ioeventfds) == {(NOTIFY, 0)}


def test_refused_ioeventfd_leaves_a_working_device(machine: Machine, vm: FakeVm) -> None:
    vm.refuse_ioeventfds = True
    machine.start()
    machine.post(0, [(DATA_GPA, 8, True)])
    machine.kick(0)
    machine.loop.dispatch()
    assert machine.used(0) == [(0, 8)]


def test_reset_clears_registers_and_the_device_starts_again(machine: Machine) -> None:
    machine.start()
    machine.set_status(0)
    assert machine.status == 0
    assert (machine.read(0x10, 2), machine.read(0x1A, 2)) == (0xFFFF, 0xFFFF)
    assert (machine.read(0x18, 2), machine.read(0x1C, 2)) == (256, 0)
    machine.start()
    machine.post(0, [(DATA_GPA, 8, True)])
    machine.kick(0)
    machine.loop.dispatch()
    assert machine.used(0) == [(0, 8)]


def test_bad_ring_address_needs_reset(machine: Machine) -> None:
    machine.start(queues=())
    machine.set_status(0)
    machine.accept(VERSION_1)
    machine.set_status(FEATURES_OK)
    machine.write(0x10, 2, 0)
    machine.write(0x20, 8, 0xFFFF_FFFF_FFFF_F000)
    machine.write(0x1C, 2, 1)
    machine.interrupts(0)
    machine.set_status(DRIVER_OK)
    assert machine.status == FEATURES_OK | DRIVER_OK | NEEDS_RESET
    assert machine.interrupts(0) == 1


def test_broken_chain_needs_reset_and_a_reset_heals(machine: Machine) -> None:
    machine.start()
    machine.post(0, [(DATA_GPA, 8, False)])  # an rng can only write
    machine.kick(0)
    machine.loop.dispatch()
    machine.loop.dispatch()
    assert machine.status & NEEDS_RESET
    assert machine.interrupts(0) == 1
    machine.start()
    assert not machine.status & NEEDS_RESET
    machine.post(0, [(DATA_GPA, 8, True)])
    machine.kick(0)
    machine.loop.dispatch()
    assert machine.used(0) == [(0, 8)]


def test_fault_of_before_a_reset_does_not_hit_the_next_driver(machine: Machine) -> None:
    machine.start()
    machine.post(0, [(DATA_GPA, 8, False)])
    machine.device.on_kick(0)  # type: ignore[attr-defined]
    machine.start()
    machine.loop.dispatch()
    assert not machine.status & NEEDS_RESET


def test_reset_in_the_middle_of_a_fault_wins(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reason_then_reset() -> str:
        monkeypatch.undo()
        machine.start()
        return "the driver before broke it"

    machine.start()
    monkeypatch.setattr(machine.device, "fault_reason", reason_then_reset)
    machine.post(0, [(DATA_GPA, 8, False)])
    machine.kick(0)
    machine.loop.dispatch()
    machine.loop.dispatch()
    assert not machine.status & NEEDS_RESET


def test_driver_ok_at_needs_reset_is_refused(machine: Machine, vm: FakeVm) -> None:
    machine.enable_memory()
    machine.accept(VERSION_1)
    machine.set_status(FEATURES_OK)
    machine.write(0x20, 8, 1)
    machine.write(0x1C, 2, 1)
    machine.set_status(DRIVER_OK)
    machine.set_status(DRIVER_OK)
    assert machine.status & NEEDS_RESET
    assert vm.ioeventfds == {}


def test_config_change_raises_generation_and_interrupt(machine: Machine) -> None:
    machine.start()
    machine.transport.config_changed()
    assert (machine.read(0x15, 1), machine.interrupts(0)) == (1, 1)


def test_config_change_before_driver_ok_is_silent(machine: Machine) -> None:
    machine.enable_msix()
    machine.write(0x10, 2, 0)
    machine.transport.config_changed()
    assert (machine.read(0x15, 1), machine.interrupts(0)) == (1, 0)


def test_isr_tells_a_config_change_without_msix_and_is_cleared_by_reading(
    machine: Machine,
) -> None:
    machine.start()
    at = next(at for cap_id, at in machine.capabilities() if cap_id == 0x11)
    machine.config_write(at + 2, 2, 0)
    machine.transport.config_changed()
    assert (machine.read(0x1000, 1), machine.read(0x1000, 1)) == (2, 0)


def test_access_that_spans_two_structures_reads_all_ones(machine: Machine) -> None:
    assert machine.read(0x0FFE, 4) == 0xFFFFFFFF


def test_common_config_reads_in_any_width(machine: Machine) -> None:
    assert machine.read(0x18, 1) == 0
    assert machine.read(0x19, 1) == 1
    assert machine.read(0x10, 8) == 1 << 16 | 0xFFFF
    assert machine.read(0x38, 8) == 0


def test_quiesced_device_serves_nothing_until_resumed(machine: Machine) -> None:
    machine.start()
    machine.transport.quiesce()
    machine.post(0, [(DATA_GPA, 8, True)])
    machine.kick(0)
    machine.loop.dispatch()
    assert machine.used(0) == []
    machine.transport.resume()
    machine.loop.dispatch()
    assert machine.used(0) == [(0, 8)]


def test_closed_transport_answers_all_ones_and_ignores_writes(machine: Machine) -> None:
    machine.start()
    machine.transport.close()
    machine.start()
    machine.kick(0)
    assert machine.read(0x14, 1) == 0xFF


class TestPciConfigWindow:
    def point(self, machine: Machine, offset: int, length: int, bar: int = 0) -> int:
        at = machine.structures()[5][0]
        machine.config_write(at + 4, 1, bar)
        machine.config_write(at + 8, 4, offset)
        machine.config_write(at + 12, 4, length)
        return at + 16

    def test_read_goes_to_the_bar(self, machine: Machine) -> None:
        data = self.point(machine, 0x18, 2)
        assert machine.config_read(data, 2) == 256

    def test_write_goes_to_the_bar(self, machine: Machine) -> None:
        data = self.point(machine, 0x14, 1)
        machine.config_write(data, 1, ACKNOWLEDGE)
        assert machine.status == ACKNOWLEDGE

    @pytest.mark.parametrize(
        ("offset", "length", "bar"),
        [(0x15, 2, 0), (0, 8, 0), (0, 3, 0), (0x7FFE, 4, 0), (0, 4, 1), (0xFFFFFFFC, 4, 0)],
    )
    def test_window_that_points_nowhere_reads_all_ones(
        self, machine: Machine, offset: int, length: int, bar: int
    ) -> None:
        data = self.point(machine, offset, length, bar)
        machine.config_write(data, 4, 0)
        assert machine.config_read(data, 4) == 0xFFFFFFFF
