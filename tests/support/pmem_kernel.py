# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A guest that writes to persistent memory, as a kernel and then from user mode.

A direct host's KVM emulates a kernel, and takes its write to memory that it cannot get as one to no
device. User mode runs natively there. Elsewhere the first write of the kernel tells already, and an
AMD processor has no sysexit in long mode; so both are done.
"""

from __future__ import annotations

import struct

from tests.support import tiny_kernel as tiny

PMEM_GPA = 4 << 30  # daemon/worker/layout.py: above RAM, at a whole GiB
# The page tables that the worker makes: level 4, level 3, and that of the first GiB.
LEVEL_4, LEVEL_3, LEVEL_2 = 0x9000, 0xA000, 0xB000
OWN_TABLE = 0x30_0000
PAGE_BYTES = 4096
PAGES = 512
_USER = 4
_PRESENT_WRITABLE_USER = 7
_LARGE = 0x80
_SYSENTER_CS = 0x174


def _load(register: bytes, value: int) -> bytes:
    """Mov register, value; of 64 bits."""
    return register + struct.pack("<Q", value)


_RAX, _RCX, _RDX, _RDI = b"\x48\xb8", b"\x48\xb9", b"\x48\xba", b"\x48\xbf"


def write_all() -> bytes:
    """Write to one page of the first 2 MiB after the other, twice; then a triple fault."""
    code = b""
    for entry in (LEVEL_4, LEVEL_3, LEVEL_2):
        code += _load(_RAX, entry) + b"\x80\x08" + bytes([_USER])  # or byte [rax], _USER
    for entry, value in (
        (LEVEL_3 + 8 * (PMEM_GPA >> 30), OWN_TABLE | _PRESENT_WRITABLE_USER),
        (OWN_TABLE, PMEM_GPA | _LARGE | _PRESENT_WRITABLE_USER),
    ):
        code += _load(_RAX, entry) + _load(_RCX, value) + b"\x48\x89\x08"  # mov [rax], rcx
    code += b"\x0f\x20\xd8\x0f\x22\xd8"  # mov rax, cr3; mov cr3, rax
    # mov byte [rdi], 1; add rdi, PAGE_BYTES
    write = b"\xc6\x07\x01\x48\x81\xc7" + struct.pack("<i", PAGE_BYTES)
    # mov ecx, PAGES; 1: (write); dec ecx; jnz 1b
    code += _load(_RDI, PMEM_GPA) + b"\xb9" + struct.pack("<I", PAGES)
    code += write + b"\xff\xc9\x75" + struct.pack("<b", -len(write) - 4)
    # mov ecx, _SYSENTER_CS; mov eax, 16; xor edx, edx; wrmsr
    code += b"\xb9" + struct.pack("<I", _SYSENTER_CS) + b"\xb8\x10\x00\x00\x00\x31\xd2\x0f\x30"
    leave = _load(_RCX, 0) + b"\x48\x0f\x35"  # without a stack: sysexit
    user = tiny.LOAD_GPA + len(code) + len(_load(_RDX, 0)) + len(leave)
    code += _load(_RDX, user) + leave
    return code + _load(_RDI, PMEM_GPA) + tiny.forever(write)
