# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""ioctl by UAPI name, with failures as KvmError."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._kvm import ffi, lib
from .errors import CapabilityMissing, KvmError

if TYPE_CHECKING:
    from ._kvm import CData


def check(request: str, ret: int) -> int:
    """Pass on what a C function of ours returned.

    Raises:
        KvmError: it returned -errno.
    """
    if ret < 0:
        raise KvmError(request, -ret)
    return ret


def _number(request: str) -> int:
    number: int = getattr(lib, request)
    if number == 0:  # csrc/compat.h: the headers of the build do not have it
        raise CapabilityMissing(request)
    return number


def ioctl_int(fd: int, request: str, arg: int = 0) -> int:
    """An ioctl whose argument is a number.

    Raises:
        KvmError: the kernel refused; ``request`` names what.
        CapabilityMissing: the headers of the build lack the ioctl.
    """
    return check(request, lib.kvm_ioctl_int(fd, _number(request), arg))


def ioctl_ptr(fd: int, request: str, arg: CData) -> int:
    """An ioctl whose argument is a pointer to a UAPI struct, which it may fill in.

    Raises:
        KvmError: the kernel refused; ``request`` names what.
        CapabilityMissing: the headers of the build lack the ioctl.
    """
    return check(request, lib.kvm_ioctl_ptr(fd, _number(request), arg))


def get_blob(fd: int, request: str, c_type: str) -> bytes:
    """Read a UAPI struct that nobody here looks into, as bytes."""
    state = ffi.new(f"{c_type} *")
    ioctl_ptr(fd, request, state)
    return bytes(ffi.buffer(state))


def set_blob(fd: int, request: str, c_type: str, blob: bytes) -> None:
    """Write back what get_blob() returned.

    Raises:
        ValueError: it has another length than the struct.
    """
    state = ffi.new(f"{c_type} *")
    buffer = ffi.buffer(state)
    if len(blob) != len(buffer):
        raise ValueError(f"{request}: {len(blob)} bytes, must be {len(buffer)}")
    buffer[:] = blob
    ioctl_ptr(fd, request, state)


def new_array(header_type: str, entry_type: str, count: int) -> tuple[CData, CData, CData]:
    """Allocate a UAPI struct that ends in a flexible array.

    Returns:
        The memory (keep it while the others are in use), the header, the first entry.
    """
    header_size = ffi.sizeof(header_type)
    memory = ffi.new("uint8_t[]", header_size + count * ffi.sizeof(entry_type))
    header = ffi.cast(f"{header_type} *", memory)
    entries = ffi.cast(f"{entry_type} *", memory + header_size)
    return memory, header, entries
