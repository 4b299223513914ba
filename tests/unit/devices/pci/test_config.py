# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from devices.bus import AddressWindow, Bus
from devices.pci.config import Bar, PciFunction, PciIdentity
from devices.pci.host import PciHost

if TYPE_CHECKING:
    from tests.unit.devices.conftest import FakeExitTable, FakeHandler

COMMAND, STATUS, BAR0, BAR2, BAR3 = 0x04, 0x06, 0x10, 0x18, 0x1C
WINDOW_32 = AddressWindow(0xC0000000, 0x20000000)
WINDOW_64 = AddressWindow(1 << 36, 1 << 36)
IDENTITY = PciIdentity(0x1AF4, 0x1042, 0x018000, 1, 0x1AF4, 0x0002)


class Recording(PciFunction):
    """A function with a 32-bit and a 64-bit BAR that records its hooks."""

    def __init__(self, low: FakeHandler, high: FakeHandler) -> None:
        super().__init__(IDENTITY)
        self.log: list[tuple[str, int, int]] = []
        self.add_bar(Bar(0, 0x8000, low))
        self.add_bar(Bar(2, 0x10000, high, is_64bit=True, is_prefetchable=True))

    def bar_mapped(self, bar: Bar, gpa: int) -> None:
        self.log.append(("map", bar.index, gpa))

    def bar_unmapped(self, bar: Bar, gpa: int) -> None:
        self.log.append(("unmap", bar.index, gpa))


class Machine:
    def __init__(self, exit_table: FakeExitTable, make_handler: Callable[..., FakeHandler]) -> None:
        self.exit_table = exit_table
        self.mmio = Bus("mmio")
        self.mmio.add(0xD0000000, 0x1000, make_handler())  # something fixed inside the window
        self.host = PciHost(exit_table, self.mmio, WINDOW_32, WINDOW_64)
        self.low, self.high = make_handler(0x11), make_handler(0x22)
        self.function = Recording(self.low, self.high)
        self.slot = self.host.attach(self.function)

    def write(self, register: int, length: int, value: int) -> None:
        self.host.config_write(self.slot << 12 | register, length, value)

    def read(self, register: int, length: int) -> int:
        """Read what C serves."""
        view = self.exit_table.slots[self.slot]
        return int.from_bytes(view[register : register + length], "little")


@pytest.fixture
def machine(exit_table: FakeExitTable, make_handler: Callable[..., FakeHandler]) -> Machine:
    return Machine(exit_table, make_handler)


def test_host_bridge_is_in_slot_0(machine: Machine) -> None:
    view = machine.exit_table.slots[0]
    assert bytes(view[0:4]) == bytes.fromhex("361b0800")
    assert bytes(view[9:12]) == bytes.fromhex("000006")


def test_identity_is_what_c_serves(machine: Machine) -> None:
    assert machine.read(0x00, 4) == 0x10421AF4
    assert machine.read(0x08, 4) == 0x01800001
    assert machine.read(0x2C, 4) == 0x00021AF4


def test_identity_cannot_be_written(machine: Machine) -> None:
    machine.write(0x00, 4, 0xFFFFFFFF)
    machine.write(0x08, 4, 0xFFFFFFFF)
    assert (machine.read(0x00, 4), machine.read(0x08, 4)) == (0x10421AF4, 0x01800001)


def test_slots_are_given_in_the_order_of_attachment(
    machine: Machine, make_handler: Callable[..., FakeHandler]
) -> None:
    second = machine.host.attach(Recording(make_handler(), make_handler()))
    assert (machine.slot, second) == (1, 2)


def test_taken_slot_is_refused(machine: Machine, make_handler: Callable[..., FakeHandler]) -> None:
    with pytest.raises(ValueError, match="slot 1 is not free"):
        machine.host.attach(Recording(make_handler(), make_handler()), 1)


def test_thirty_first_function_is_the_last(exit_table: FakeExitTable) -> None:
    host = PciHost(exit_table, Bus("mmio"), WINDOW_32)
    slots = [host.attach(PciFunction(IDENTITY)) for _ in range(31)]
    assert slots == list(range(1, 32))
    with pytest.raises(ValueError, match="slot any is not free"):
        host.attach(PciFunction(IDENTITY))


def test_function_that_does_not_fit_leaves_its_slot_free(
    exit_table: FakeExitTable, make_handler: Callable[..., FakeHandler]
) -> None:
    host = PciHost(exit_table, Bus("mmio"), AddressWindow(0xC0000000, 0x10000))
    with pytest.raises(ValueError, match="does not fit its window"):
        host.attach(Recording(make_handler(), make_handler()))
    assert host.attach(PciFunction(IDENTITY)) == 1


