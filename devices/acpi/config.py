# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What the ACPI tables describe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from devices.bus import AddressWindow

ECAM_BYTES_PER_BUS: Final = 1 << 20
# One table page of LAPIC entries; far beyond the 16 vCPUs that a machine may have.
MAX_VCPUS: Final = 254


@dataclass(frozen=True)
class AcpiConfig:
    """The machine, as far as the guest's ACPI learns of it.

    A device that is left out (``has_* = False``) is also told by the FADT's flags, so that a
    kernel does not spend its boot on waiting for it.

    Raises:
        ValueError: n_vcpus, a GSI or the ECAM size is out of range.
    """

    n_vcpus: int
    ecam: AddressWindow
    pci_window_32: AddressWindow
    pci_window_64: AddressWindow | None = None
    rsdp_gpa: int = 0xE0000
    tables_end: int = 0x100000
    lapic_gpa: int = 0xFEE00000
    ioapic_gpa: int = 0xFEC00000
    has_com1: bool = True
    has_rtc: bool = True
    has_i8042: bool = True
    has_pvpanic: bool = True
    has_watchdog: bool = False
    com1_gsi: int = 4
    i8042_gsi: int = 1
    ged_gsi: int = 5

    def __post_init__(self) -> None:
        if not 1 <= self.n_vcpus <= MAX_VCPUS:
            raise ValueError(f"n_vcpus={self.n_vcpus}: must be 1..{MAX_VCPUS}")
        if self.ecam.size_bytes % ECAM_BYTES_PER_BUS or self.last_bus > 255:
            raise ValueError(f"ecam size={self.ecam.size_bytes:#x}: must be 1..256 whole MiB")
        for gsi in (self.com1_gsi, self.i8042_gsi, self.ged_gsi):
            if not 0 <= gsi <= 15:
                raise ValueError(f"gsi={gsi}: a fixed interrupt must be 0..15")

    @property
    def last_bus(self) -> int:
        """The last PCI bus number that the ECAM covers."""
        return self.ecam.size_bytes // ECAM_BYTES_PER_BUS - 1
