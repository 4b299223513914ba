# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from __future__ import annotations

import dataclasses
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from devices.acpi.config import AcpiConfig
from devices.acpi.tables import AcpiTables, build_tables
from devices.bus import AddressWindow

CONFIG = AcpiConfig(
    n_vcpus=2,
    ecam=AddressWindow(0xE0000000, 1 << 20),
    pci_window_32=AddressWindow(0xC0000000, 0x20000000),
    pci_window_64=AddressWindow(0x140000000, 1 << 36),
)
WITH_WATCHDOG = dataclasses.replace(CONFIG, has_watchdog=True)
BOOT_8042, BOOT_NO_VGA, BOOT_NO_RTC = 1 << 1, 1 << 2, 1 << 5


class Parsed:
    """Follows the pointers as a guest does: RSDP, XSDT, tables."""

    def __init__(self, tables: AcpiTables) -> None:
        self.memory = dict(tables.blobs)
        self.rsdp = self.memory[tables.rsdp_gpa]
        xsdt = self.memory[struct.unpack_from("<Q", self.rsdp, 24)[0]]
        listed = struct.unpack(f"<{(len(xsdt) - 36) // 8}Q", xsdt[36:])
        self.by_name = {self.memory[gpa][:4]: self.memory[gpa] for gpa in listed}
        self.dsdt = self.memory[struct.unpack_from("<Q", self.by_name[b"FACP"], 140)[0]]

    @property
    def boot_flags(self) -> int:
        flags: int = struct.unpack_from("<H", self.by_name[b"FACP"], 109)[0]
        return flags


def test_every_table_has_its_length_and_checksum() -> None:
    for _gpa, blob in build_tables(CONFIG).blobs:
        assert sum(blob) & 0xFF == 0
    for table in Parsed(build_tables(CONFIG)).by_name.values():
        assert struct.unpack_from("<I", table, 4)[0] == len(table)


def test_rsdp_of_revision_2_has_both_checksums() -> None:
    rsdp = Parsed(build_tables(CONFIG)).rsdp
    assert (rsdp[:8], rsdp[15], len(rsdp)) == (b"RSD PTR ", 2, 36)
    assert sum(rsdp[:20]) & 0xFF == 0


def test_tables_do_not_overlap_and_stay_in_their_area() -> None:
    blobs = sorted(build_tables(CONFIG).blobs)
    ends = [gpa + len(blob) for gpa, blob in blobs]
    assert all(end <= start for end, (start, _) in zip(ends, blobs[1:], strict=False))
    assert blobs[0][0] == 0xE0000
    assert ends[-1] <= 0x100000


def test_area_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="beyond 0xe0200"):
        build_tables(dataclasses.replace(CONFIG, tables_end=0xE0200))


def test_xsdt_lists_fadt_madt_and_mcfg() -> None:
    assert set(Parsed(build_tables(CONFIG)).by_name) == {b"FACP", b"APIC", b"MCFG"}


def test_wdat_is_there_where_a_watchdog_is_and_names_its_registers() -> None:
    wdat = Parsed(build_tables(WITH_WATCHDOG)).by_name[b"WDAT"]
    length, segment, bus, device, _, period_ms, most, least, flags, count = struct.unpack_from(
        "<IHBBB3xIIIB3xI", wdat, 36
    )
    # Linux leaves one alone that claims to be a PCI function: none has 0xff in all of these.
    assert (length, segment, bus, device) == (32, 0xFF, 0xFF, 0xFF)
    assert (period_ms, least, most, flags & 1) == (100, 10, 36_000, 1)
    assert len(wdat) == 36 + 32 + 24 * count
    for at in range(68, len(wdat), 24):
        space, bits, shift, access, port = struct.unpack_from("<4BQ", wdat, at + 4)
        assert (space, bits, shift, access) == (1, 32, 0, 3)
        assert 0x5E0 <= port <= 0x5EC


def test_fadt_is_hardware_reduced_with_reset_and_sleep_registers() -> None:
    fadt = Parsed(build_tables(CONFIG)).by_name[b"FACP"]
    flags = struct.unpack_from("<I", fadt, 112)[0]
    assert flags & (1 << 20)
    assert flags & (1 << 10)
    assert struct.unpack_from("<BBBBQB", fadt, 116) == (1, 8, 0, 1, 0x5C6, 1)
    assert struct.unpack_from("<BBBBQ", fadt, 244) == (1, 8, 0, 1, 0x5C4)
    assert struct.unpack_from("<BBBBQ", fadt, 256) == (1, 8, 0, 1, 0x5C5)


def test_devices_that_exist_are_told_to_exist() -> None:
    parsed = Parsed(build_tables(CONFIG))
    assert parsed.boot_flags & (BOOT_8042 | BOOT_NO_RTC) == BOOT_8042
    assert parsed.by_name[b"FACP"][108] == 0x32


def test_devices_left_out_are_told_to_be_absent() -> None:
    without = dataclasses.replace(CONFIG, has_rtc=False, has_i8042=False)
    parsed = Parsed(build_tables(without))
    assert parsed.boot_flags & (BOOT_8042 | BOOT_NO_RTC) == BOOT_NO_RTC
    assert parsed.by_name[b"FACP"][108] == 0


def test_no_vga_is_told() -> None:
    assert Parsed(build_tables(CONFIG)).boot_flags & BOOT_NO_VGA


