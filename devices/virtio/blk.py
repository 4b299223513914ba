# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""virtio-blk: a raw file or block device as a disk. Requests are served in C (blk_engine).

Source: VIRTIO 1.2, 5.2 "Block Device".
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from typing import TYPE_CHECKING, Any, ClassVar, Final

from devices.errors import BackendError
from kvm_ffi.blk_engine import (
    LATENCY_LIMITS_NS,
    MAX_DISCARD_SECTORS,
    MAX_DISCARD_SEGMENTS,
    MAX_QUEUES,
    MAX_REQUEST_BYTES,
    MAX_WRITE_ZEROES_SECTORS,
    MAX_WRITE_ZEROES_SEGMENTS,
    QUEUE_COUNTERS,
    SECTOR_BYTES,
    SERIAL_BYTES,
    BlkEngine,
    BlkQueue,
    IoEngine,
    direct_align_bytes,
    require_io_uring,
)
from kvm_ffi.rate_limiter import UNLIMITED, RateGroup, RateLimit, RateLimiter

from .device import EngineDevice
from .ids import (
    VIRTIO_BLK_F_BLK_SIZE,
    VIRTIO_BLK_F_DISCARD,
    VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
    VIRTIO_ID_BLOCK,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvm_ffi.engine import DataPath

    from .queue import Activation

# _IOR(0x12, 114, size_t) of <linux/fs.h>: the size of a block device in bytes.
BLKGETSIZE64: Final = 0x80081272

QUEUE_SIZE: Final = 256
# A request is a header, its data segments and a status byte, all in one chain.
SEG_MAX: Final = QUEUE_SIZE - 2
# So that no request of a driver that keeps to both passes the engine's MAX_REQUEST_BYTES.
SIZE_MAX_BYTES: Final = MAX_REQUEST_BYTES // QUEUE_SIZE
BLOCK_BYTES: Final = 512

# struct virtio_blk_config of 5.2.4, up to write_zeroes_may_unmap and its padding:
# capacity, size_max, seg_max, geometry (cylinders, heads, sectors), blk_size,
# topology (physical exponent, alignment, min io, optimal io), writeback, unused, num_queues,
# max_discard_sectors, max_discard_seg, discard_sector_alignment,
# max_write_zeroes_sectors, max_write_zeroes_seg, write_zeroes_may_unmap.
_CONFIG: Final = struct.Struct("<QIIHBBIBBHIBxHIIIIIB3x")


def _nobody_listens() -> None:
    pass


def backend_size_bytes(fd: int, path: str) -> int:
    """Return the size of an open regular file or block device.

    Args:
        fd: open for reading.
        path: for the error text only.

    Raises:
        BackendError: it is neither, or the host cannot tell.
    """
    try:
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode):
            return status.st_size
        if stat.S_ISBLK(status.st_mode):
            size: int = struct.unpack("Q", fcntl.ioctl(fd, BLKGETSIZE64, bytes(8)))[0]
            return size
    except OSError as err:
        raise BackendError(path, f"cannot tell its size: {err.strerror}") from err
    raise BackendError(path, "neither a regular file nor a block device")


