# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""virtio-blk requests served in C, on a raw file or block device.

Source: VIRTIO 1.2, 5.2.6 "Device Operation". The C side is csrc/blk_engine.c.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ._kvm import ffi, lib
from .engine import Engine, EngineFault, check, counters

if TYPE_CHECKING:
    from ._kvm import CData
    from .memory import GuestMemory
    from .rate_limiter import RateGroup, RateLimiter
    from .types import SupportsFd
    from .virtqueue import Virtqueue

SECTOR_BYTES: Final = lib.BLK_SECTOR_BYTES
SERIAL_BYTES: Final = lib.BLK_SERIAL_BYTES
MAX_SECTORS: Final = lib.BLK_MAX_SECTORS
MAX_REQUEST_BYTES: Final = lib.BLK_MAX_REQUEST_BYTES
MAX_QUEUES: Final = lib.BLK_MAX_QUEUES
# What the config space must advertise; the engine answers IOERR beyond.
MAX_DISCARD_SEGMENTS: Final = lib.BLK_MAX_DISCARD_SEGMENTS
MAX_DISCARD_SECTORS: Final = lib.BLK_MAX_DISCARD_SECTORS
MAX_WRITE_ZEROES_SEGMENTS: Final = lib.BLK_MAX_WRITE_ZEROES_SEGMENTS
MAX_WRITE_ZEROES_SECTORS: Final = lib.BLK_MAX_WRITE_ZEROES_SECTORS

LATENCY_LIMITS_NS: Final = tuple(
    1 << (lib.BLK_LATENCY_SHIFT + bucket) for bucket in range(lib.BLK_LATENCY_BUCKETS - 1)
)
"""What the requests of each bucket of a latency histogram took less than; the last has no limit."""

QUEUE_COUNTERS: Final = (
    "reads", "writes", "flushes", "discards", "write_zeroes", "get_ids", "read_bytes",
    "write_bytes", "errors", "unsupported", "host_errors", "kicks", "interrupts", "suppressed",
    "throttled", "in_flight",
)  # fmt: skip


class IoEngine(enum.Enum):
    """What carries a disk's operations out."""

    AUTO = "auto"
    """io_uring where the host permits it, else threads."""
    IO_URING = "io_uring"
    """Many operations at a time, by the kernel."""
    THREADS = "threads"
    """One at a time, by the disk's thread itself."""


_IO_ENGINE: Final = {
    IoEngine.AUTO: lib.BLK_IO_AUTO,
    IoEngine.IO_URING: lib.BLK_IO_URING,
    IoEngine.THREADS: lib.BLK_IO_THREADS,
}
_IO_ENGINE_OF: Final = {number: engine for engine, number in _IO_ENGINE.items()}


@dataclass(frozen=True, slots=True)
class BlkQueue:
    """A request queue and its wires.

    Attributes:
        queue: the engine alone uses it while it runs.
        kick: signalled by the guest.
        irq: signalled for the guest, or None when it polls.
    """

    queue: Virtqueue
    kick: SupportsFd
    irq: SupportsFd | None