@pytest.mark.parametrize("n_vcpus", [1, 2, 16])
def test_madt_has_one_enabled_lapic_per_vcpu(n_vcpus: int) -> None:
    madt = Parsed(build_tables(dataclasses.replace(CONFIG, n_vcpus=n_vcpus))).by_name[b"APIC"]
    apic_ids, offset = [], 44
    while offset < len(madt):
        if madt[offset] == 0 and madt[offset + 4] == 1:
            apic_ids.append(madt[offset + 3])
        offset += madt[offset + 1]
    assert apic_ids == list(range(n_vcpus))


def test_mcfg_covers_the_ecam_buses() -> None:
    mcfg = Parsed(build_tables(CONFIG)).by_name[b"MCFG"]
    assert struct.unpack_from("<QHBB", mcfg, 44) == (0xE0000000, 0, 0, 0)


@pytest.mark.parametrize("n_vcpus", [0, -1, 10_000])
def test_vcpu_count_out_of_range_is_refused(n_vcpus: int) -> None:
    with pytest.raises(ValueError, match="n_vcpus"):
        dataclasses.replace(CONFIG, n_vcpus=n_vcpus)


def test_ecam_of_half_a_bus_is_refused() -> None:
    with pytest.raises(ValueError, match="whole MiB"):
        dataclasses.replace(CONFIG, ecam=AddressWindow(0xE0000000, 1 << 19))


def test_isa_gsi_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="gsi=24"):
        dataclasses.replace(CONFIG, ged_gsi=24)


def _disassemble(tables: AcpiTables, folder: Path) -> dict[bytes, str]:
    iasl = shutil.which("iasl")
    if iasl is None:
        pytest.skip("iasl is not installed (package acpica-tools)")
    texts = {}
    parsed = Parsed(tables)
    for name, table in {**parsed.by_name, b"DSDT": parsed.dsdt}.items():
        source = folder / f"{name.decode()}.dat"
        source.write_bytes(table)
        result = subprocess.run(
            [iasl, "-d", str(source)], capture_output=True, text=True, check=True, timeout=60
        )
        assert not re.search(r"error|warning|invalid|incorrect", result.stderr, re.IGNORECASE)
        texts[name] = source.with_suffix(".dsl").read_text()
    return texts


def test_iasl_reads_the_tables_and_compiles_the_dsdt_again(tmp_path: Path) -> None:
    texts = _disassemble(build_tables(WITH_WATCHDOG), tmp_path)
    assert "Watchdog Entry Count : 0000000A" in texts[b"WDAT"]
    assert "Hardware Reduced (V5) : 1" in texts[b"FACP"]
    for hardware_id in ("PNP0A08", "PNP0C02", "PNP0501", "PNP0B00", "PNP0303", "ACPI0013"):
        assert hardware_id in texts[b"DSDT"]
    assert r"Notify (\_SB.PWRB, 0x80)" in texts[b"DSDT"]
    # Every slot but the host bridge's can be notified, and ejects itself and no other.
    for slot in range(1, 32):
        device = texts[b"DSDT"].split(f"Device (S{slot:02})")[1].split("Device (")[0]
        assert f"Name (_ADR, 0x{slot << 16:08X})" in device
        assert re.search(rf"B0EJ = 0x0*{1 << slot:X}\b", device)
        assert f"Notify (S{slot:02}, Arg1)" in texts[b"DSDT"]
    result = subprocess.run(
        ["iasl", "DSDT.dsl"], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
    )
    assert "0 Errors, 0 Warnings" in result.stdout


def test_iasl_finds_no_device_that_was_left_out(tmp_path: Path) -> None:
    bare = dataclasses.replace(
        CONFIG,
        has_com1=False,
        has_rtc=False,
        has_i8042=False,
        has_pvpanic=False,
        pci_window_64=None,
    )
    dsdt = _disassemble(build_tables(bare), tmp_path)[b"DSDT"]
    for text in ("PNP0501", "PNP0B00", "PNP0303", "QEMU0001", "QWordMemory"):
        assert text not in dsdt


def _execute(folder: Path, command: str, fill: int) -> str:
    """Have ACPICA, which is the interpreter of Linux, run a method; ``fill`` fills all ports."""
    acpiexec = shutil.which("acpiexec")
    if acpiexec is None:
        pytest.skip("acpiexec is not installed (package acpica-tools)")
    table = folder / "DSDT.aml"
    table.write_bytes(Parsed(build_tables(CONFIG)).dsdt)
    argv = [acpiexec, "-fv", hex(fill), "-b", command, str(table)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)
    assert "Exception" not in done.stdout + done.stderr
    return done.stdout


def test_a_guest_notifies_the_slots_that_have_changed_and_those_to_be_emptied(
    tmp_path: Path,
) -> None:
    # The event register says hotplug, and each mask has bits 1, 9, 17 and 25.
    told = _execute(tmp_path, r"execute \_SB.GED._EVT 5", fill=2)
    notified = re.findall(r"Notify on \[(\w+)\].*Value (0x\w+)", told)
    # Each notification has a thread of its own, so their order says nothing.
    expected = [
        (slot, value) for slot in ("S01_", "S09_", "S17_", "S25_") for value in ("0x01", "0x03")
    ]
    assert sorted(notified) == expected


def test_a_guest_presses_the_power_button_and_notifies_no_slot(tmp_path: Path) -> None:
    told = _execute(tmp_path, r"execute \_SB.GED._EVT 5", fill=1)
    assert re.findall(r"Notify on \[(\w+)\]", told) == ["PWRB"]


def test_a_slot_is_ejected_by_its_own_bit(tmp_path: Path) -> None:
    told = _execute(tmp_path, r"execute \_SB.PCI0.S05._EJ0 1;execute \_SB.PCI0.B0EJ", fill=0)
    assert re.search(r"\[Integer\] = 0*20\b", told)
