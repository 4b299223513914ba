# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""virtio-blk requests served in C, on a raw file or block device.

Source: VIRTIO 1.2, 5.2.6 "Device Operation". The C side is csrc/blk_engine.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ._kvm import ffi, lib
from .engine import Engine, EngineFault, check, counters

if TYPE_CHECKING:
    from ._kvm import CData
    from .memory import GuestMemory
    from .types import SupportsFd
    from .virtqueue import Virtqueue

SECTOR_BYTES: Final = lib.BLK_SECTOR_BYTES
SERIAL_BYTES: Final = lib.BLK_SERIAL_BYTES
MAX_SECTORS: Final = lib.BLK_MAX_SECTORS
MAX_REQUEST_BYTES: Final = lib.BLK_MAX_REQUEST_BYTES
# What the config space must advertise; the engine answers IOERR beyond.
MAX_DISCARD_SEGMENTS: Final = lib.BLK_MAX_DISCARD_SEGMENTS
MAX_DISCARD_SECTORS: Final = lib.BLK_MAX_DISCARD_SECTORS
MAX_WRITE_ZEROES_SEGMENTS: Final = lib.BLK_MAX_WRITE_ZEROES_SEGMENTS
MAX_WRITE_ZEROES_SECTORS: Final = lib.BLK_MAX_WRITE_ZEROES_SECTORS

_COUNTERS: Final = (
    "reads", "writes", "flushes", "discards", "write_zeroes", "get_ids", "read_bytes",
    "write_bytes", "errors", "unsupported", "host_errors", "syncs", "kicks", "interrupts",
)  # fmt: skip


class BlkEngine(Engine):
    """Serves IN, OUT, FLUSH, GET_ID, DISCARD and WRITE_ZEROES of one request queue.

    Data moves by preadv/pwritev between the file and guest memory, one request at a time. What
    the host's file refuses (EIO, ENOSPC, an early end) is IOERR for the guest and counted; the VM
    goes on.

    Args:
        memory: the guest's RAM; must stay open until close().
        disk_fd: open for what the guest may do; stays the caller's.
        size_sectors: capacity in 512-byte sectors, up to MAX_SECTORS.
        read_only: whether VIRTIO_BLK_F_RO was offered; writes are IOERR then.
        serial: answer to GET_ID, up to 20 bytes, padded with zeros.
        queue: the request queue; the engine alone uses it while it runs.
        kick: signalled by the guest.
        irq: signalled for the guest, or None when it polls.
        fault: signalled once when the ring breaks; run() returns False then.
        is_writethrough: the driver did not negotiate FLUSH, so every write is made durable
            before it is answered (VIRTIO 1.2, 5.2.6.2).

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
        queue: Virtqueue,
        kick: SupportsFd,
        irq: SupportsFd | None,
        fault: SupportsFd,
        is_writethrough: bool = False,
    ) -> None:
        _check_size(size_sectors)
        if len(serial) > SERIAL_BYTES:
            raise ValueError(f"serial {serial!r}: must be at most {SERIAL_BYTES} bytes")
        config = ffi.new("struct blk_config *")
        config.vq = queue.raw
        config.size_sectors = size_sectors
        config.disk_fd = disk_fd
        config.kick_fd = kick.fd
        config.irq_fd = -1 if irq is None else irq.fd
        config.fault_fd = fault.fd
        config.is_read_only = read_only
        config.is_writethrough = is_writethrough
        ffi.memmove(config.serial, serial, len(serial))
        created = ffi.new("struct blk_engine **")
        check(lib.blk_engine_create(config, created))
        super().__init__(created[0], lib.blk_engine_destroy, (memory, queue, kick, irq, fault))

    def _run(self) -> int:
        return lib.blk_engine_run(self._c)

    def _gate(self) -> CData:
        return lib.blk_engine_gate(self._c)

    @property
    def fault(self) -> EngineFault:
        """Why the fault EventFd was signalled: RING, or NONE."""
        return EngineFault(lib.blk_engine_fault(self._c))

    def set_size(self, size_sectors: int) -> None:
        """Change the capacity; requests that start later see it. The device tells the driver.

        Raises:
            ValueError: size_sectors is not 0..MAX_SECTORS.
        """
        _check_size(size_sectors)
        check(lib.blk_engine_set_size(self._c, size_sectors))

    def stats(self) -> dict[str, int]:
        """Counts since the start: requests by type, read_bytes, write_bytes, kicks, interrupts.

        `errors` were answered IOERR, `host_errors` of them were the host file's fault,
        `unsupported` were answered UNSUPP, `syncs` are fdatasync calls. Each value is exact; two
        values may be a request apart.
        """
        stats = ffi.new("struct blk_stats *")
        lib.blk_engine_stats(self._c, stats)
        return counters(stats, _COUNTERS)


def _check_size(size_sectors: int) -> None:
    if not 0 <= size_sectors <= MAX_SECTORS:
        raise ValueError(f"size_sectors={size_sectors}: must be 0..{MAX_SECTORS}")
