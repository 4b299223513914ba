# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.acpi import aml


def decode_pkg_length(data: bytes) -> tuple[int, int]:
    """Return (package length, bytes it took), as ACPI 6.4, 20.2.4 says."""
    extra = data[0] >> 6
    if extra == 0:
        return data[0] & 0x3F, 1
    value = data[0] & 0xF
    for i in range(extra):
        value |= data[1 + i] << (4 + 8 * i)
    return value, 1 + extra


@given(st.integers(0, (1 << 28) - 5))
def test_package_length_counts_itself(body_length: int) -> None:
    encoded = aml.pkg_length(body_length)
    assert decode_pkg_length(encoded) == (body_length + len(encoded), len(encoded))


def test_package_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="too long"):
        aml.pkg_length(1 << 28)


@pytest.mark.parametrize(
    ("text", "encoded"),
    [
        ("_HID", b"_HID"),
        ("RTC", b"RTC_"),
        ("\\_SB", b"\\_SB_"),
        ("_SB.PWRB", b"\x2e_SB_PWRB"),
        ("\\_SB.PCI0.S01", b"\\\x2f\x03_SB_PCI0S01_"),
        ("\\", b"\\\x00"),
    ],
)
def test_path(text: str, encoded: bytes) -> None:
    assert aml.path(text) == encoded


@pytest.mark.parametrize("text", ["TOOLONG", "lower", "1ABC", "A.", "A-B"])
def test_bad_name_segment_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not an AML name segment"):
        aml.path(text)


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, b"\x00"),
        (1, b"\x01"),
        (2, b"\x0a\x02"),
        (0x100, b"\x0b\x00\x01"),
        (0x10000, b"\x0c\x00\x00\x01\x00"),
        (1 << 32, b"\x0e\x00\x00\x00\x00\x01\x00\x00\x00"),
    ],
)
def test_integer_takes_the_shortest_form(value: int, encoded: bytes) -> None:
    assert aml.integer(value) == encoded


def test_eisa_id_of_the_specification_example() -> None:
    assert aml.eisa_id("PNP0A03") == bytes.fromhex("0c41d00a03")


@pytest.mark.parametrize("text", ["PNP0A0", "pnp0A03", "ACPI0013"])
def test_bad_eisa_id_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not an EISA id"):
        aml.eisa_id(text)
