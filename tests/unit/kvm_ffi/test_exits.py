# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from kvm_ffi._kvm import ffi, lib
from kvm_ffi.exits import MAX_MMIO_RANGES, PCI_SLOT_SIZE, PCI_SLOTS, ExitKind, ExitTable

TOP = 1 << 64


def lookup(table: ExitTable, gpa: int) -> int:
    """What becomes of a one-byte read."""
    data, where = ffi.new("uint8_t[8]"), ffi.new("uint64_t *")
    return lib.exit_table_mmio(table.raw, gpa, 1, False, data, where)


def read_port(table: ExitTable, port: int, size: int) -> tuple[int, bytes]:
    data, where = ffi.new("uint8_t[8]"), ffi.new("uint64_t *")
    result = lib.exit_table_pio(table.raw, port, size, False, data, where)
    return result, bytes(data)[:size]


def test_the_first_and_last_byte_of_a_range_are_in_it() -> None:
    table = ExitTable()
    table.claim_mmio(0x1000, 0x100)
    expected = [lib.ACCESS_UNCLAIMED, lib.ACCESS_PYTHON, lib.ACCESS_PYTHON, lib.ACCESS_UNCLAIMED]
    assert [lookup(table, gpa) for gpa in (0xFFF, 0x1000, 0x10FF, 0x1100)] == expected


def test_a_range_may_end_with_the_address_space() -> None:
    table = ExitTable()
    table.claim_mmio(TOP - 16, 16)
    assert lookup(table, TOP - 1) == lib.ACCESS_PYTHON


@pytest.mark.parametrize(("gpa", "length", "reason"), [
    (0x1000, 0, "empty"),
    (TOP - 8, 16, "past the end"),
    (0x2FFF, 2, "meets"),
    (0x2000, 0x1000, "meets"),
    (0x0, 0x10000, "meets"),
])  # fmt: skip
def test_a_bad_range_is_refused_with_its_reason(gpa: int, length: int, reason: str) -> None:
    table = ExitTable()
    table.claim_mmio(0x2000, 0x1000)
    table.claim_mmio(0x3000, 0x1000)
    with pytest.raises(ValueError, match=reason):
        table.claim_mmio(gpa, length)


def test_there_is_room_for_a_bounded_number_of_ranges() -> None:
    table = ExitTable()
    for i in range(MAX_MMIO_RANGES):
        table.claim_mmio(i * 0x1000, 0x1000)
    with pytest.raises(ValueError, match="256 ranges"):
        table.claim_mmio(TOP - 0x1000, 0x1000)


@pytest.mark.parametrize(("gpa", "length"), [(0x1000, 0x200), (0x1010, 0x10), (0x5000, 0x100)])
def test_only_a_claimed_range_can_be_unclaimed(gpa: int, length: int) -> None:
    table = ExitTable()
    table.claim_mmio(0x1000, 0x100)
    with pytest.raises(ValueError, match="not a claimed range"):
        table.unclaim_mmio(gpa, length)


class MmioMachine(RuleBasedStateMachine):
    """Claims and lookups against a plain list of ranges."""

    addresses = st.integers(0, 80)
    lengths = st.integers(1, 12)

    def __init__(self) -> None:
        super().__init__()
        self.table = ExitTable()
        self.claimed: list[range] = []

    @rule(gpa=addresses, length=lengths)
    def claim(self, gpa: int, length: int) -> None:
        wanted = range(gpa, gpa + length)
        if any(set(wanted) & set(have) for have in self.claimed):
            with pytest.raises(ValueError, match="meets"):
                self.table.claim_mmio(gpa, length)
        else:
            self.table.claim_mmio(gpa, length)
            self.claimed.append(wanted)

    @rule(data=st.data())
    def unclaim(self, data: st.DataObject) -> None:
        if self.claimed:
            gone = data.draw(st.sampled_from(self.claimed))
            self.table.unclaim_mmio(gone.start, len(gone))
            self.claimed.remove(gone)

    @rule()
    def look_everywhere(self) -> None:
        for gpa in range(95):
            is_claimed = any(gpa in have for have in self.claimed)
            assert lookup(self.table, gpa) == (lib.ACCESS_PYTHON if is_claimed else 0)


TestMmioMatchesAListOfRanges = pytest.mark.slow(MmioMachine.TestCase)


