# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from daemon.worker import layout

MIB, GIB = 1 << 20, 1 << 30
SIZES = st.lists(st.integers(1, 32 * 1024).map(lambda n: n * 2 * MIB), max_size=4)


@given(memory_mib=st.integers(16, 1 << 20), sizes=SIZES)
def test_ram_persistent_memory_and_window_do_not_overlap(memory_mib: int, sizes: list[int]) -> None:
    gpas = layout.pmem_gpas(memory_mib * MIB, sizes)
    ranges = [(gpa, gpa + size) for gpa, size in layout.ram_regions(memory_mib * MIB)]
    ranges += [(gpa, gpa + size) for gpa, size in zip(gpas, sizes, strict=True)]
    start = layout.pci_mmio64_start(memory_mib * MIB, sizes)
    ranges.append((start, start + layout.PCI_MMIO64_BYTES))
    assert all(end <= next_start for (_, end), (next_start, _) in zip(ranges, ranges[1:]))  # noqa: B905, RUF007 - the last has no next
    assert all(gpa % GIB == 0 and gpa >= layout.HIGH_RAM_START for gpa in gpas)


def test_most_that_there_may_be_fits_39_bits_of_addresses() -> None:
    start = layout.pci_mmio64_start(64 * GIB, [64 * GIB] * 4)
    assert start + layout.PCI_MMIO64_BYTES <= 1 << 39
