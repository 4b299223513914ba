# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Split virtqueues for devices that serve requests in Python.

The ring is walked in C (csrc/virtqueue.c). An engine takes `Virtqueue.raw` and never
comes back to Python; a slow device (rng, control queues) pops chains here.

Source: VIRTIO 1.2, 2.7 "Split Virtqueues".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ._kvm import ffi, lib
from .errors import BadDescriptorChain

if TYPE_CHECKING:
    from ._kvm import CData
    from .memory import GuestMemory
    from .types import Gpa

MAX_QUEUE_SIZE: Final = lib.VIRTQUEUE_MAX_SIZE
VIRTIO_F_INDIRECT_DESC: Final[int] = 1 << lib.VIRTIO_RING_F_INDIRECT_DESC
VIRTIO_F_EVENT_IDX: Final[int] = 1 << lib.VIRTIO_RING_F_EVENT_IDX


@dataclass(frozen=True, slots=True)
class VirtqueueState:
    """Where the device stands in the rings: what a snapshot keeps of a virtqueue."""

    next_avail: int
    next_used: int


class DescriptorChain:
    """One request: buffers that the driver filled, then buffers that the device fills.

    Reads and writes each go on where the last one ended. The bounds were checked when the
    chain was popped; the bytes belong to the guest and may change at any time, so read a
    header once, then validate it, then use it.
    """

    __slots__ = (
        "_iov", "_memory", "_n_readable", "_n_writable", "_read_offset", "_write_offset",
        "head", "readable_len", "writable_len",
    )  # fmt: skip

    def __init__(self, memory: GuestMemory, popped: CData) -> None:
        self.head: int = popped.head
        self.readable_len: int = popped.readable_len
        self.writable_len: int = popped.writable_len
        self._memory = memory  # keeps what the iovecs point into mapped
        self._n_readable: int = popped.n_readable
        self._n_writable: int = popped.n_writable
        self._read_offset = 0
        self._write_offset = 0
        count = self._n_readable + self._n_writable
        self._iov: CData = ffi.new("struct iovec[]", max(count, 1))
        ffi.memmove(self._iov, popped.iov, count * ffi.sizeof("struct iovec"))

    def read(self, size: int) -> bytes:
        """Copy the next bytes of the readable part; fewer at its end.

        Args:
            size: bytes wanted. readable_len is guest-controlled (up to 4 GiB: descriptors may
                overlap), so bound this by what the request may hold.
        """
        size = min(size, self.readable_len - self._read_offset)
        buffer = bytearray(size)
        done = lib.iov_copy_out(
            self._iov, self._n_readable, self._read_offset, ffi.from_buffer(buffer), size
        )
        self._read_offset += done
        return bytes(buffer[:done])

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Copy data to the next bytes of the writable part.

        Returns:
            Bytes written; fewer than given when the part is full.
        """
        done = lib.iov_copy_in(
            self._iov + self._n_readable,
            self._n_writable,
            self._write_offset,
            ffi.from_buffer(data),
            len(data),
        )
        self._write_offset += done
        return done


class Virtqueue:
    """A virtqueue that the driver has enabled, seen from the device.

    Args:
        memory: the guest's RAM; must stay open as long as the queue is used.
        queue_index: which queue of its device, from 0.
        size: entries, a power of two up to MAX_QUEUE_SIZE; guest-controlled.
        desc_gpa: descriptor table; guest-controlled, as are the next two.
        avail_gpa: driver area.
        used_gpa: device area.
        features: all negotiated feature bits of the device.

    Raises:
        BadDescriptorChain: a size, an alignment or an address that the specification forbids.

    Threads: one at a time. While an engine runs on `raw`, nobody else touches the queue.
    """

    def __init__(  # noqa: PLR0913 - the registers of a queue, one parameter each
        self,
        memory: GuestMemory,
        queue_index: int,
        size: int,
        desc_gpa: Gpa,
        avail_gpa: Gpa,
        used_gpa: Gpa,
        features: int,
    ) -> None:
        where = f"queue {queue_index}: size={size} desc={desc_gpa:#x} avail={avail_gpa:#x}"
        where += f" used={used_gpa:#x}"
        if not 0 < size <= MAX_QUEUE_SIZE:
            raise BadDescriptorChain(f"{where}: size must be 1..{MAX_QUEUE_SIZE}")
        if not all(0 <= gpa < 1 << 64 for gpa in (desc_gpa, avail_gpa, used_gpa)):
            raise BadDescriptorChain(f"{where}: address must be 64 bits")
        self.index = queue_index
        self.size = size
        self.memory = memory
        self.desc_gpa, self.avail_gpa, self.used_gpa = desc_gpa, avail_gpa, used_gpa
        self._vq: CData = ffi.new("struct virtqueue *")
        ret = lib.virtqueue_init(
            self._vq, memory.raw, size, desc_gpa, avail_gpa, used_gpa, features
        )
        if ret < 0:
            raise BadDescriptorChain(f"{where}: bad size, alignment or address")
        self._iov: CData = ffi.new("struct iovec[]", size)
        self._chain: CData = ffi.new("struct desc_chain *")
        self._chain.iov = self._iov
        self._chain.max_iov = size

    @property
    def raw(self) -> CData:
        """The `struct virtqueue *` that an engine takes; this object owns it."""
        return self._vq

    @property
    def is_broken(self) -> bool:
        """Whether the driver broke the ring protocol; only a device reset helps."""
        return bool(self._vq.is_broken)

    def pop(self) -> DescriptorChain | None:
        """Take the next available chain, or None.

        Raises:
            BadDescriptorChain: the ring or the chain is malformed; so will every later pop be.
        """
        got = lib.virtqueue_pop(self._vq, self._chain)
        if got < 0:
            raise BadDescriptorChain(
                f"queue {self.index}: malformed ring or chain at avail {self._vq.next_avail}"
            )
        return DescriptorChain(self.memory, self._chain) if got else None

    def add_used(self, chain: DescriptorChain, written: int) -> None:
        """Stage a used element; the driver sees it at publish().

        Args:
            chain: one that pop() gave and that was not added yet.
            written: bytes of the writable part that were filled, from its start.
        """
        if not 0 <= written <= chain.writable_len:
            raise ValueError(f"written={written}: must be 0..{chain.writable_len}")
        lib.virtqueue_add_used(self._vq, chain.head, written)

    def publish(self) -> bool:
        """Show all staged elements to the driver; whether it wants an interrupt."""
        return lib.virtqueue_publish(self._vq) == 1

    def enable_kick(self) -> bool:
        """Ask for a kick at the next chain; whether one came meanwhile, so pop again."""
        return lib.virtqueue_enable_kick(self._vq) == 1

    def disable_kick(self) -> None:
        """Tell the driver that kicks are not needed for now (a hint)."""
        lib.virtqueue_disable_kick(self._vq)

    @property
    def state(self) -> VirtqueueState:
        """The position in the rings; meaningful when nothing is staged or in flight."""
        return VirtqueueState(self._vq.next_avail, self._vq.next_used)

    def restore(self, state: VirtqueueState) -> None:
        """Go on where another virtqueue over the same rings stopped.

        Raises:
            ValueError: no run of a queue of this size leads to that state.
        """
        if not all(0 <= index < 1 << 16 for index in (state.next_avail, state.next_used)):
            raise ValueError(f"{state}: indices are 16 bits")
        if lib.virtqueue_set_state(self._vq, state.next_avail, state.next_used) < 0:
            raise ValueError(f"{state}: more than {self.size} chains in flight")
