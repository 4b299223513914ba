# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The common configuration structure: device status, features and queue registers.

A register file with the driver's initialisation sequence enforced; it knows neither PCI nor any
device. What a driver may not do is a BadRegisterAccess and changes nothing.

Source: VIRTIO 1.2, 4.1.4.3 "Common configuration structure layout" and 3.1.1.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from devices.errors import BadRegisterAccess

from .ids import (
    NO_VECTOR,
    STATUS_ACKNOWLEDGE,
    STATUS_DRIVER,
    STATUS_DRIVER_OK,
    STATUS_FAILED,
    STATUS_FEATURES_OK,
    STATUS_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
)

# struct virtio_pci_common_cfg up to queue_used: what comes after belongs to features that are
# not offered.
_LAYOUT: Final = struct.Struct("<IIIIHHBBHHHHHQQQ")
COMMON_CONFIG_LENGTH: Final = _LAYOUT.size

_U32: Final = 0xFFFFFFFF


class StatusOwner(Protocol):
    """Who acts on the driver's status writes: the transport."""

    def accepts(self, features: int) -> bool:
        """Whether the device can work with these bits, all of them offered."""
        ...

    def driver_ok(self) -> None:
        """Start the device."""
        ...

    def device_reset(self) -> None:
        """Stop the device; the registers are reset afterwards."""
        ...


@dataclass
class QueueRegisters:
    """What the driver told about one virtqueue; all of it is guest-controlled."""

    max_size: int
    size: int = 0
    vector: int = NO_VECTOR
    is_enabled: bool = False
    desc_gpa: int = 0
    avail_gpa: int = 0
    used_gpa: int = 0

    def reset(self) -> None:
        """Go back to what a fresh device shows."""
        self.size = self.max_size
        self.vector, self.is_enabled = NO_VECTOR, False
        self.desc_gpa = self.avail_gpa = self.used_gpa = 0


