# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""virtio-net on a tap. Packets are moved by the kernel (vhost-net), or in C (net_engine).

Pairs of queues, as many as the tap has descriptors, and a control queue, which Python serves. The
first pair is served from DRIVER_OK on, the others as the driver asks for them. Checksum and
segmentation work is left to whoever comes after: the guest hands big unchecked packets to the tap
and takes such packets from it.

Source: VIRTIO 1.2, 5.1 "Network Device".
"""

from __future__ import annotations

import logging
import os
import struct
from collections import Counter
from typing import TYPE_CHECKING, Any, ClassVar, Final

from devices.errors import BackendError
from devices.ratelimit import GuestLog
from kvm_ffi.errors import GuestError, HostError
from kvm_ffi.net_engine import NetEngine
from kvm_ffi.rate_limiter import UNLIMITED, RateLimit, RateLimiter
from kvm_ffi.vhost import VhostDevice, VhostNet, Vring

from . import net_control
from .device import EngineDevice, serve_slowly
from .ids import (
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_VERSION_1,
    VIRTIO_ID_NET,
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_RX_EXTRA,
    VIRTIO_NET_F_CTRL_VLAN,
    VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_ANNOUNCE,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_ANNOUNCE,
    VIRTIO_NET_S_LINK_UP,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvm_ffi.engine import DataPath
    from kvm_ffi.net_tap import Tap
    from kvm_ffi.virtqueue import DescriptorChain

    from .queue import Activation

log = logging.getLogger(__name__)

QUEUE_SIZE: Final = 256
CONTROL_QUEUE_SIZE: Final = 64
MAX_PAIRS: Final = 8
MAC_BYTES: Final = 6
MIN_MTU: Final = 68  # 5.1.4.1
MAX_MTU: Final = 65535

# struct virtio_net_config of 5.1.4: mac, status, max_virtqueue_pairs, mtu.
_CONFIG: Final = struct.Struct("<6sHHH")

_GUEST_TSO: Final = VIRTIO_NET_F_GUEST_TSO4 | VIRTIO_NET_F_GUEST_TSO6
_HOST_TSO: Final = VIRTIO_NET_F_HOST_TSO4 | VIRTIO_NET_F_HOST_TSO6
_CONTROL: Final = (
    VIRTIO_NET_F_CTRL_RX
    | VIRTIO_NET_F_CTRL_RX_EXTRA
    | VIRTIO_NET_F_CTRL_VLAN
    | VIRTIO_NET_F_CTRL_MAC_ADDR
    | VIRTIO_NET_F_GUEST_ANNOUNCE
)
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
    (_CONTROL | VIRTIO_NET_F_MQ, VIRTIO_NET_F_CTRL_VQ),
)


class VirtioNet(EngineDevice):
    """A network interface.

    Args:
        name: e.g. "net0"; also the name of the engines' threads.
        tap: owned from now on; has a pair of queues for each of its descriptors, 1..MAX_PAIRS.
        path: the tap's name, for error texts only.
        mac: six bytes.
        mtu: 68..65535, told to the driver; None leaves its default.
        is_link_up: whether the cable is plugged in at first.
        rx_limit, tx_limit: of all queues together.
        vhost_fds: /dev/vhost-net for each pair, owned from now on: the kernel moves the packets.
            Empty: we do.

    Raises:
        BackendError: a descriptor is not what it should be.
        ValueError: the MAC or the MTU is out of range.
    """

    DEVICE_ID: ClassVar[int] = VIRTIO_ID_NET
    PCI_CLASS: ClassVar[int] = 0x020000
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
        | VIRTIO_NET_F_CTRL_VQ
        | _CONTROL
    )

    def __init__(  # noqa: PLR0913 - one keyword per property
        self,
        name: str,
        tap: Tap,
        *,
        path: str,
        mac: bytes,
        mtu: int | None = None,
        is_link_up: bool = True,
        rx_limit: RateLimit = UNLIMITED,
        tx_limit: RateLimit = UNLIMITED,
        vhost_fds: Sequence[int] = (),
    ) -> None:
        super().__init__(name)
        if len(mac) != MAC_BYTES or mac[0] & 1:
            raise ValueError(f"mac={mac.hex(':')}: must be six bytes, not multicast")
        if mtu is not None and not MIN_MTU <= mtu <= MAX_MTU:
            raise ValueError(f"mtu={mtu}: must be {MIN_MTU}..{MAX_MTU}")
        self._n_pairs = len(tap.fds)
        if not 1 <= self._n_pairs <= MAX_PAIRS:
            raise ValueError(f"{self._n_pairs} pairs of queues: must be 1..{MAX_PAIRS}")
        self.QUEUE_SIZES = (*(QUEUE_SIZE,) * 2 * self._n_pairs, CONTROL_QUEUE_SIZE)
        self._tap = tap
        self._vhost_fds = tuple(vhost_fds)
        self._path = path
        self._first_mac = self._mac = mac
        self._mtu = mtu
        self._is_link_up = is_link_up
        self._rx_limiter, self._tx_limiter = RateLimiter(), RateLimiter()
        self.set_limits(rx_limit, tx_limit)
        self._is_announcing = False
        self._control_counts: Counter[str] = Counter()
        self._guest_log = GuestLog(log)
        self._ring_features = self._ask_vhost() if vhost_fds else _RING_FEATURES
        try:
            tap.configure(0)
            tap.set_carrier(is_link_up)
            self._detach_from(1)
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

    def _detach_from(self, first: int) -> None:
        for index in range(first, self._n_pairs):
            self._tap.detach(index)

    @property
    def features(self) -> int:
        """The bits that this interface offers."""
        offered = super().features | (0 if self._mtu is None else VIRTIO_NET_F_MTU)
        if self._n_pairs > 1:
            offered |= VIRTIO_NET_F_MQ
        return offered & (self._ring_features | ~_RING_FEATURES)

    def accepts(self, features: int) -> bool:
        """Whether each bit comes with the one that it builds on."""
        return all(features & needed for bits, needed in _NEEDS if features & bits)

    def config_space(self) -> bytes:
        """Return struct virtio_net_config."""
        status = VIRTIO_NET_S_LINK_UP if self._is_link_up else 0
        if self._is_announcing:
            status |= VIRTIO_NET_S_ANNOUNCE
        return _CONFIG.pack(self._mac, status, self._n_pairs, self._mtu or 0)

    # ---- life

    def make_engines(self, activation: Activation) -> Sequence[DataPath]:
        """Set the tap up for what was negotiated and serve the first pair."""
        self._tap.configure(activation.features)
        return [self._make_pair(activation, 0)]

    def _make_pair(self, activation: Activation, index: int) -> DataPath:
        rx, tx = activation.require(2 * index), activation.require(2 * index + 1)
        if self._vhost_fds:
            return VhostNet(
                self._vhost_fds[index],
                activation.memory,
                self._tap.fds[index],
                features=activation.features & self._ring_features,
                vrings=[Vring(each.queue, each.kick, each.irq) for each in (rx, tx)],
                fault=activation.fault,
            )
        return NetEngine(
            activation.memory,
            self._tap.fds[index],
            rx=rx.queue,
            tx=tx.queue,
            rx_kick=rx.kick,
            tx_kick=tx.kick,
            rx_irq=rx.irq,
            tx_irq=tx.irq,
            fault=activation.fault,
            mergeable=bool(activation.features & VIRTIO_NET_F_MRG_RXBUF),
            rx_limiter=self._rx_limiter,
            tx_limiter=self._tx_limiter,
        )

    def activate(self, activation: Activation) -> None:
        """Serve the first pair, and the control queue where the driver has enabled it."""
        super().activate(activation)
        control = activation.queues.get(self._control_index(activation.features))
        if control is not None:
            activation.event_loop.add(control.kick, self._on_control_kick)

    def reset(self) -> None:
        """Stop serving, and be as at first: plain packets, one pair, the address of before."""
        activation = self._activation
        if activation is not None:
            control = activation.queues.get(self._control_index(activation.features))
            if control is not None:
                activation.event_loop.remove(control.kick)
        super().reset()
        self._mac, self._is_announcing = self._first_mac, False
        self._control_counts.clear()
        if activation is not None:
            try:
                self._tap.configure(0)
                self._detach_from(1)
            except OSError as err:
                # The tap is gone: the next activation tells the driver, the log the operator.
                log.error("%s: tap %s: %s", self.name, self._path, err)

    def resume(self) -> None:
        """Go on, and have the guest announce itself: its neighbours may have forgotten it."""
        super().resume()
        with self._lock:
            activation = self._activation
            if activation is None:
                return
            control = activation.queues.get(self._control_index(activation.features))
            if control is not None:
                control.kick.signal()
            if not activation.features & VIRTIO_NET_F_GUEST_ANNOUNCE:
                return
            self._is_announcing = True
        self.config_changed()

    def close(self) -> None:
        """Stop for good and close the tap and vhost."""
        super().close()
        self._tap.close()
        for fd in self._vhost_fds:
            os.close(fd)

    # ---- limits and link

    def set_limits(self, rx: RateLimit, tx: RateLimit) -> None:
        """Change the limits, at once.

        Raises:
            BackendError: vhost serves the interface and knows none.
            ValueError: a rate or a burst is out of range.
        """
        if self._vhost_fds and (rx, tx) != (UNLIMITED, UNLIMITED):
            raise BackendError(
                self._path, "vhost serves it, which knows no limits; stop and start the VM"
            )
        with self._lock:
            self._rx_limiter.set(rx)
            self._tx_limiter.set(tx)
            for engine in self._engines:
                if isinstance(engine, NetEngine):
                    engine.wake()

    def set_link(self, is_up: bool) -> None:
        """Plug or unplug the cable, on both of its ends; packets wait while it is out.

        Raises:
            OSError: the tap is gone.
        """
        with self._lock:
            if is_up == self._is_link_up:
                return
            self._tap.set_carrier(is_up)
            self._is_link_up = is_up
            if is_up:
                self._let_go()
            else:
                for engine in self._engines:
                    engine.quiesce()
        self.config_changed()

    @property
    def _is_held(self) -> bool:
        return super()._is_held or not self._is_link_up

    # ---- the control queue

    def _control_index(self, features: int) -> int:
        return 2 * (self._n_pairs if features & VIRTIO_NET_F_MQ else 1)

    def _on_control_kick(self) -> None:
        with self._lock:
            activation = self._activation
            if activation is None or self._is_quiesced or self._failure is not None:
                return
            control = activation.queues[self._control_index(activation.features)]
            self._control_counts["kicks"] += 1
            try:
                self._control_counts.update(serve_slowly(control, self._control))
            except GuestError as err:
                self._failure = str(err)
                activation.fault.signal()

    def _control(self, chain: DescriptorChain) -> int:
        """Carry one command out and return the length of its answer."""
        assert self._activation is not None
        if chain.writable_len < 1:
            raise GuestError(f"{self.name}: control command without room for its answer")
        data = chain.read(net_control.MAX_COMMAND_BYTES + 1)
        try:
            self._obey(net_control.parse(data, self._activation.features))
        except (GuestError, HostError, OSError) as err:
            self._guest_log.warning("%s: %s", self.name, err)
            self._control_counts["errors"] += 1
            return chain.write(net_control.ACK_ERROR)
        return chain.write(net_control.ACK_OK)

    def _obey(self, command: net_control.Command) -> None:
        match command:
            case net_control.SetMac(mac):
                self._mac = mac
            case net_control.SetPairs(count):
                self._set_pairs(count)
            case net_control.Announced():
                self._is_announcing = False
            case net_control.Accepted():
                pass

    def _set_pairs(self, wanted: int) -> None:
        """Serve the first pairs and no others."""
        if not 1 <= wanted <= self._n_pairs:
            raise GuestError(f"{wanted} pairs of queues: must be 1..{self._n_pairs}")
        while len(self._engines) > wanted:
            self._drop_pair()
        while len(self._engines) < wanted:
            self._add_pair()

    def _add_pair(self) -> None:
        assert self._activation is not None
        index = len(self._engines)
        pair = self._make_pair(self._activation, index)
        self._engines += (pair,)
        try:
            self._start(pair, self._activation)
            self._tap.attach(index)
        except (HostError, OSError):
            self._drop_pair()
            raise

    def _drop_pair(self) -> None:
        *others, last = self._engines
        self._engines = tuple(others)
        self._end(last)
        self._tap.detach(len(others))

    # ---- counters

    def engine_stats(self, engine: DataPath) -> dict[str, int]:
        """Return the net engine's counters; vhost has none."""
        return engine.stats() if isinstance(engine, NetEngine) else {}

    def details(self) -> dict[str, Any]:
        """Return who serves it, and each queue's counters, as api/models/vms.py's NicDetails."""
        with self._lock:
            names = ("kicks", "requests", "errors", "interrupts")
            queues = {"control": {name: self._control_counts[name] for name in names}}
            for index, engine in enumerate(self._engines):
                for name, value in self.engine_stats(engine).items():
                    side, _, what = name.partition("_")
                    queues.setdefault(f"{side}{index}", {})[what] = value
            return {
                "backend": "vhost" if self._vhost_fds else "tap",
                "active_pairs": len(self._engines),
                "queues": queues,
            }