class VirtioBlk(EngineDevice):
    """A disk.

    Args:
        name: e.g. "blk0"; also the name of the engine's thread.
        disk_fd: open for what the guest may do, with O_DIRECT or without; owned from now on.
        path: for error texts only.
        is_read_only: offer VIRTIO_BLK_F_RO and refuse writes.
        serial: what the guest sees in /sys/block/vda/serial, at most 20 ASCII bytes.
        n_queues: 1 to MAX_QUEUES; a driver uses one for each vCPU, as far as they go.
        io_engine: what carries its operations out.
        limit: of bytes and operations per second.
        group: a limit that it shares with other disks.

    Attributes:
        on_host_error: called when host_errors() has grown; on any thread, must not block. Not for
            each error: see await_host_error().

    Raises:
        BackendError: the descriptor is no file or block device, its size is not one that O_DIRECT
            can write, or io_uring is asked for and not permitted.
        ValueError: the serial is too long.
    """

    DEVICE_ID: ClassVar[int] = VIRTIO_ID_BLOCK
    PCI_CLASS: ClassVar[int] = 0x018000
    FEATURES: ClassVar[int] = (
        VIRTIO_BLK_F_SIZE_MAX | VIRTIO_BLK_F_SEG_MAX | VIRTIO_BLK_F_BLK_SIZE | VIRTIO_BLK_F_FLUSH
    )
    WRITE_FEATURES: ClassVar[int] = VIRTIO_BLK_F_DISCARD | VIRTIO_BLK_F_WRITE_ZEROES

    def __init__(  # noqa: PLR0913 - what a disk can be
        self,
        name: str,
        disk_fd: int,
        *,
        path: str,
        is_read_only: bool = False,
        serial: str = "",
        n_queues: int = 1,
        io_engine: IoEngine = IoEngine.AUTO,
        limit: RateLimit = UNLIMITED,
        group: RateGroup | None = None,
    ) -> None:
        super().__init__(name)
        self._serial = serial.encode("ascii", "replace")
        if len(self._serial) > SERIAL_BYTES:
            raise ValueError(f"serial={serial!r}: must be at most {SERIAL_BYTES} bytes")
        self.QUEUE_SIZES = (QUEUE_SIZE,) * min(n_queues, MAX_QUEUES)
        self._disk_fd = disk_fd
        self._path = path
        self._is_read_only = is_read_only
        self._io_engine = io_engine
        self._limiter = RateLimiter(limit)
        self._group = group
        self._size_sectors, self._align_bytes = _look(disk_fd, path)
        self.on_host_error: Callable[[], None] = _nobody_listens
        self._host_errno = 0
        if io_engine is IoEngine.IO_URING:
            _require_io_uring(path)

    @property
    def features(self) -> int:
        """The bits that this disk offers: a read-only one cannot discard."""
        specific = VIRTIO_BLK_F_RO if self._is_read_only else self.WRITE_FEATURES
        if len(self.QUEUE_SIZES) > 1:
            specific |= VIRTIO_BLK_F_MQ
        if self._align_bytes > SECTOR_BYTES:
            specific |= VIRTIO_BLK_F_TOPOLOGY
        return super().features | specific

    @property
    def size_sectors(self) -> int:
        """The capacity that the guest sees, in sectors of 512 bytes."""
        return self._size_sectors

    def config_space(self) -> bytes:
        """Return struct virtio_blk_config.

        The block size stays 512 whatever the host's disk has, so that a disk keeps its partition
        table when it moves; what the host does best at is told as the physical block.
        """
        physical_exponent = max(0, (self._align_bytes // BLOCK_BYTES).bit_length() - 1)
        return _CONFIG.pack(
            self._size_sectors,
            SIZE_MAX_BYTES,
            SEG_MAX,
            *(0, 0, 0),
            BLOCK_BYTES,
            *(physical_exponent, 0, 0, 0),
            0,
            len(self.QUEUE_SIZES),
            MAX_DISCARD_SECTORS,
            MAX_DISCARD_SEGMENTS,
            1,
            MAX_WRITE_ZEROES_SECTORS,
            MAX_WRITE_ZEROES_SEGMENTS,
            1,
        )

    def make_engines(self, activation: Activation) -> Sequence[DataPath]:
        """Build the one engine of all enabled queues; the first one must be."""
        activation.require(0)
        return [
            BlkEngine(
                activation.memory,
                self._disk_fd,
                size_sectors=self._size_sectors,
                read_only=self._is_read_only,
                serial=self._serial,
                queues=[
                    BlkQueue(enabled.queue, enabled.kick, enabled.irq)
                    for enabled in activation.queues.values()
                ],
                fault=activation.fault,
                is_writethrough=not activation.features & VIRTIO_BLK_F_FLUSH,
                io_engine=self._io_engine,
                limiter=self._limiter,
                group=self._group,
            )
        ]

    def engine_stats(self, engine: DataPath) -> dict[str, int]:
        """Return the block engine's counters; what its file failed last is noted too."""
        assert isinstance(engine, BlkEngine)
        self._host_errno = engine.host_errno or self._host_errno
        return engine.stats()

    def fault_reason(self) -> str | None:
        """Return what breaks the device; what only its file fails is told to `on_host_error`."""
        if self.host_errors()[0] > 0:
            self.on_host_error()
        return super().fault_reason()

    def reset(self) -> None:
        """Stop the engine; the signal of an error that it met last may be lost with it."""
        super().reset()
        if self._totals["host_errors"] > 0:
            self.on_host_error()

    def host_errors(self) -> tuple[int, int]:
        """Return how many requests the disk's file has failed so far, and the last one's errno."""
        with self._lock:
            return self.stats().get("host_errors", 0), self._host_errno

    def await_host_error(self) -> None:
        """Have `on_host_error` called again: it is once, for the first error since this."""
        with self._lock:
            for engine in self._engines:
                assert isinstance(engine, BlkEngine)
                engine.await_host_error()

    def details(self) -> dict[str, Any]:
        """Return `io_engine`, what runs ("auto" while nothing does), and counters of each queue.

        Those are since the driver started the disk: `queues` has the values of `counters` for
        each, so that 256 queues fit a message; `latency` is how many requests took less than the
        limit in the same place of `latency_limits_ns`, and no less than the limit before; the last
        place has no limit.
        """
        with self._lock:
            engines = [engine for engine in self._engines if isinstance(engine, BlkEngine)]
            queues = [queue for engine in engines for queue in engine.queue_stats()]
            return {
                "io_engine": next((engine.io_engine.value for engine in engines), "auto"),
                "counters": list(QUEUE_COUNTERS),
                "queues": [list(queue.values()) for queue in queues],
                "latency_limits_ns": list(LATENCY_LIMITS_NS),
                "latency": [queue for engine in engines for queue in engine.latency()],
            }

    def set_limit(self, limit: RateLimit) -> None:
        """Change the rate limits; what waits for the old ones is looked at again.

        Raises:
            ValueError: a number is out of range.
        """
        self._limiter.set(limit)
        with self._lock:
            for engine in self._engines:
                assert isinstance(engine, BlkEngine)
                engine.wake()

    def refresh_size(self) -> int:
        """Look at the file's size again, tell the driver when it changed; return the sectors.

        Raises:
            BackendError: the host cannot tell the size.
        """
        size_sectors = backend_size_bytes(self._disk_fd, self._path) // SECTOR_BYTES
        with self._lock:
            if size_sectors == self._size_sectors:
                return size_sectors
            self._size_sectors = size_sectors
            for engine in self._engines:
                assert isinstance(engine, BlkEngine)
                engine.set_size(size_sectors)
        self.config_changed()  # takes the transport's lock, so not under ours
        return size_sectors

    def swap(self, disk_fd: int) -> int:
        """Use another file from now on; tell the driver when the size changed; return the sectors.

        Requests under way end on the old file, and what was written there is durable then. What
        the driver was told of the physical block stays: a reset of the machine tells it anew.

        It blocks for as long as the old file takes: whoever asks has it synced before, so that
        storage that hangs is found out elsewhere.

        Args:
            disk_fd: opened as the old one was; owned from now on, unless this fails.

        Raises:
            BackendError: the file cannot be one of this disk.
            OSError: the old file has lost writes, and stays; it is left when asked again.
            TimeoutError: a request takes too long; the old file stays.
        """
        size_sectors, _ = _look(disk_fd, self._path)
        with self._lock:
            try:
                for engine in self._engines:
                    engine.quiesce()
                for engine in self._engines:
                    assert isinstance(engine, BlkEngine)
                    engine.set_file(disk_fd, size_sectors)
            finally:
                self._let_go()
            os.close(self._disk_fd)
            self._disk_fd = disk_fd
            is_new_size = size_sectors != self._size_sectors
            self._size_sectors = size_sectors
        if is_new_size:
            self.config_changed()  # takes the transport's lock, so not under ours
        return size_sectors

    def close(self) -> None:
        """Stop for good and close the disk."""
        super().close()
        os.close(self._disk_fd)


def _look(disk_fd: int, path: str) -> tuple[int, int]:
    """Return the size in sectors, and what O_DIRECT wants it to be a multiple of in bytes.

    Raises:
        BackendError: as VirtioBlk.
    """
    size_sectors = backend_size_bytes(disk_fd, path) // SECTOR_BYTES
    align_bytes = direct_align_bytes(disk_fd)
    if size_sectors * SECTOR_BYTES % align_bytes:
        raise BackendError(
            path,
            f"{size_sectors * SECTOR_BYTES} bytes: with O_DIRECT its size must be a multiple of"
            f" {align_bytes}; grow it, or use the page cache",
        )
    return size_sectors, align_bytes


def _require_io_uring(path: str) -> None:
    try:
        require_io_uring()
    except OSError as err:
        raise BackendError(
            path,
            f"io_engine=io_uring: {err.strerror}; see the sysctl kernel.io_uring_disabled, or use"
            " auto or threads",
        ) from err