class CommonConfig:
    """The registers.

    Args:
        offered: feature bits.
        queue_sizes: most entries of each queue, powers of two.
        n_vectors: MSI-X vectors that exist.
        owner: acts on status writes.

    Threads: under the transport's lock.
    """

    def __init__(
        self, offered: int, queue_sizes: tuple[int, ...], n_vectors: int, owner: StatusOwner
    ) -> None:
        self.offered = offered
        self.queues = [QueueRegisters(size) for size in queue_sizes]
        self.status = 0
        self.generation = 0
        self._n_vectors = n_vectors
        self._owner = owner
        self._writers = self._make_writers()
        self._reset_registers()

    @property
    def negotiated(self) -> int:
        """The feature bits that were agreed on; 0 before FEATURES_OK."""
        return self._driver_features if self.status & STATUS_FEATURES_OK else 0

    def read(self, offset: int, length: int) -> int:
        """Return register bytes, in any width; zeros beyond the structure."""
        return int.from_bytes(self._image()[offset : offset + length], "little")

    def write(self, offset: int, length: int, value: int) -> None:
        """Write one whole register (a 64-bit one also by halves).

        Raises:
            BadRegisterAccess: there is no such register, or it cannot be written (now).
        """
        writer = self._writers.get((offset, length))
        if writer is None:
            raise BadRegisterAccess(f"common config offset={offset:#x} length={length}")
        writer(value)

    def _image(self) -> bytes:
        queue = self._selected_or_none()
        return _LAYOUT.pack(
            self._device_feature_select,
            _half(self.offered, self._device_feature_select),
            self._driver_feature_select,
            _half(self._driver_features, self._driver_feature_select),
            self.config_vector,
            len(self.queues),
            self.status,
            self.generation,
            self._queue_select,
            queue.size if queue else 0,
            queue.vector if queue else NO_VECTOR,
            int(queue.is_enabled) if queue else 0,
            self._queue_select if queue else 0,  # queue_notify_off
            queue.desc_gpa if queue else 0,
            queue.avail_gpa if queue else 0,
            queue.used_gpa if queue else 0,
        )

    def _make_writers(self) -> dict[tuple[int, int], Callable[[int], None]]:
        writers: dict[tuple[int, int], Callable[[int], None]] = {
            (0x00, 4): self._write_device_feature_select,
            (0x08, 4): self._write_driver_feature_select,
            (0x0C, 4): self._write_driver_feature,
            (0x10, 2): self._write_config_vector,
            (0x14, 1): self._write_status,
            (0x16, 2): self._write_queue_select,
            (0x18, 2): self._write_queue_size,
            (0x1A, 2): self._write_queue_vector,
            (0x1C, 2): self._write_queue_enable,
        }
        for offset, field in ((0x20, "desc_gpa"), (0x28, "avail_gpa"), (0x30, "used_gpa")):
            writers[offset, 8] = _AddressWriter(self, field, 0, (1 << 64) - 1)
            writers[offset, 4] = _AddressWriter(self, field, 0, _U32)
            writers[offset + 4, 4] = _AddressWriter(self, field, 32, _U32)
        return writers

    def _reset_registers(self) -> None:
        self.status = 0
        self.config_vector = NO_VECTOR
        self._device_feature_select = 0
        self._driver_feature_select = 0
        self._driver_features = 0
        self._has_unknown_features = False
        self._queue_select = 0
        for queue in self.queues:
            queue.reset()

    # ---- status and features

    def _write_status(self, value: int) -> None:
        if value == 0:
            self._owner.device_reset()
            self._reset_registers()
            return
        # A driver may only add bits (3.1.1); it cannot take back what it said.
        new = value & ~self.status
        self.status |= new & (STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_FAILED)
        if new & STATUS_FEATURES_OK and self._features_are_acceptable():
            self.status |= STATUS_FEATURES_OK
        if new & STATUS_DRIVER_OK:
            if not self.status & STATUS_FEATURES_OK or self.status & STATUS_NEEDS_RESET:
                raise BadRegisterAccess(f"DRIVER_OK at status={self.status:#x}")
            self.status |= STATUS_DRIVER_OK
            self._owner.driver_ok()

    def _features_are_acceptable(self) -> bool:
        if self._has_unknown_features or self._driver_features & ~self.offered:
            return False
        has_version_1 = bool(self._driver_features & VIRTIO_F_VERSION_1)
        return has_version_1 and self._owner.accepts(self._driver_features)

    def _write_device_feature_select(self, value: int) -> None:
        self._device_feature_select = value

    def _write_driver_feature_select(self, value: int) -> None:
        self._driver_feature_select = value

    def _write_driver_feature(self, value: int) -> None:
        if self.status & STATUS_FEATURES_OK:
            raise BadRegisterAccess("driver_feature after FEATURES_OK")
        select = self._driver_feature_select
        if select > 1:
            self._has_unknown_features |= value != 0
            return
        kept = self._driver_features & ~(_U32 << 32 * select)
        self._driver_features = kept | value << 32 * select

    def _write_config_vector(self, value: int) -> None:
        self.config_vector = self._valid_vector(value)

    def _valid_vector(self, value: int) -> int:
        return value if value < self._n_vectors else NO_VECTOR

    # ---- queues

    def _selected_or_none(self) -> QueueRegisters | None:
        if self._queue_select < len(self.queues):
            return self.queues[self._queue_select]
        return None

    def selected_for_setup(self) -> QueueRegisters:
        """Return the selected queue while its registers may still be written.

        Raises:
            BadRegisterAccess: there is no such queue, it is enabled, or the device is in use.
        """
        queue = self._selected_or_none()
        if queue is None:
            raise BadRegisterAccess(f"queue_select={self._queue_select}: no such queue")
        if queue.is_enabled or self.status & STATUS_DRIVER_OK:
            raise BadRegisterAccess(f"queue {self._queue_select} is in use")
        return queue

    def _write_queue_select(self, value: int) -> None:
        self._queue_select = value

    def _write_queue_size(self, value: int) -> None:
        queue = self.selected_for_setup()
        if not 0 < value <= queue.max_size or value & (value - 1):
            raise BadRegisterAccess(f"queue_size={value}: a power of two up to {queue.max_size}")
        queue.size = value

    def _write_queue_vector(self, value: int) -> None:
        queue = self._selected_or_none()
        if queue is None or self.status & STATUS_DRIVER_OK:
            raise BadRegisterAccess(f"queue_msix_vector={value:#x} now")
        queue.vector = self._valid_vector(value)

    def _write_queue_enable(self, value: int) -> None:
        if value != 1:
            raise BadRegisterAccess(f"queue_enable={value}: only 1 may be written")
        self.selected_for_setup().is_enabled = True


class _AddressWriter:
    """Writes one ring address, or half of it."""

    def __init__(self, config: CommonConfig, field: str, shift: int, mask: int) -> None:
        self._config = config
        self._field = field
        self._shift = shift
        self._mask = mask

    def __call__(self, value: int) -> None:
        queue = self._config.selected_for_setup()
        kept = getattr(queue, self._field) & ~(self._mask << self._shift)
        setattr(queue, self._field, kept | (value & self._mask) << self._shift)


def _half(features: int, select: int) -> int:
    return features >> 32 * select & _U32 if select <= 1 else 0
