# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from __future__ import annotations

import pytest

from kvm_ffi.exits import ExitKind
from kvm_ffi.types import Gpa
from tests.support.tiny_guest import HLT, TinyGuest

ECAM = 0xE000_0000
SLOT = 3
CONFIG = bytes(range(256)) * 16


def config_address(slot: int, register: int, *, bus: int = 0, function: int = 0) -> int:
    return 1 << 31 | bus << 16 | slot << 11 | function << 8 | register & 0xFC


def type1_read(address: int, port: int, load: bytes) -> bytes:
    # mov dx, 0xcf8; mov eax, address; out dx, eax; mov dx, port; <load>
    out = b"\xba\xf8\x0c\x66\xb8" + address.to_bytes(4, "little") + b"\x66\xef"
    return out + b"\xba" + port.to_bytes(2, "little") + load + HLT


@pytest.fixture
def pci_guest(guest: TinyGuest) -> TinyGuest:
    guest.exits.set_ecam(ECAM, 1 << 20)
    guest.exits.pci_slot(SLOT)[:] = CONFIG
    return guest


def test_ports_read_config_space_in_c(pci_guest: TinyGuest) -> None:
    pci_guest.load(type1_read(config_address(SLOT, 0x40), 0xCFC, b"\x66\xed"))
    assert pci_guest.run() == ExitKind.HLT
    assert pci_guest.vcpu.get_regs().rax == 0x4342_4140
    assert pci_guest.exits.counters()["pci"] == 2  # the address and the data


@pytest.mark.parametrize(("port", "load", "expected"), [
    (0xCFD, b"\xec", 0x41),
    (0xCFE, b"\xed", 0x4342),
    (0xCFF, b"\xec", 0x43),
])  # fmt: skip
def test_ports_read_parts_of_a_register(
    pci_guest: TinyGuest, port: int, load: bytes, expected: int
) -> None:
    pci_guest.load(type1_read(config_address(SLOT, 0x40), port, b"\x66\x31\xc0" + load))
    assert pci_guest.run() == ExitKind.HLT
    assert pci_guest.vcpu.get_regs().rax == expected


@pytest.mark.parametrize("address", [
    config_address(SLOT + 1, 0),
    config_address(SLOT, 0, bus=1),
    config_address(SLOT, 0, function=1),
    config_address(SLOT, 0) & 0x7FFF_FFFF,
])  # fmt: skip
def test_absent_functions_read_as_all_ones(pci_guest: TinyGuest, address: int) -> None:
    pci_guest.load(type1_read(address, 0xCFC, b"\x66\xed"))
    assert pci_guest.run() == ExitKind.HLT
    assert pci_guest.vcpu.get_regs().rax == 0xFFFF_FFFF


def test_the_address_port_reads_back(pci_guest: TinyGuest) -> None:
    pci_guest.load(type1_read(0x8000_0000, 0xCF8, b"\x66\xed"))
    assert pci_guest.run() == ExitKind.HLT
    assert pci_guest.vcpu.get_regs().rax == 0x8000_0000
    assert pci_guest.exits.pci_address == 0x8000_0000


def test_a_byte_at_the_reset_control_port_is_not_the_address(pci_guest: TinyGuest) -> None:
    pci_guest.exits.claim_pio(0xCF9, 1)
    pci_guest.exits.pci_address = 0x8000_1800
    pci_guest.load(b"\xee" + HLT, regs={"rdx": 0xCF9, "rax": 6})
    assert pci_guest.accesses() == [("PIO_WRITE", 0xCF9, 1, 6)]
    assert pci_guest.exits.pci_address == 0x8000_1800


def test_a_config_write_by_port_comes_to_python_as_slot_and_register(
    pci_guest: TinyGuest,
) -> None:
    pci_guest.load(type1_read(config_address(SLOT, 0x10), 0xCFE, b"\xef"))  # out dx, ax
    assert pci_guest.run() == ExitKind.PCI_CONFIG_WRITE
    exit_ = pci_guest.vcpu.exit
    assert (exit_.addr, exit_.len, exit_.value) == (SLOT << 12 | 0x12, 2, 0x1810)


def test_a_config_write_to_an_absent_slot_goes_nowhere(pci_guest: TinyGuest) -> None:
    pci_guest.load(type1_read(config_address(SLOT + 1, 0x10), 0xCFC, b"\x66\xef"))
    assert pci_guest.run() == ExitKind.HLT


def test_ecam_reads_config_space_in_c(pci_guest: TinyGuest) -> None:
    pci_guest.load(b"\x66\xa1\x40\x01" + HLT, ds_base=ECAM + (SLOT << 15))
    assert pci_guest.run() == ExitKind.HLT
    assert pci_guest.vcpu.get_regs().rax == 0x4342_4140


@pytest.mark.parametrize("elsewhere", [SLOT << 15 | 1 << 12, (SLOT + 1) << 15])
def test_ecam_of_an_absent_function_reads_as_all_ones(pci_guest: TinyGuest, elsewhere: int) -> None:
    pci_guest.load(b"\x66\xa1\x00\x00" + HLT, ds_base=ECAM + elsewhere)
    assert pci_guest.run() == ExitKind.HLT
    assert pci_guest.vcpu.get_regs().rax == 0xFFFF_FFFF


def test_an_ecam_write_comes_to_python_as_slot_and_register(pci_guest: TinyGuest) -> None:
    base = ECAM + (SLOT << 15)
    pci_guest.load(b"\x66\xa3\x04\x00" + HLT, ds_base=base, regs={"rax": 0x0010_0506})
    assert pci_guest.accesses() == [("PCI_CONFIG_WRITE", SLOT << 12 | 4, 4, 0x0010_0506)]


def test_a_removed_slot_is_gone(pci_guest: TinyGuest) -> None:
    pci_guest.exits.pci_remove(SLOT)
    pci_guest.load(type1_read(config_address(SLOT, 0), 0xCFC, b"\x66\xed"))
    assert pci_guest.run() == ExitKind.HLT
    assert pci_guest.vcpu.get_regs().rax == 0xFFFF_FFFF


def test_a_trapped_register_asks_python(pci_guest: TinyGuest) -> None:
    pci_guest.exits.pci_trap_reads(SLOT, 0x44, 4)
    pci_guest.load(b"\x66\xa1\x44\x00" + HLT, ds_base=ECAM + (SLOT << 15))
    assert pci_guest.accesses({SLOT << 12 | 0x44: 7}) == [
        ("PCI_CONFIG_READ", SLOT << 12 | 0x44, 4, 7)
    ]
    assert pci_guest.vcpu.get_regs().rax == 7


def test_string_output_to_config_space_comes_element_by_element(pci_guest: TinyGuest) -> None:
    pci_guest.exits.pci_address = config_address(SLOT, 0x10)
    pci_guest.memory.write(Gpa(0x3000), b"\x01\x02\x03")
    pci_guest.load(b"\xf3\x6e" + HLT, regs={"rdx": 0xCFC, "rcx": 3, "rsi": 0x3000})
    assert [value for _, _, _, value in pci_guest.accesses()] == [1, 2, 3]
