# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
r"""ACPI Machine Language, as much of it as our DSDT needs.

Every function returns the encoding of one term as bytes, so a table reads like ASL inside out:
``device("COM1", name("_HID", eisa_id("PNP0501")), ...)``.

Source: ACPI 6.4, section 20 "ACPI Machine Language" and 6.4 "Resource Data Types for ACPI".
"""

from __future__ import annotations

import enum
import struct
from typing import Final

LOCAL0: Final = b"\x60"
ARG0: Final = b"\x68"
ARG1: Final = b"\x69"
ZERO: Final = b"\x00"

_SEGMENT_LENGTH: Final = 4
_EXT_OP: Final = b"\x5b"


class AddressSpace(enum.IntEnum):
    """Where an OperationRegion lives."""

    SYSTEM_MEMORY = 0
    SYSTEM_IO = 1


class FieldAccess(enum.IntEnum):
    """Width of the accesses that a Field makes."""

    BYTE = 1
    WORD = 2
    DWORD = 3


def pkg_length(body_length: int) -> bytes:
    """Encode a PkgLength, which counts its own bytes too.

    Raises:
        ValueError: the body does not fit 28 bits.
    """
    if body_length + 1 < 1 << 6:
        return bytes((body_length + 1,))
    for extra in (1, 2, 3):
        total = body_length + 1 + extra
        if total < 1 << (4 + 8 * extra):
            tail = (total >> 4).to_bytes(extra, "little")
            return bytes((extra << 6 | total & 0xF,)) + tail
    raise ValueError(f"AML package of {body_length} bytes is too long")


def path(text: str) -> bytes:
    r"""Encode a NameString such as ``_HID`` or ``\_SB.PWRB``; segments are padded with "_".

    Raises:
        ValueError: a segment is not 1..4 of A-Z, 0-9 and "_", or begins with a digit.
    """
    prefix, rest = (b"\\", text[1:]) if text.startswith("\\") else (b"", text)
    segments = [_segment(part) for part in rest.split(".")] if rest else []
    if not segments:
        return prefix + ZERO
    if len(segments) == 1:
        return prefix + segments[0]
    if len(segments) == 2:
        return prefix + b"\x2e" + b"".join(segments)
    return prefix + b"\x2f" + bytes((len(segments),)) + b"".join(segments)


def _segment(text: str) -> bytes:
    is_valid = 1 <= len(text) <= _SEGMENT_LENGTH and not text[0].isdigit()
    if not is_valid or any(c not in "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_" for c in text):
        raise ValueError(f"{text!r} is not an AML name segment")
    return text.ljust(_SEGMENT_LENGTH, "_").encode("ascii")


def integer(value: int) -> bytes:
    """Encode an integer, 0..2**64-1, in the shortest form."""
    if value in (0, 1):
        return bytes((value,))
    for opcode, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4)):
        if value < 1 << (8 * size):
            return bytes((opcode,)) + value.to_bytes(size, "little")
    return b"\x0e" + value.to_bytes(8, "little")


def string(text: str) -> bytes:
    """Encode an ASCII string."""
    return b"\x0d" + text.encode("ascii") + ZERO


def eisa_id(text: str) -> bytes:
    """Encode an EISA id such as ``PNP0A08`` as the integer that _HID takes.

    Raises:
        ValueError: not three capital letters and four hexadecimal digits.
    """
    letters, digits = text[:3], text[3:]
    if len(text) != 7 or not (letters.isascii() and letters.isupper()):
        raise ValueError(f"{text!r} is not an EISA id")
    code = 0
    for letter in letters:
        code = code << 5 | (ord(letter) - 0x40)
    return b"\x0c" + struct.pack(">HH", code, int(digits, 16))


def name(text: str, value: bytes) -> bytes:
    """Name (text, value)."""
    return b"\x08" + path(text) + value


def package(*elements: bytes) -> bytes:
    """Package () {elements}."""
    body = bytes((len(elements),)) + b"".join(elements)
    return b"\x12" + pkg_length(len(body)) + body


def buffer(data: bytes) -> bytes:
    """Buffer () {data}."""
    body = integer(len(data)) + data
    return b"\x11" + pkg_length(len(body)) + body


def scope(text: str, *terms: bytes) -> bytes:
    """Scope (text) {terms}."""
    body = path(text) + b"".join(terms)
    return b"\x10" + pkg_length(len(body)) + body


def device(text: str, *terms: bytes) -> bytes:
    """Device (text) {terms}."""
    body = path(text) + b"".join(terms)
    return _EXT_OP + b"\x82" + pkg_length(len(body)) + body


