# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Guest RAM: one memfd, mapped as a few regions.

The regions lie one after the other in the file, in the order of their addresses,
so a second process that gets the fd (vhost-user) maps the same layout. The C core
holds a `struct guest_mem` that is written here once and only read afterwards.

Source: Linux Documentation/virt/kvm/api.rst 4.35 KVM_SET_USER_MEMORY_REGION; memfd_create(2).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from ._kvm import ffi, lib
from .errors import BadGuestAddress
from .types import Gpa, Hva

if TYPE_CHECKING:
    from types import TracebackType

    from ._kvm import CData

MAX_REGIONS: Final = lib.GUEST_MEM_MAX_REGIONS
_GPA_LIMIT: Final = 1 << 52  # the widest guest-physical address of x86-64


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """One contiguous range of guest memory; backs one memslot.

    Attributes:
        fd: the file that it is, from ``file_offset`` on.
    """

    gpa: Gpa
    size_bytes: int
    hva: Hva
    file_offset: int
    fd: int


class GuestMemory:
    """The RAM of one VM, shared with its vCPUs.

    Args:
        regions: (gpa, size in bytes) pairs, page aligned, not overlapping, at most MAX_REGIONS.
        memfd: an open memfd at least as large as all regions; None creates one. This object
            closes it once the constructor has returned.

    Raises:
        ValueError: the layout or the memfd does not fit these rules.
        OSError: the host has no memory or address space left.

    Threads: the layout never changes, so every method but load_fd may be called from any thread;
    bytes that a vCPU writes meanwhile may be read torn. close() comes after every engine and vCPU.
    """

    def __init__(self, regions: Sequence[tuple[Gpa, int]], *, memfd: int | None = None) -> None:
        layout = _checked_layout(regions)
        self.size_bytes = sum(size for _, size in layout)
        self.fd = _create_memfd(self.size_bytes) if memfd is None else memfd
        self._mem: CData = ffi.new("struct guest_mem *")
        try:
            _seal(self.fd, self.size_bytes)
            self.regions = self._map(layout)
        except BaseException:
            lib.guest_mem_unmap_all(self._mem)
            if memfd is None:
                os.close(self.fd)
            raise

    def _map(self, layout: list[tuple[Gpa, int]]) -> tuple[MemoryRegion, ...]:
        mapped = []
        file_offset = 0
        for index, (gpa, size) in enumerate(layout):
            _check(lib.guest_mem_map(self._mem, self.fd, file_offset, gpa, size))
            hva = Hva(int(ffi.cast("uintptr_t", self._mem.regions[index].hva)))
            mapped.append(MemoryRegion(gpa, size, hva, file_offset, self.fd))
            file_offset += size
        return tuple(mapped)

    def add_file(self, gpa: Gpa, size_bytes: int, fd: int) -> None:
        """Make a file a region as well; before any vCPU or engine runs.

        Args:
            gpa: behind every other region.
            size_bytes: whole pages. Should the file shrink below that, whoever touches it, this
                process included, gets SIGBUS.
            fd: open for reading and writing; stays the caller's, open as long as this.

        Raises:
            ValueError: the layout does not fit the rules for regions.
            OSError: it cannot be mapped.
        """
        present = ((region.gpa, region.size_bytes) for region in self.regions)
        _checked_layout([*present, (gpa, size_bytes)])
        _check(lib.guest_mem_map(self._mem, fd, 0, gpa, size_bytes))
        hva = Hva(int(ffi.cast("uintptr_t", self._mem.regions[len(self.regions)].hva)))
        self.regions = (*self.regions, MemoryRegion(gpa, size_bytes, hva, 0, fd))

    @property
    def raw(self) -> CData:
        """The `struct guest_mem *` that C takes; valid until close()."""
        return self._mem

    def read(self, gpa: Gpa, length: int) -> bytes:
        """Copy bytes out of guest memory.

        Args:
            gpa: first byte; guest-controlled at will.
            length: bytes; the caller bounds it, since that much is allocated.

        Raises:
            BadGuestAddress: the range is not inside one region.
        """
        self._require(gpa, length)
        buffer = bytearray(length)
        if lib.guest_mem_read(self._mem, gpa, ffi.from_buffer(buffer), length) < 0:
            raise BadGuestAddress(gpa, length)
        return bytes(buffer)

    def write(self, gpa: Gpa, data: bytes | bytearray | memoryview) -> None:
        """Copy bytes into guest memory.

        Raises:
            BadGuestAddress: the range is not inside one region.
        """
        length = len(data)
        self._require(gpa, length)
        if lib.guest_mem_write(self._mem, gpa, ffi.from_buffer(data), length) < 0:
            raise BadGuestAddress(gpa, length)

    def zero(self, gpa: Gpa, length: int) -> None:
        """Zero a range; whole pages of a large one go back to the host.

        Raises:
            BadGuestAddress: the range is not inside one region.
        """
        self._require(gpa, length)
        _check(lib.guest_mem_zero(self._mem, gpa, length))

    def load_fd(self, gpa: Gpa, fd: int, file_offset: int, length: int) -> None:
        """Copy part of a file into guest memory, inside the kernel and without the GIL.

        It goes into the memfd, not through the mapping: that would fault on each page of it,
        and takes twice as long.

        Raises:
            BadGuestAddress: the range is not inside one region.
            OSError: ENODATA when the file ends early, or what sendfile(2) said.

        Threads: one at a time; the memfd's file position is in use.
        """
        self._require(gpa, length)
        if not 0 <= file_offset < 1 << 63:
            raise ValueError(f"file_offset={file_offset}: must be 0..2**63-1")
        region = next(r for r in self.regions if r.gpa <= gpa < r.gpa + r.size_bytes)
        os.lseek(region.fd, region.file_offset + gpa - region.gpa, os.SEEK_SET)
        while length:
            copied = os.sendfile(region.fd, fd, file_offset, length)
            if copied == 0:
                raise OSError(errno.ENODATA, f"the file ends {length} bytes early")
            file_offset += copied
            length -= copied

    def _require(self, gpa: int, length: int) -> None:
        """Refuse what does not even fit C's unsigned types, then what is not RAM."""
        if not (0 <= gpa < 1 << 64 and 0 <= length < 1 << 64):
            raise BadGuestAddress(gpa, length)
        if lib.guest_mem_ptr(self._mem, gpa, length) == ffi.NULL:
            raise BadGuestAddress(gpa, length)

    def close(self) -> None:
        """Unmap everything and close the memfd; later accesses raise BadGuestAddress."""
        lib.guest_mem_unmap_all(self._mem)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class ReadOnlyMapping:
    """A file that a guest may read and nobody may write; no part of guest memory for C.

    Raises:
        OSError, ValueError: it cannot be mapped.
    """

    def __init__(self, fd: int, size_bytes: int) -> None:
        self._map = mmap.mmap(fd, size_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        self._bytes: CData = ffi.from_buffer(self._map)
        self.hva = Hva(int(ffi.cast("uintptr_t", self._bytes)))

    def close(self) -> None:
        """Unmap it."""
        ffi.release(self._bytes)
        self._map.close()


def _checked_layout(regions: Sequence[tuple[Gpa, int]]) -> list[tuple[Gpa, int]]:
    layout = sorted(regions)
    if not 1 <= len(layout) <= MAX_REGIONS:
        raise ValueError(f"{len(layout)} memory regions: must be 1..{MAX_REGIONS}")
    end = 0
    for gpa, size in layout:
        if gpa % mmap.PAGESIZE or size % mmap.PAGESIZE or size <= 0:
            raise ValueError(f"region gpa={gpa:#x} size={size:#x}: must be whole pages")
        if gpa < end:
            raise ValueError(f"region gpa={gpa:#x} overlaps the one that ends at {end:#x}")
        end = gpa + size
    if end > _GPA_LIMIT:
        raise ValueError(f"regions end at {end:#x}: must be at most {_GPA_LIMIT:#x}")
    return layout


def _create_memfd(size_bytes: int) -> int:
    fd = os.memfd_create("hostel-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size_bytes)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _seal(fd: int, size_bytes: int) -> None:
    """Make sure the file holds all regions and never shrinks: that would be SIGBUS in C."""
    # A file system's own file (a hugetlb mount, a snapshot) has no seals; its owner is the
    # daemon, not the guest, so going on is safe.
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    have = os.fstat(fd).st_size
    if have < size_bytes:
        raise ValueError(f"memfd holds {have} bytes: must be at least {size_bytes}")


def _check(ret: int) -> None:
    if ret < 0:
        raise OSError(-ret, os.strerror(-ret))