def test_bars_are_preset_inside_their_windows_and_apart(
    machine: Machine, make_handler: Callable[..., FakeHandler]
) -> None:
    other = machine.host.attach(Recording(make_handler(), make_handler()))
    view = machine.exit_table.slots[other]
    assert machine.read(BAR0, 4) == 0xC0000000
    assert int.from_bytes(view[BAR0 : BAR0 + 4], "little") == 0xC0008000
    assert machine.read(BAR2, 8) == (1 << 36) | 0xC


def test_sizing_a_32_bit_bar(machine: Machine) -> None:
    machine.write(BAR0, 4, 0xFFFFFFFF)
    assert machine.read(BAR0, 4) == 0xFFFF8000


def test_sizing_a_64_bit_bar(machine: Machine) -> None:
    machine.write(BAR2, 4, 0xFFFFFFFF)
    machine.write(BAR3, 4, 0xFFFFFFFF)
    assert machine.read(BAR2, 8) == 0xFFFFFFFF_FFFF000C


def test_absent_bar_and_rom_read_zero_when_sized(machine: Machine) -> None:
    machine.write(0x14, 4, 0xFFFFFFFF)
    machine.write(0x30, 4, 0xFFFFFFFF)
    assert (machine.read(0x14, 4), machine.read(0x30, 4)) == (0, 0)


def test_bar_decodes_only_with_memory_enabled(machine: Machine) -> None:
    assert machine.mmio.read(0xC0000000, 1) == 0xFF
    machine.write(COMMAND, 2, 0x2)
    assert machine.mmio.read(0xC0000000, 1) == 0x11
    machine.write(COMMAND, 2, 0x0)
    assert machine.mmio.read(0xC0000000, 1) == 0xFF


def test_moving_a_bar_moves_its_range(machine: Machine) -> None:
    machine.write(COMMAND, 2, 0x2)
    machine.write(BAR0, 4, 0xC1000000)
    assert machine.mmio.read(0xC0000000, 1) == 0xFF
    assert machine.mmio.read(0xC1000000, 1) == 0x11
    assert machine.function.log[-2:] == [("unmap", 0, 0xC0000000), ("map", 0, 0xC1000000)]


@pytest.mark.parametrize(
    "gpa", [0x0, 0x100000, 0xB0000000, 0xDFFFF000 + 0x8000, 0xFEE00000, 0xFFFF8000]
)
def test_bar_over_anything_but_a_window_is_refused(machine: Machine, gpa: int) -> None:
    machine.write(COMMAND, 2, 0x2)
    machine.write(BAR0, 4, gpa)
    assert machine.function.mapped_at(0) is None
    assert machine.mmio.read(gpa, 1) == 0xFF


def test_bar_over_another_range_is_refused_and_may_come_back(machine: Machine) -> None:
    machine.write(COMMAND, 2, 0x2)
    machine.write(BAR0, 4, 0xD0000000)
    assert machine.function.mapped_at(0) is None
    machine.write(BAR0, 4, 0xC0000000)
    assert machine.mmio.read(0xC0000000, 1) == 0x11


def test_two_functions_on_one_address_leave_the_first_in_place(
    machine: Machine, make_handler: Callable[..., FakeHandler]
) -> None:
    second = Recording(make_handler(0x33), make_handler())
    slot = machine.host.attach(second)
    machine.write(COMMAND, 2, 0x2)
    machine.host.config_write(slot << 12 | BAR0, 4, 0xC0000000)
    machine.host.config_write(slot << 12 | COMMAND, 2, 0x2)
    assert machine.mmio.read(0xC0000000, 1) == 0x11
    assert second.mapped_at(0) is None


def test_detached_function_is_gone(machine: Machine) -> None:
    machine.write(COMMAND, 2, 0x2)
    assert machine.host.detach(machine.slot) is machine.function
    assert machine.slot not in machine.exit_table.slots
    assert machine.mmio.read(0xC0000000, 1) == 0xFF
    machine.write(COMMAND, 2, 0x2)
    assert machine.function.mapped_at(0) is None


def test_what_was_mapped_of_a_pulled_function_reads_as_zeros(machine: Machine) -> None:
    machine.write(COMMAND, 2, 2)
    gpa = machine.function.mapped_at(0)
    assert gpa is not None
    assert machine.mmio.read(gpa, 4) == 0x11
    assert machine.host.pull(machine.slot) is machine.function
    machine.mmio.write(gpa, 4, 0xFFFFFFFF)
    assert (machine.mmio.read(gpa, 4), machine.mmio.read(gpa + 0x7FFF, 1)) == (0, 0)
    assert machine.function.mapped == {}