@given(claims=st.lists(st.tuples(st.integers(0, 0xFFFF), st.integers(1, 64)), max_size=8))
def test_exactly_the_claimed_ports_go_to_python(claims: list[tuple[int, int]]) -> None:
    table = ExitTable()
    claims = [(port, min(length, 0x10000 - port)) for port, length in claims]
    for port, length in claims:
        table.claim_pio(port, length)
    claimed = {p for port, length in claims for p in range(port, port + length)}
    edges = {port for port, _ in claims} | {port + length for port, length in claims}
    nearby = {p + side for p in edges for side in (-1, 0)} & set(range(0x10000))
    for port in nearby - set(range(0xCF8, 0xD00)):
        assert (read_port(table, port, 1)[0] == lib.ACCESS_PYTHON) == (port in claimed)


@pytest.mark.parametrize(("port", "length"), [(0xFFFF, 2), (-1, 1), (0x10000, 1), (5, 0)])
def test_ports_outside_the_port_space_are_refused(port: int, length: int) -> None:
    with pytest.raises(ValueError, match="must be within"):
        ExitTable().claim_pio(port, length)


@given(
    gpa=st.integers(0, TOP - 1),
    size=st.integers(1, 8),
    is_write=st.booleans(),
    ecam=st.sampled_from([0, 1 << 20, 1 << 28]),
)
def test_no_memory_access_leaves_config_space(
    gpa: int, size: int, is_write: bool, ecam: int
) -> None:
    table = ExitTable()
    table.set_ecam(0, ecam)
    for slot in range(PCI_SLOTS):
        table.pci_slot(slot)
    data, where = ffi.new("uint8_t[8]"), ffi.new("uint64_t *")
    result = lib.exit_table_mmio(table.raw, gpa % (1 << 29), size, is_write, data, where)
    assert where[0] + size <= PCI_SLOTS * PCI_SLOT_SIZE
    if result == lib.ACCESS_PCI_PYTHON:
        assert is_write
        assert size in (1, 2, 4)
        assert where[0] % 4 + size <= 4


@given(address=st.integers(0, 2**32 - 1), byte=st.integers(0, 3), size=st.sampled_from([1, 2, 4]))
def test_ports_see_the_same_config_space_as_memory(address: int, byte: int, size: int) -> None:
    table = ExitTable()
    table.set_ecam(0, 1 << 20)
    table.pci_slot(7)[:] = bytes(i * 7 % 256 for i in range(PCI_SLOT_SIZE))
    table.pci_address = address
    _, by_port = read_port(table, 0xCFC + byte, size)
    slot, register = address >> 11 & 31, (address & 0xFC) + byte
    is_here = address >> 31 and not address & 0xFF0700 and byte + size <= 4 and slot == 7
    by_memory = ffi.new("uint8_t[8]")
    gpa = slot << 15 | register
    lib.exit_table_mmio(table.raw, gpa, size, False, by_memory, ffi.new("uint64_t *"))
    assert by_port == (bytes(by_memory)[:size] if is_here else b"\xff" * size)


@pytest.mark.parametrize("slot", [-1, 32])
def test_a_slot_that_does_not_exist_is_refused(slot: int) -> None:
    table = ExitTable()
    with pytest.raises(ValueError, match=r"must be 0\.\.31"):
        table.pci_slot(slot)
    with pytest.raises(ValueError, match=r"must be 0\.\.31"):
        table.pci_remove(slot)


def test_a_removed_slot_comes_back_empty() -> None:
    table = ExitTable()
    table.pci_slot(1)[:4] = b"\x34\x12\x78\x56"
    table.pci_remove(1)
    assert bytes(table.pci_slot(1)) == bytes(PCI_SLOT_SIZE)


def test_a_view_outlives_its_table() -> None:
    view = ExitTable().pci_slot(1)
    view[0] = 1
    assert view[0] == 1


@pytest.mark.parametrize(("offset", "length"), [(-1, 4), (PCI_SLOT_SIZE, 1), (0, -1)])
def test_a_trap_outside_the_slot_is_refused(offset: int, length: int) -> None:
    with pytest.raises(ValueError, match="must be within the slot"):
        ExitTable().pci_trap_reads(1, offset, length)


def test_every_kind_of_exit_is_counted_by_name() -> None:
    assert {kind.name.lower() for kind in ExitKind} < set(ExitTable().counters())
