# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Guests of a few bytes: what a direct host can run, and what takes no time to boot.

The instructions used here are encoded the same in 32-bit and 64-bit mode, so one program serves
both entries of an ELF kernel.
"""

from __future__ import annotations

import struct
from pathlib import Path

LOAD_GPA = 0x10_0000
COM1 = 0x3F8
BOOT_TIMER = 0x5B0
BOOT_TIMER_MAGIC = 123
PVPANIC = 0x505
PVPANIC_PANICKED = 1
I8042_COMMAND = 0x64
I8042_RESET = 0xFE
SLEEP_CONTROL = 0x5C4
SLEEP_S5 = 0x34  # SLP_EN, and SLP_TYP 5: ACPI 6.5, 4.8.3.7

_PT_LOAD = 1
_PT_NOTE = 4
_XEN_ELFNOTE_PHYS32_ENTRY = 18
_EHDR_BYTES = 64
_PHDR_BYTES = 56

HALT = b"\xf4\xeb\xfd"  # 1: hlt; jmp 1b
SPIN = b"\xeb\xfe"  # 1: jmp 1b
TRIPLE_FAULT = b"\x0f\x01\x1c\x24\x0f\x0b"  # lidt [esp or rsp], where zeros are; ud2


def out(port: int, value: int) -> bytes:
    """Write one byte to a port."""
    return b"\x66\xba" + struct.pack("<H", port) + b"\xb0" + bytes([value]) + b"\xee"


def out32(port: int, value: int) -> bytes:
    """Write four bytes to a port."""
    return b"\x66\xba" + struct.pack("<H", port) + b"\xb8" + struct.pack("<I", value) + b"\xef"


def say(text: str) -> bytes:
    """Write a text to the serial port."""
    return b"".join(out(COM1, byte) for byte in text.encode())


def boot_timer() -> bytes:
    """Stamp the time since the start request."""
    return out(BOOT_TIMER, BOOT_TIMER_MAGIC)


def delay(rounds: int) -> bytes:
    """Count down; on a direct host, where each instruction is interpreted, about 1 us a round."""
    return b"\xb9" + struct.pack("<I", rounds) + b"\xff\xc9\x75\xfc"  # 1: dec ecx; jnz 1b


def forever(body: bytes) -> bytes:
    """Repeat ``body``, at most some 120 bytes of it, without an end."""
    back = -(len(body) + 2)
    return body + b"\xeb" + struct.pack("<b", back)


def echo() -> bytes:
    """Send back what is typed, forever."""
    # 1: mov dx, LSR; in al, dx; test al, 1; jz 1b; mov dx, COM1; in al, dx; out dx, al; jmp 1b
    body = b"\x66\xba\xfd\x03\xec\xa8\x01\x74\xf7\x66\xba\xf8\x03\xec\xee"
    return forever(body)


def elf(
    code: bytes, *, pvh: bool = False, gpa: int = LOAD_GPA, memory_bytes: int | None = None
) -> bytes:
    """Return an ELF64 kernel that is entered at the first byte of ``code``.

    Args:
        code: position-independent.
        pvh: add the note by which it is entered in 32-bit mode.
        gpa: where it is loaded.
        memory_bytes: size in memory, for segments that a test wants to be wild.
    """
    count = 2 if pvh else 1
    note = struct.pack("<III4sI", 4, 4, _XEN_ELFNOTE_PHYS32_ENTRY, b"Xen\0", gpa) if pvh else b""
    note_at = _EHDR_BYTES + count * _PHDR_BYTES
    code_at = note_at + len(note)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        *(ident, 2, 62, 1, gpa, _EHDR_BYTES, 0, 0),
        *(_EHDR_BYTES, _PHDR_BYTES, count, 0, 0, 0),
    )
    size = len(code) if memory_bytes is None else memory_bytes
    headers = struct.pack("<IIQQQQQQ", _PT_LOAD, 5, code_at, gpa, gpa, len(code), size, 1)
    if pvh:
        headers += struct.pack("<IIQQQQQQ", _PT_NOTE, 4, note_at, 0, 0, len(note), len(note), 4)
    return header + headers + note + code


def write_elf(path: Path, code: bytes, **options: bool) -> Path:
    """Write such a kernel to a file and return its path."""
    path.write_bytes(elf(code, **options))
    return path
