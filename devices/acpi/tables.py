# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""ACPI tables of a hardware-reduced machine: RSDP, XSDT, FADT, MADT, MCFG, DSDT, WDAT.

Hardware-reduced means: no SCI, no PM timer, no fixed power hardware; sleep and reset are plain
registers (power.py) and events come through the GED.

Source: ACPI 6.4, section 5.2; PCI Firmware 3.2, 4.1.2 (MCFG).
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from typing import Final

from devices.legacy.cmos_rtc import REG_CENTURY

from .config import AcpiConfig
from .dsdt import build_dsdt_body
from .power import RESET_PORT, RESET_VALUE, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT
from .watchdog import wdat_body

OEM_ID: Final = b"HOSTEL"
OEM_TABLE_ID: Final = b"HOSTELVM"
CREATOR_ID: Final = b"HSTL"
HYPERVISOR_ID: Final = b"HOSTEL\0\0"
TABLE_ALIGNMENT: Final = 64
HEADER_LENGTH: Final = 36
CHECKSUM_OFFSET: Final = 9

# FADT fixed feature flags (5.2.9, table 5.10).
FADT_WBINVD: Final = 1 << 0
FADT_PWR_BUTTON: Final = 1 << 4  # set: no fixed power button, it is a control method device
FADT_SLP_BUTTON: Final = 1 << 5  # set: no fixed sleep button
FADT_RESET_REG_SUP: Final = 1 << 10
FADT_HW_REDUCED_ACPI: Final = 1 << 20

# IA-PC boot architecture flags (5.2.9.3).
BOOT_8042: Final = 1 << 1
BOOT_VGA_NOT_PRESENT: Final = 1 << 2
BOOT_NO_PCIE_ASPM: Final = 1 << 4
BOOT_CMOS_RTC_NOT_PRESENT: Final = 1 << 5

MADT_LAPIC_ENABLED: Final = 1
ALL_PROCESSORS: Final = 0xFF


@dataclass(frozen=True)
class AcpiTables:
    """Finished tables: bytes to copy into guest memory, and where the RSDP is."""

    rsdp_gpa: int
    blobs: tuple[tuple[int, bytes], ...]


@functools.lru_cache(maxsize=8)
def build_tables(config: AcpiConfig) -> AcpiTables:
    """Build and place every table, from ``config.rsdp_gpa`` upwards.

    Kept: few shapes of machines make up most, and a zygote that has built one has built it for all
    of its workers.

    Raises:
        ValueError: the tables do not fit below ``config.tables_end``.
    """
    blobs: list[tuple[int, bytes]] = []
    next_gpa = _align(config.rsdp_gpa + len(_rsdp(0)))

    def place(table: bytes) -> int:
        nonlocal next_gpa
        gpa, next_gpa = next_gpa, _align(next_gpa + len(table))
        blobs.append((gpa, table))
        return gpa

    dsdt_gpa = place(_table(b"DSDT", 2, build_dsdt_body(config)))
    listed = [
        place(_fadt(config, dsdt_gpa)),
        place(_madt(config)),
        place(_mcfg(config)),
    ]
    if config.has_watchdog:
        listed.append(place(_table(b"WDAT", 1, wdat_body())))
    xsdt_gpa = place(_table(b"XSDT", 1, struct.pack(f"<{len(listed)}Q", *listed)))
    if next_gpa > config.tables_end:
        raise ValueError(f"ACPI tables end at {next_gpa:#x}, beyond {config.tables_end:#x}")
    blobs.insert(0, (config.rsdp_gpa, _rsdp(xsdt_gpa)))
    return AcpiTables(config.rsdp_gpa, tuple(blobs))


def _align(gpa: int) -> int:
    return -(-gpa // TABLE_ALIGNMENT) * TABLE_ALIGNMENT


def _checksum(data: bytes | bytearray) -> int:
    return -sum(data) & 0xFF


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    table = bytearray(
        struct.pack(
            "<4sIBB6s8sI4sI",
            signature,
            HEADER_LENGTH + len(body),
            revision,
            0,
            OEM_ID,
            OEM_TABLE_ID,
            1,
            CREATOR_ID,
            1,
        )
        + body,
    )
    table[CHECKSUM_OFFSET] = _checksum(table)
    return bytes(table)


def _rsdp(xsdt_gpa: int) -> bytes:
    rsdp = bytearray(
        struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, OEM_ID, 2, 0, HEADER_LENGTH, xsdt_gpa, 0),
    )
    rsdp[8] = _checksum(rsdp[:20])  # the ACPI 1.0 part
    rsdp[32] = _checksum(rsdp)
    return bytes(rsdp)


def _io_register(port: int) -> bytes:
    """Generic Address Structure of one byte in I/O space (5.2.3.2)."""
    return struct.pack("<BBBBQ", 1, 8, 0, 1, port)


def _fadt(config: AcpiConfig, dsdt_gpa: int) -> bytes:
    flags = FADT_WBINVD | FADT_PWR_BUTTON | FADT_SLP_BUTTON
    flags |= FADT_RESET_REG_SUP | FADT_HW_REDUCED_ACPI
    boot = BOOT_VGA_NOT_PRESENT | BOOT_NO_PCIE_ASPM
    if config.has_i8042:
        boot |= BOOT_8042
    if not config.has_rtc:
        boot |= BOOT_CMOS_RTC_NOT_PRESENT
    fadt = bytearray(276)  # revision 6, table 5.9; offsets are from the start of the table
    fadt[108] = REG_CENTURY if config.has_rtc else 0
    struct.pack_into("<H", fadt, 109, boot)
    struct.pack_into("<I", fadt, 112, flags)
    fadt[116:128] = _io_register(RESET_PORT)
    fadt[128] = RESET_VALUE
    fadt[131] = 4  # minor version: ACPI 6.4
    struct.pack_into("<Q", fadt, 140, dsdt_gpa)
    fadt[244:256] = _io_register(SLEEP_CONTROL_PORT)
    fadt[256:268] = _io_register(SLEEP_STATUS_PORT)
    fadt[268:276] = HYPERVISOR_ID
    return _table(b"FACP", 6, bytes(fadt[HEADER_LENGTH:]))


def _madt(config: AcpiConfig) -> bytes:
    body = struct.pack("<II", config.lapic_gpa, 0)
    for index in range(config.n_vcpus):
        body += struct.pack("<BBBBI", 0, 8, index, index, MADT_LAPIC_ENABLED)
    body += struct.pack("<BBBBII", 1, 12, 0, 0, config.ioapic_gpa, 0)
    # LINT1 of every LAPIC is the NMI pin.
    body += struct.pack("<BBBHB", 4, 6, ALL_PROCESSORS, 0, 1)
    return _table(b"APIC", 5, body)


def _mcfg(config: AcpiConfig) -> bytes:
    body = bytes(8) + struct.pack("<QHBB4x", config.ecam.base, 0, 0, config.last_bus)
    return _table(b"MCFG", 1, body)
