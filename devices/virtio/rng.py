# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""virtio-rng: host entropy for the guest.

Source: VIRTIO 1.2, 5.4 "Entropy Device". One queue, no config space, no feature bits; every
buffer is device-writable.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, ClassVar, Final

from kvm_ffi.errors import BadDescriptorChain

from .device import KickedDevice
from .ids import VIRTIO_ID_RNG

if TYPE_CHECKING:
    from kvm_ffi.virtqueue import DescriptorChain

# Descriptors may overlap, so writable_len can exceed the memory behind it; without a cap a
# guest chooses how much the host allocates. A driver takes a short answer.
MAX_REQUEST_BYTES: Final = 64 * 1024


class VirtioRng(KickedDevice):
    """Fills guest buffers from getrandom(2)."""

    DEVICE_ID: ClassVar[int] = VIRTIO_ID_RNG
    PCI_CLASS: ClassVar[int] = 0x00FF00
    QUEUE_SIZES: tuple[int, ...] = (256,)

    def __init__(self, name: str = "rng0") -> None:
        super().__init__(name)

    def handle(self, queue_index: int, chain: DescriptorChain) -> int:
        """Write random bytes into the chain.

        Returns:
            Bytes written, 1..MAX_REQUEST_BYTES.

        Raises:
            BadDescriptorChain: the chain has no writable buffer.
        """
        if chain.writable_len == 0:
            raise BadDescriptorChain(f"rng: chain {chain.head} has no writable buffer")
        return chain.write(os.getrandom(min(chain.writable_len, MAX_REQUEST_BYTES)))