def test_what_is_left_of_a_pulled_function_makes_room_for_another(machine: Machine) -> None:
    machine.write(COMMAND, 2, 2)
    gpa = machine.function.mapped_at(0)
    machine.host.pull(machine.slot)
    for _ in range(3):
        other = Recording(machine.low, machine.high)
        assert machine.host.attach(other) == machine.slot
        machine.write(COMMAND, 2, 2)
        assert other.mapped_at(0) == gpa
        assert machine.mmio.read(gpa or 0, 4) == 0x11
        machine.host.pull(machine.slot)
        assert machine.mmio.read(gpa or 0, 4) == 0


def test_what_was_not_mapped_of_a_pulled_function_leaves_nothing(machine: Machine) -> None:
    machine.host.pull(machine.slot)
    assert machine.mmio.read(WINDOW_32.base, 4) == 0xFFFFFFFF
    with pytest.raises(ValueError, match="holds nothing"):
        machine.host.pull(machine.slot)


def test_host_bridge_cannot_be_detached(machine: Machine) -> None:
    with pytest.raises(ValueError, match="slot 0"):
        machine.host.detach(0)


def test_capabilities_form_a_list(make_handler: Callable[..., FakeHandler]) -> None:
    function = PciFunction(IDENTITY)
    first = function.add_capability(0x09, b"abc", b"\x0f")
    second = function.add_capability(0x11, b"wxyz")
    config = bytearray(4096)
    function.bind(memoryview(config), PciFunction(IDENTITY)._mapper)
    assert config[0x34] == first == 0x40
    assert config[first : first + 5] == bytes((0x09, second)) + b"abc"
    assert config[second : second + 6] == b"\x11\x00wxyz"
    assert config[STATUS] & 0x10
    function.config_write(first + 2, 2, 0xFFFF)
    assert config[first + 2 : first + 5] == b"obc"  # 'a' | 0x0f


def test_full_configuration_space_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        PciFunction(IDENTITY).add_capability(0x09, bytes(200))


@pytest.mark.parametrize(
    "bar",
    [
        Bar(0, 0x1000, PciHost),  # type: ignore[arg-type]
        Bar(3, 0x1000, PciHost),  # type: ignore[arg-type]
        Bar(6, 0x1000, PciHost),  # type: ignore[arg-type]
        Bar(5, 0x1000, PciHost, is_64bit=True),  # type: ignore[arg-type]
        Bar(1, 0x3000, PciHost),  # type: ignore[arg-type]
        Bar(1, 0x800, PciHost),  # type: ignore[arg-type]
    ],
    ids=["taken", "upper half", "index", "no upper half", "no power of two", "below a page"],
)
def test_bad_bar_is_refused(machine: Machine, bar: Bar) -> None:
    with pytest.raises(ValueError, match="BAR"):
        machine.function.add_bar(bar)


config_writes = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 0xFFFF), st.sampled_from([0x1004, 0x1010, 0x1018, 0x101C])),
        st.sampled_from([1, 2, 4]),
        st.one_of(
            st.integers(0, 2**32 - 1),
            st.sampled_from([2, 0, 0x10, 0xC0000000, 0xD0000000, 0xFFFFFFFF]),
        ),
    ),
    max_size=80,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config_writes)
def test_garbage_config_writes_keep_the_bus_and_the_hooks_in_step(
    make_handler: Callable[..., FakeHandler], writes: list[tuple[int, int, int]]
) -> None:
    class Table:
        def __init__(self) -> None:
            self.slots: dict[int, memoryview] = {}

        def pci_slot(self, slot: int) -> memoryview:
            self.slots[slot] = memoryview(bytearray(4096))
            return self.slots[slot]

        def pci_remove(self, slot: int) -> None:
            del self.slots[slot]

    machine = Machine(Table(), make_handler)  # type: ignore[arg-type]
    for address, length, value in writes:
        machine.host.config_write(address, length, value)
    mapped: dict[int, int] = {}
    for what, index, gpa in machine.function.log:
        if what == "map":
            assert index not in mapped
            mapped[index] = gpa
        else:
            assert mapped.pop(index) == gpa
    assert [mapped.get(i) for i in (0, 2)] == [machine.function.mapped_at(i) for i in (0, 2)]
    machine.write(COMMAND, 2, 0)
    machine.write(BAR0, 4, 0xC0100000)
    machine.write(COMMAND, 2, 2)
    assert machine.mmio.read(0xC0100000, 1) == 0x11
    assert machine.read(0, 4) == 0x10421AF4
