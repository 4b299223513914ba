# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
r"""The DSDT: which devices there are and how the guest powers off.

Source: ACPI 6.4, sections 5.6.9 (GED), 6.1 (device identification), 6.3 (insertion and removal),
7.4.2 (\_Sx objects).
"""

from __future__ import annotations

import functools
from typing import Final

from devices.legacy.cmos_rtc import INDEX_PORT
from devices.legacy.i8042 import COMMAND_PORT, DATA_PORT
from devices.legacy.pvpanic import PVPANIC_PORT
from devices.legacy.serial import COM1_PORT

from . import aml
from .config import AcpiConfig
from .pci_hotplug import FIRST_SLOT, LAST_SLOT, PCI_HOTPLUG_LENGTH, PCI_HOTPLUG_PORT
from .power import GED_PORT, SLEEP_TYPE_S5, GedEvent

PCI_CONFIG_PORT: Final = 0xCF8
PCI_CONFIG_LENGTH: Final = 8
NOTIFY_DEVICE_CHECK: Final = 1
NOTIFY_EJECT_REQUEST: Final = 3
NOTIFY_BUTTON_PRESSED: Final = 0x80
POWER_BUTTON_PATH: Final = "\\_SB.PWRB"
NOTIFY_SLOTS_PATH: Final = "\\_SB.PCI0.PCNT"


def build_dsdt_body(config: AcpiConfig) -> bytes:
    """Return the AML of the DSDT, without the table header."""
    terms = [
        _pci_host_bridge(config),
        _ecam_reservation(config),
        _power_button(),
        _event_device(config),
    ]
    if config.has_com1:
        terms.append(_isa_device("COM1", "PNP0501", ((COM1_PORT, 8),), config.com1_gsi))
    if config.has_rtc:
        # No interrupt: the clock has no alarm, and a driver that finds none asks for none.
        terms.append(_isa_device("RTC", "PNP0B00", ((INDEX_PORT, 2),), None))
    if config.has_i8042:
        ports = ((DATA_PORT, 1), (COMMAND_PORT, 1))
        terms.append(_isa_device("PS2K", "PNP0303", ports, config.i8042_gsi))
    if config.has_pvpanic:
        terms.append(_pvpanic())
    sleep_type = aml.integer(SLEEP_TYPE_S5)
    s5 = aml.name("\\_S5", aml.package(sleep_type, aml.ZERO, aml.ZERO, aml.ZERO))
    return s5 + aml.scope("\\_SB", *terms)


def _pci_host_bridge(config: AcpiConfig) -> bytes:
    low = config.pci_window_32
    resources = [
        aml.bus_numbers(0, config.last_bus),
        aml.io_port(PCI_CONFIG_PORT, PCI_CONFIG_LENGTH),
        aml.io_window(0, PCI_CONFIG_PORT - 1),
        aml.io_window(PCI_CONFIG_PORT + PCI_CONFIG_LENGTH, 0xFFFF),
        aml.memory_window32(low.base, low.size_bytes),
    ]
    high = config.pci_window_64
    if high is not None:
        resources.append(aml.memory_window64(high.base, high.size_bytes))
    return aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A08")),
        aml.name("_CID", aml.eisa_id("PNP0A03")),
        aml.name("_SEG", aml.ZERO),
        aml.name("_BBN", aml.ZERO),
        aml.name("_UID", aml.ZERO),
        aml.name("_CRS", aml.resource_template(*resources)),
        _hotplug_slots(),
    )