class BlkEngine(Engine):
    """Serves IN, OUT, FLUSH, GET_ID, DISCARD and WRITE_ZEROES of all request queues of a disk.

    Data moves between the file and guest memory without a copy in between, except where O_DIRECT
    asks for an alignment that the guest's buffers do not have. What the host's file refuses (EIO,
    ENOSPC, an early end) is IOERR for that request alone, and counted; the VM goes on.

    Args:
        memory: the guest's RAM; must stay open until close().
        disk_fd: open for what the guest may do; stays the caller's. With O_DIRECT or without.
        size_sectors: capacity in 512-byte sectors, up to MAX_SECTORS.
        read_only: whether VIRTIO_BLK_F_RO was offered; writes are IOERR then.
        serial: answer to GET_ID, up to 20 bytes, padded with zeros.
        queues: up to MAX_QUEUES; `counters` has them in this order.
        fault: signalled once when a ring breaks; run() returns False then. Also for the first
            request that the host's file fails, and see await_host_error().
        is_writethrough: the driver did not negotiate FLUSH, so every write is made durable
            before it is answered (VIRTIO 1.2, 5.2.6.2).
        io_engine: IO_URING makes run() raise OSError where it is not permitted.
        limiter: shared by all queues; wake() the engine after changing it.
        group: what other disks share too; a request needs room in both.

    Raises:
        ValueError: size_sectors or serial is too large.
    """

    def __init__(  # noqa: PLR0913 - one keyword per wire
        self,
        memory: GuestMemory,
        disk_fd: int,
        *,
        size_sectors: int,
        read_only: bool,
        serial: bytes,
        queues: Sequence[BlkQueue],
        fault: SupportsFd,
        is_writethrough: bool = False,
        io_engine: IoEngine = IoEngine.AUTO,
        limiter: RateLimiter | None = None,
        group: RateGroup | None = None,
    ) -> None:
        _check_size(size_sectors)
        if len(serial) > SERIAL_BYTES:
            raise ValueError(f"serial {serial!r}: must be at most {SERIAL_BYTES} bytes")
        config = ffi.new("struct blk_config *")
        config.size_sectors = size_sectors
        config.disk_fd = disk_fd
        config.fault_fd = fault.fd
        config.is_read_only = read_only
        config.is_writethrough = is_writethrough
        config.io_engine = _IO_ENGINE[io_engine]
        config.limiter = ffi.NULL if limiter is None else limiter.raw
        config.group = ffi.NULL if group is None else group.raw
        ffi.memmove(config.serial, serial, len(serial))
        config.n_queues = len(queues)
        for each, wires in zip(queues, config.queues, strict=False):
            wires.vq = each.queue.raw
            wires.kick_fd = each.kick.fd
            wires.irq_fd = -1 if each.irq is None else each.irq.fd
        created = ffi.new("struct blk_engine **")
        check(lib.blk_engine_create(config, created))
        self._n_queues = len(queues)
        keepalive = (memory, queues, fault, limiter, group)
        super().__init__(created[0], lib.blk_engine_destroy, keepalive)

    def _run(self) -> int:
        return lib.blk_engine_run(self._c)

    def _gate(self) -> CData:
        return lib.blk_engine_gate(self._c)

    @property
    def fault(self) -> EngineFault:
        """Why the fault EventFd was signalled: RING, or NONE."""
        return EngineFault(lib.blk_engine_fault(self._c))

    @property
    def io_engine(self) -> IoEngine:
        """What runs: IO_URING or THREADS; AUTO until run() has begun."""
        return _IO_ENGINE_OF[lib.blk_engine_io(self._c)]

    def set_size(self, size_sectors: int) -> None:
        """Change the capacity; requests that start later see it. The device tells the driver.

        Raises:
            ValueError: size_sectors is not 0..MAX_SECTORS.
        """
        _check_size(size_sectors)
        check(lib.blk_engine_set_size(self._c, size_sectors))

    def set_file(self, disk_fd: int, size_sectors: int) -> None:
        """Make the file durable and use another one, of another size; the engine must be quiesced.

        Args:
            disk_fd: as in the constructor.
            size_sectors: likewise.

        Raises:
            ValueError: size_sectors is not 0..MAX_SECTORS.
            OSError: EBUSY, the engine is not held still; why the file cannot be used; or why the
                old one lost writes. That one stays. It is told once: asked again, a file that has
                lost writes is left as it is.
        """
        _check_size(size_sectors)
        check(lib.blk_engine_set_file(self._c, disk_fd, size_sectors))

    @property
    def host_errno(self) -> int:
        """Why the host's file failed the last request that it did; 0 when it never did."""
        return lib.blk_engine_host_errno(self._c)

    def await_host_error(self) -> None:
        """Signal the fault EventFd once more for the next request that the host's file fails."""
        lib.blk_engine_await_error(self._c)

    @property
    def syncs(self) -> int:
        """How often the file was synced."""
        return lib.blk_engine_syncs(self._c)

    def queue_stats(self) -> list[dict[str, int]]:
        """Counters of each queue since the start.

        `errors` were answered IOERR, `host_errors` of them were the host file's fault,
        `unsupported` were answered UNSUPP. `suppressed` are batches of completions that the driver
        wanted no interrupt for, `throttled` how often a request had to wait for a limit,
        `in_flight` how many requests there are now. Each value is exact; two values may be a
        request apart.
        """
        return [
            counters(self._queue_stats(index), QUEUE_COUNTERS) for index in range(self._n_queues)
        ]

    def latency(self) -> list[list[int]]:
        """How many requests of each queue fell into each bucket of LATENCY_LIMITS_NS.

        Counted from when a request was taken from its ring until it was answered.
        """
        return [list(self._queue_stats(index).latency) for index in range(self._n_queues)]

    def _queue_stats(self, index: int) -> CData:
        stats = ffi.new("struct blk_queue_stats *")
        lib.blk_engine_queue_stats(self._c, index, stats)
        return stats

    def stats(self) -> dict[str, int]:
        """Counters of all queues together, and `syncs`."""
        totals = dict.fromkeys(QUEUE_COUNTERS, 0)
        for one in self.queue_stats():
            for name, count in one.items():
                totals[name] += count
        return totals | {"syncs": self.syncs}


def require_io_uring() -> None:
    """Make sure that this process may use io_uring.

    Raises:
        OSError: it may not: EPERM (the sysctl kernel.io_uring_disabled, or a filter of system
            calls), ENOSYS, or EOPNOTSUPP (older than Linux 5.13).
    """
    check(lib.blk_io_uring_probe())


def direct_align_bytes(fd: int) -> int:
    """What offsets and lengths of a file must be multiples of: 1 unless it was opened O_DIRECT.

    Raises:
        OSError: the descriptor is not open.
    """
    file = ffi.new("struct blk_file *")
    check(lib.blk_file_init(file, fd))
    return int(file.offset_align)


def _check_size(size_sectors: int) -> None:
    if not 0 <= size_sectors <= MAX_SECTORS:
        raise ValueError(f"size_sectors={size_sectors}: must be 0..{MAX_SECTORS}")
