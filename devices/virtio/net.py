# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""virtio-net on a tap. Packets are moved in C (net_engine).

One pair of queues, no control queue. Checksum and segmentation work is left to whoever comes
after: the guest hands big unchecked packets to the tap and takes such packets from it.

Source: VIRTIO 1.2, 5.1 "Network Device".
"""

from __future__ import annotations

import logging
import os
import struct
from typing import TYPE_CHECKING, ClassVar, Final

from devices.errors import BackendError
from kvm_ffi.net_engine import NetEngine, configure_tap

from .device import EngineDevice
from .ids import (
    VIRTIO_ID_NET,
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_LINK_UP,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvm_ffi.engine import Engine

    from .queue import Activation

log = logging.getLogger(__name__)

RX_QUEUE: Final = 0
TX_QUEUE: Final = 1
QUEUE_SIZE: Final = 256
MAC_BYTES: Final = 6
MIN_MTU: Final = 68  # 5.1.4.1
MAX_MTU: Final = 65535

# struct virtio_net_config of 5.1.4: mac, status, max_virtqueue_pairs, mtu.
_CONFIG: Final = struct.Struct("<6sHHH")

_GUEST_TSO: Final = VIRTIO_NET_F_GUEST_TSO4 | VIRTIO_NET_F_GUEST_TSO6
_HOST_TSO: Final = VIRTIO_NET_F_HOST_TSO4 | VIRTIO_NET_F_HOST_TSO6
# 5.1.3.1: any of the bits on the left needs one of those on the right.
_NEEDS: Final = (
    (_GUEST_TSO, VIRTIO_NET_F_GUEST_CSUM),
    (VIRTIO_NET_F_GUEST_ECN, _GUEST_TSO),
    (_HOST_TSO, VIRTIO_NET_F_CSUM),
    (VIRTIO_NET_F_HOST_ECN, _HOST_TSO),
)


class VirtioNet(EngineDevice):
    """A network interface.

    Args:
        name: e.g. "net0"; also the name of the engine's thread.
        tap_fd: a tap with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR; owned from now on.
        path: the tap's name, for error texts only.
        mac: six bytes.
        mtu: 68..65535, told to the driver; None leaves its default.

    Raises:
        BackendError: the descriptor is no such tap.
        ValueError: the MAC or the MTU is out of range.
    """

    DEVICE_ID: ClassVar[int] = VIRTIO_ID_NET
    PCI_CLASS: ClassVar[int] = 0x020000
    QUEUE_SIZES: ClassVar[tuple[int, ...]] = (QUEUE_SIZE, QUEUE_SIZE)
    FEATURES: ClassVar[int] = (
        VIRTIO_NET_F_CSUM
        | VIRTIO_NET_F_GUEST_CSUM
        | VIRTIO_NET_F_MAC
        | _GUEST_TSO
        | VIRTIO_NET_F_GUEST_ECN
        | _HOST_TSO
        | VIRTIO_NET_F_HOST_ECN
        | VIRTIO_NET_F_MRG_RXBUF
        | VIRTIO_NET_F_STATUS
    )

    def __init__(
        self, name: str, tap_fd: int, *, path: str, mac: bytes, mtu: int | None = None
    ) -> None:
        super().__init__(name)
        if len(mac) != MAC_BYTES or mac[0] & 1:
            raise ValueError(f"mac={mac.hex(':')}: must be six bytes, not multicast")
        if mtu is not None and not MIN_MTU <= mtu <= MAX_MTU:
            raise ValueError(f"mtu={mtu}: must be {MIN_MTU}..{MAX_MTU}")
        self._tap_fd = tap_fd
        self._path = path
        self._mac = mac
        self._mtu = mtu
        self._is_link_up = True
        try:
            configure_tap(tap_fd, 0)
        except OSError as err:
            raise BackendError(path, f"not a tap with IFF_VNET_HDR: {err.strerror}") from err

    @property
    def features(self) -> int:
        """The bits that this interface offers."""
        return super().features | (0 if self._mtu is None else VIRTIO_NET_F_MTU)

    def accepts(self, features: int) -> bool:
        """Whether each offload comes with the checksum offload that it builds on."""
        return all(features & needed for bits, needed in _NEEDS if features & bits)

    def config_space(self) -> bytes:
        """Return struct virtio_net_config."""
        status = VIRTIO_NET_S_LINK_UP if self._is_link_up else 0
        return _CONFIG.pack(self._mac, status, 1, self._mtu or 0)

    def set_link(self, is_up: bool) -> None:
        """Plug or unplug the cable, as the driver sees it; packets are not held back."""
        if is_up != self._is_link_up:
            self._is_link_up = is_up
            self.config_changed()

    def make_engines(self, activation: Activation) -> Sequence[Engine]:
        """Set the tap up for what was negotiated and build the engine of both queues."""
        rx, tx = activation.require(RX_QUEUE), activation.require(TX_QUEUE)
        configure_tap(self._tap_fd, activation.features)
        return [
            NetEngine(
                activation.memory,
                self._tap_fd,
                rx=rx.queue,
                tx=tx.queue,
                rx_kick=rx.kick,
                tx_kick=tx.kick,
                rx_irq=rx.irq,
                tx_irq=tx.irq,
                fault=activation.fault,
                mergeable=bool(activation.features & VIRTIO_NET_F_MRG_RXBUF),
            ),
        ]

    def reset(self) -> None:
        """Stop the engine, and let the tap hand out plain packets again."""
        was_active = self._activation is not None
        super().reset()
        if was_active:
            try:
                configure_tap(self._tap_fd, 0)
            except OSError as err:
                # The tap is gone: the next activation tells the driver, the log the operator.
                log.error("%s: tap %s: %s", self.name, self._path, err)

    def engine_stats(self, engine: Engine) -> dict[str, int]:
        """Return the net engine's counters."""
        assert isinstance(engine, NetEngine)
        return engine.stats()

    def close(self) -> None:
        """Stop for good and close the tap."""
        super().close()
        os.close(self._tap_fd)