@functools.cache
def _hotplug_slots() -> bytes:
    """Return every slot as a device that may come and go, and the method that tells of it.

    Kept: it is the same for every machine, and the largest part of the DSDT.
    """
    slots = range(FIRST_SLOT, LAST_SLOT + 1)
    registers = {"PCIU": 32, "PCID": 32, "B0EJ": 32}
    terms = [
        aml.operation_region(
            "PHPR", aml.AddressSpace.SYSTEM_IO, PCI_HOTPLUG_PORT, PCI_HOTPLUG_LENGTH
        ),
        aml.field("PHPR", aml.FieldAccess.DWORD, registers),
        *(
            aml.device(
                f"S{slot:02}",
                aml.name("_ADR", aml.integer(slot << 16)),
                aml.name("_SUN", aml.integer(slot)),
                aml.method("_EJ0", 1, aml.store(aml.integer(1 << slot), aml.path("B0EJ"))),
            )
            for slot in slots
        ),
        # PCNT (mask, value): notify each slot of a mask.
        aml.method(
            "PCNT",
            2,
            *(
                aml.if_(
                    aml.bit_and(aml.ARG0, aml.integer(1 << slot)),
                    aml.notify(f"S{slot:02}", aml.ARG1),
                )
                for slot in slots
            ),
        ),
    ]
    return b"".join(terms)


def _ecam_reservation(config: AcpiConfig) -> bytes:
    # Linux uses the MCFG range only when a motherboard resource reserves it.
    return aml.device(
        "MBRD",
        aml.name("_HID", aml.eisa_id("PNP0C02")),
        aml.name("_UID", aml.ZERO),
        aml.name(
            "_CRS",
            aml.resource_template(aml.memory32_fixed(config.ecam.base, config.ecam.size_bytes)),
        ),
    )


def _power_button() -> bytes:
    return aml.device(
        "PWRB",
        aml.name("_HID", aml.eisa_id("PNP0C0C")),
        aml.name("_UID", aml.ZERO),
    )


def _event_device(config: AcpiConfig) -> bytes:
    is_pressed = aml.bit_and(aml.LOCAL0, aml.integer(GedEvent.POWER_BUTTON))
    is_plugged = aml.bit_and(aml.LOCAL0, aml.integer(GedEvent.PCI_HOTPLUG))
    changed, leaving = aml.path("\\_SB.PCI0.PCIU"), aml.path("\\_SB.PCI0.PCID")
    return aml.device(
        "GED",
        aml.name("_HID", aml.string("ACPI0013")),
        aml.name("_UID", aml.ZERO),
        aml.name("_CRS", aml.resource_template(aml.interrupt_edge(config.ged_gsi))),
        aml.operation_region("EREG", aml.AddressSpace.SYSTEM_IO, GED_PORT, 4),
        aml.field("EREG", aml.FieldAccess.DWORD, {"ESEL": 32}),
        aml.method(
            "_EVT",
            1,
            aml.store(aml.path("ESEL"), aml.LOCAL0),
            aml.if_(is_pressed, aml.notify(POWER_BUTTON_PATH, aml.integer(NOTIFY_BUTTON_PRESSED))),
            aml.if_(
                is_plugged,
                aml.call(NOTIFY_SLOTS_PATH, changed, aml.integer(NOTIFY_DEVICE_CHECK)),
                aml.call(NOTIFY_SLOTS_PATH, leaving, aml.integer(NOTIFY_EJECT_REQUEST)),
            ),
        ),
    )


def _isa_device(
    text: str, hardware_id: str, ports: tuple[tuple[int, int], ...], gsi: int | None
) -> bytes:
    resources = [aml.io_port(base, length) for base, length in ports]
    if gsi is not None:
        resources.append(aml.irq_no_flags(gsi))
    return aml.device(
        text,
        aml.name("_HID", aml.eisa_id(hardware_id)),
        aml.name("_UID", aml.ZERO),
        aml.name("_CRS", aml.resource_template(*resources)),
    )


def _pvpanic() -> bytes:
    return aml.device(
        "PEVT",
        aml.name("_HID", aml.string("QEMU0001")),
        aml.name("_CRS", aml.resource_template(aml.io_port(PVPANIC_PORT, 1))),
        aml.name("_STA", aml.integer(0x0F)),
    )
