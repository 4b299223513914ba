# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""virtio-net on a tap. Packets are moved by the kernel (vhost-net), or in C (net_engine).

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
from kvm_ffi.errors import HostError
from kvm_ffi.net_engine import NetEngine
from kvm_ffi.net_tap import configure_tap
from kvm_ffi.vhost import VhostDevice, VhostNet, Vring

from .device import EngineDevice
from .ids import (
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_VERSION_1,
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

    from kvm_ffi.engine import DataPath

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
# What whoever walks the rings must know. The rest is between the driver, the tap and this file.
_RING_FEATURES: Final = (
    VIRTIO_F_VERSION_1 | VIRTIO_F_INDIRECT_DESC | VIRTIO_F_EVENT_IDX | VIRTIO_NET_F_MRG_RXBUF
)
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
        tap_fds: a tap with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR; owned from now on.
        path: the tap's name, for error texts only.
        mac: six bytes.
        mtu: 68..65535, told to the driver; None leaves its default.
        vhost_fds: /dev/vhost-net for each of them, owned from now on: the kernel moves the
            packets. Empty: we do.

    Raises:
        BackendError: a descriptor is not what it should be.
        ValueError: the MAC or the MTU is out of range.
    """

    DEVICE_ID: ClassVar[int] = VIRTIO_ID_NET
    PCI_CLASS: ClassVar[int] = 0x020000
    QUEUE_SIZES: tuple[int, ...] = (QUEUE_SIZE, QUEUE_SIZE)
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
        self,
        name: str,
        tap_fds: Sequence[int],
        *,
        path: str,
        mac: bytes,
        mtu: int | None = None,
        vhost_fds: Sequence[int] = (),
    ) -> None:
        super().__init__(name)
        if len(mac) != MAC_BYTES or mac[0] & 1:
            raise ValueError(f"mac={mac.hex(':')}: must be six bytes, not multicast")
        if mtu is not None and not MIN_MTU <= mtu <= MAX_MTU:
            raise ValueError(f"mtu={mtu}: must be {MIN_MTU}..{MAX_MTU}")
        self._tap_fds = tuple(tap_fds)
        self._vhost_fds = tuple(vhost_fds)
        self._path = path
        self._mac = mac
        self._mtu = mtu
        self._is_link_up = True
        self._ring_features = self._ask_vhost() if vhost_fds else _RING_FEATURES
        try:
            configure_tap(self._tap_fds[0], 0)
        except OSError as err:
            raise BackendError(path, f"not a tap with IFF_VNET_HDR: {err.strerror}") from err

    def _ask_vhost(self) -> int:
        try:
            features = VhostDevice(self._vhost_fds[0]).features() & _RING_FEATURES
        except HostError as err:
            raise BackendError(self._path, f"not a vhost device: {err}") from err
        if not features & VIRTIO_F_VERSION_1:
            raise BackendError(self._path, "this vhost-net knows only virtio 0.9")
        return features

    @property
    def features(self) -> int:
        """The bits that this interface offers."""
        offered = super().features | (0 if self._mtu is None else VIRTIO_NET_F_MTU)
        return offered & (self._ring_features | ~_RING_FEATURES)

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

    def make_engines(self, activation: Activation) -> Sequence[DataPath]:
        """Set the tap up for what was negotiated and build the engine of both queues."""
        queues = [activation.require(index) for index in (RX_QUEUE, TX_QUEUE)]
        configure_tap(self._tap_fds[0], activation.features)
        if self._vhost_fds:
            vhost = VhostNet(
                self._vhost_fds[0],
                activation.memory,
                self._tap_fds[0],
                features=activation.features & self._ring_features,
                vrings=[Vring(each.queue, each.kick, each.irq) for each in queues],
                fault=activation.fault,
            )
            return [vhost]
        rx, tx = queues
        engine = NetEngine(
            activation.memory,
            self._tap_fds[0],
            rx=rx.queue,
            tx=tx.queue,
            rx_kick=rx.kick,
            tx_kick=tx.kick,
            rx_irq=rx.irq,
            tx_irq=tx.irq,
            fault=activation.fault,
            mergeable=bool(activation.features & VIRTIO_NET_F_MRG_RXBUF),
        )
        return [engine]

    def reset(self) -> None:
        """Stop serving, and let the tap hand out plain packets again."""
        was_active = self._activation is not None
        super().reset()
        if was_active:
            try:
                configure_tap(self._tap_fds[0], 0)
            except OSError as err:
                # The tap is gone: the next activation tells the driver, the log the operator.
                log.error("%s: tap %s: %s", self.name, self._path, err)

    def engine_stats(self, engine: DataPath) -> dict[str, int]:
        """Return the net engine's counters; vhost has none."""
        return engine.stats() if isinstance(engine, NetEngine) else {}

    def close(self) -> None:
        """Stop for good and close the tap and vhost."""
        super().close()
        for fd in (*self._tap_fds, *self._vhost_fds):
            os.close(fd)