def method(text: str, n_args: int, *terms: bytes) -> bytes:
    """Method (text, n_args, Serialized) {terms}."""
    body = path(text) + bytes((n_args | 0x08,)) + b"".join(terms)
    return b"\x14" + pkg_length(len(body)) + body


def operation_region(text: str, space: AddressSpace, offset: int, length: int) -> bytes:
    """OperationRegion (text, space, offset, length)."""
    return _EXT_OP + b"\x80" + path(text) + bytes((space,)) + integer(offset) + integer(length)


def field(region: str, access: FieldAccess, units: dict[str, int]) -> bytes:
    """Field (region, access, NoLock, WriteAsZeros) {name, bits ...}, from bit 0 upwards."""
    body = path(region) + bytes((access | 2 << 5,))
    for unit, n_bits in units.items():
        # A field element's length is a PkgLength of the bits, which does not count itself.
        body += _segment(unit) + _bit_count(n_bits)
    return _EXT_OP + b"\x81" + pkg_length(len(body)) + body


def _bit_count(n_bits: int) -> bytes:
    if n_bits < 1 << 6:
        return bytes((n_bits,))
    return bytes((1 << 6 | n_bits & 0xF, n_bits >> 4))


def store(source: bytes, target: bytes) -> bytes:
    """Store (source, target)."""
    return b"\x70" + source + target


def bit_and(left: bytes, right: bytes) -> bytes:
    """And (left, right), result used as a value."""
    return b"\x7b" + left + right + ZERO


def if_(condition: bytes, *terms: bytes) -> bytes:
    """If (condition) {terms}."""
    body = condition + b"".join(terms)
    return b"\xa0" + pkg_length(len(body)) + body


def notify(target: str, value: bytes) -> bytes:
    """Notify (target, value)."""
    return b"\x86" + path(target) + value


def call(method_path: str, *args: bytes) -> bytes:
    """Call a method; the guest knows the number of its arguments from its definition."""
    return path(method_path) + b"".join(args)


def resource_template(*descriptors: bytes) -> bytes:
    """ResourceTemplate () {descriptors}; the end tag's checksum 0 means "not checked"."""
    return buffer(b"".join(descriptors) + b"\x79\x00")


def io_port(base: int, length: int) -> bytes:
    """IO (Decode16, base, base, 1, length)."""
    return struct.pack("<BBHHBB", 0x47, 1, base, base, 1, length)


def irq_no_flags(gsi: int) -> bytes:
    """IRQNoFlags () {gsi}: edge, active high, exclusive; gsi 0..15."""
    return struct.pack("<BH", 0x22, 1 << gsi)


def interrupt_edge(gsi: int) -> bytes:
    """Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive) {gsi}."""
    return struct.pack("<BHBBI", 0x89, 6, 0x03, 1, gsi)


def memory32_fixed(base: int, length: int) -> bytes:
    """Memory32Fixed (ReadWrite, base, length)."""
    return struct.pack("<BHBII", 0x86, 9, 1, base, length)


# Address space descriptors: type, then flags "minimum and maximum fixed, positive decode,
# producer", then type-specific flags.
_FIXED_RANGE: Final = 0x0C


def bus_numbers(first: int, last: int) -> bytes:
    """WordBusNumber (ResourceProducer, MinFixed, MaxFixed, PosDecode, first..last)."""
    return struct.pack(
        "<BHBBBHHHHH", 0x88, 13, 2, _FIXED_RANGE, 0, 0, first, last, 0, last - first + 1
    )


def io_window(first: int, last: int) -> bytes:
    """WordIO (ResourceProducer, ..., EntireRange, first..last)."""
    return struct.pack(
        "<BHBBBHHHHH", 0x88, 13, 1, _FIXED_RANGE, 3, 0, first, last, 0, last - first + 1
    )


def memory_window32(base: int, length: int) -> bytes:
    """DWordMemory (ResourceProducer, ..., NonCacheable, ReadWrite, base..base+length-1)."""
    return struct.pack(
        "<BHBBBIIIII", 0x87, 23, 0, _FIXED_RANGE, 1, 0, base, base + length - 1, 0, length
    )


def memory_window64(base: int, length: int) -> bytes:
    """QWordMemory (ResourceProducer, ..., Cacheable, ReadWrite, base..base+length-1)."""
    return struct.pack(
        "<BHBBBQQQQQ", 0x8A, 43, 0, _FIXED_RANGE, 3, 0, base, base + length - 1, 0, length
    )
