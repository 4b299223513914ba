# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""virtio-net packets moved in C between a tap and one pair of queues.

Source: VIRTIO 1.2, 5.1.6 "Device Operation"; Linux Documentation/networking/tuntap.rst. The C
side is csrc/net_engine.c.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from ._kvm import ffi, lib
from .engine import Engine, EngineFault, check, counters

if TYPE_CHECKING:
    from ._kvm import CData
    from .memory import GuestMemory
    from .rate_limiter import RateLimiter
    from .types import SupportsFd
    from .virtqueue import Virtqueue

HEADER_BYTES: Final = lib.NET_HEADER_BYTES
MAX_PACKET_BYTES: Final = lib.NET_MAX_PACKET_BYTES
"""The header and the largest frame that is received or sent."""

_COUNTERS: Final = (
    "rx_packets", "rx_bytes", "rx_dropped", "tx_packets", "tx_bytes", "tx_dropped",
    "tx_malformed", "rx_kicks", "tx_kicks", "rx_interrupts", "tx_interrupts",
    "rx_suppressed", "tx_suppressed", "rx_throttled", "tx_throttled",
)  # fmt: skip


class NetEngine(Engine):
    """Serves one receive and one transmit queue from one thread, without copying.

    The tap reads and writes guest buffers directly, struct virtio_net_hdr_v1 in front. While the
    receive ring is empty, packets wait in the tap's own queue. One that does not fit the buffers
    that the driver offers is dropped and counted; so is one that the tap does not take.

    Args:
        memory: the guest's RAM; must stay open until close().
        tap_fd: a tap with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR, prepared by configure_tap();
            made non-blocking here; stays the caller's.
        rx: queue 0, whose buffers the device fills.
        tx: queue 1.
        rx_kick, tx_kick: signalled by the guest.
        rx_irq, tx_irq: signalled for the guest, or None when it polls.
        fault: signalled when a ring breaks (run() returns False then) or when the tap is gone
            (the engine goes on, and drops what the guest sends).
        mergeable: VIRTIO_NET_F_MRG_RXBUF was negotiated: a packet may fill several chains.
        rx_limiter, tx_limiter: of frames and their bytes; one that is still to be cut into
            segments counts once. wake() the engine after a change.

    Raises:
        OSError: the tap's descriptor is not open.
    """

    def __init__(  # noqa: PLR0913 - one keyword per wire
        self,
        memory: GuestMemory,
        tap_fd: int,
        *,
        rx: Virtqueue,
        tx: Virtqueue,
        rx_kick: SupportsFd,
        tx_kick: SupportsFd,
        rx_irq: SupportsFd | None,
        tx_irq: SupportsFd | None,
        fault: SupportsFd,
        mergeable: bool,
        rx_limiter: RateLimiter | None = None,
        tx_limiter: RateLimiter | None = None,
    ) -> None:
        os.set_blocking(tap_fd, False)
        config = ffi.new("struct net_config *")
        config.rx = rx.raw
        config.tx = tx.raw
        config.tap_fd = tap_fd
        config.rx_kick_fd = rx_kick.fd
        config.tx_kick_fd = tx_kick.fd
        config.rx_irq_fd = -1 if rx_irq is None else rx_irq.fd
        config.tx_irq_fd = -1 if tx_irq is None else tx_irq.fd
        config.fault_fd = fault.fd
        config.is_mergeable = mergeable
        config.rx_limiter = ffi.NULL if rx_limiter is None else rx_limiter.raw
        config.tx_limiter = ffi.NULL if tx_limiter is None else tx_limiter.raw
        created = ffi.new("struct net_engine **")
        check(lib.net_engine_create(config, created))
        wires = (rx_kick, tx_kick, rx_irq, tx_irq, fault)
        keepalive = (memory, rx, tx, rx_limiter, tx_limiter, *wires)
        super().__init__(created[0], lib.net_engine_destroy, keepalive)

    def _run(self) -> int:
        return lib.net_engine_run(self._c)

    def _gate(self) -> CData:
        return lib.net_engine_gate(self._c)

    @property
    def fault(self) -> EngineFault:
        """Why the fault EventFd was signalled last: RING, BACKEND or NONE."""
        return EngineFault(lib.net_engine_fault(self._c))

    def stats(self) -> dict[str, int]:
        """Counters since the start, rx_ and tx_ as the guest sees them; bytes are those of frames.

        `rx_dropped` did not fit the guest's buffers, `tx_dropped` were refused by the tap,
        `tx_malformed` had no whole header, a writable buffer, or more than MAX_PACKET_BYTES.
        `_suppressed` is how often the driver wanted no interrupt, `_throttled` how often a packet
        had to wait for a limit. Each
        value is exact; two values may be a packet apart.
        """
        stats = ffi.new("struct net_stats *")
        lib.net_engine_stats(self._c, stats)
        return counters(stats, _COUNTERS)
