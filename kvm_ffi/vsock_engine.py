# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""virtio-vsock streams carried in C between a guest and Unix sockets of the host.

A program of the host connects to the listener, writes the line ``CONNECT <port>``, and reads
``OK <its own port>`` once the guest has accepted; a guest that connects to port P of CID 2 reaches
the socket ``<name>_P`` in the directory. That is Firecracker's protocol, so its clients work.

Source: VIRTIO 1.2, 5.10 "Socket Device". The C side is csrc/vsock_engine.c and its parts.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from ._kvm import ffi, lib
from .engine import Engine, EngineFault, check, counters

if TYPE_CHECKING:
    from ._kvm import CData
    from .memory import GuestMemory
    from .types import SupportsFd
    from .virtqueue import Virtqueue

MAX_CONNECTIONS: Final = lib.VSOCK_MAX_CONNS
MAX_NAME_BYTES: Final = lib.VSOCK_MAX_NAME_BYTES - 1
PEER_TIMEOUT_S: Final = 30.0
"""Long enough for a person who types CONNECT; a host's program that waits less hangs up."""

_COUNTERS: Final = (
    "rx_packets", "rx_bytes", "tx_packets", "tx_bytes", "tx_malformed", "host_connections",
    "guest_connections", "refused", "closed", "violations", "rx_kicks", "tx_kicks",
    "rx_interrupts", "tx_interrupts",
)  # fmt: skip


class VsockEngine(Engine):
    """Serves the receive and the transmit queue of a vsock device from one thread.

    Towards the guest nothing is copied by us: a socket is read into guest buffers, as far as the
    guest's credit goes. Towards the host a packet is written as it lies in guest memory; what a
    slow reader leaves over is kept, 256 KiB for each of the first connections and 16 KiB for each
    of many (32 MiB in all at most), which is also the credit that the guest has.

    Args:
        memory: the guest's RAM; must stay open until close().
        guest_cid: packets from any other address are dropped.
        listener_fd: a listening Unix stream socket; made non-blocking here; stays the caller's.
        directory_fd: where sockets that the guest connects to are looked up; stays the caller's.
            The thread that runs the engine has it as working directory from then on.
        name: of these sockets, up to the "_"; at most MAX_NAME_BYTES.
        rx: queue 0, whose buffers the device fills.
        tx: queue 1.
        rx_kick, tx_kick: signalled by the guest.
        rx_irq, tx_irq: signalled for the guest, or None when it polls.
        fault: signalled when a ring breaks; run() returns False then.
        peer_timeout_s: how long a greeting, the guest's answer, or its last word may take.

    Raises:
        OSError: a descriptor is not open, or the host has none left.
        ValueError: the name is too long.
    """

    def __init__(  # noqa: PLR0913 - one keyword per wire
        self,
        memory: GuestMemory,
        *,
        guest_cid: int,
        listener_fd: int,
        directory_fd: int,
        name: str,
        rx: Virtqueue,
        tx: Virtqueue,
        rx_kick: SupportsFd,
        tx_kick: SupportsFd,
        rx_irq: SupportsFd | None,
        tx_irq: SupportsFd | None,
        fault: SupportsFd,
        peer_timeout_s: float = PEER_TIMEOUT_S,
    ) -> None:
        if len(os.fsencode(name)) > MAX_NAME_BYTES:
            raise ValueError(f"name={name!r}: must have at most {MAX_NAME_BYTES} bytes")
        os.set_blocking(listener_fd, False)
        config = ffi.new("struct vsock_config *")
        config.rx = rx.raw
        config.tx = tx.raw
        config.guest_cid = guest_cid
        config.peer_timeout_ns = int(peer_timeout_s * 1e9)
        config.listener_fd = listener_fd
        config.directory_fd = directory_fd
        config.name = os.fsencode(name)
        config.rx_kick_fd = rx_kick.fd
        config.tx_kick_fd = tx_kick.fd
        config.rx_irq_fd = -1 if rx_irq is None else rx_irq.fd
        config.tx_irq_fd = -1 if tx_irq is None else tx_irq.fd
        config.fault_fd = fault.fd
        created = ffi.new("struct vsock_engine **")
        check(lib.vsock_engine_create(config, created))
        keepalive = (memory, rx, tx, rx_kick, tx_kick, rx_irq, tx_irq, fault)
        super().__init__(created[0], lib.vsock_engine_destroy, keepalive)

    def _run(self) -> int:
        return lib.vsock_engine_run(self._c)

    def _gate(self) -> CData:
        return lib.vsock_engine_gate(self._c)

    @property
    def fault(self) -> EngineFault:
        """Why the fault EventFd was signalled last: RING or NONE."""
        return EngineFault(lib.vsock_engine_fault(self._c))

    def stats(self) -> dict[str, int]:
        """Counters since the start, rx_ and tx_ as the guest sees them; bytes are payload.

        `tx_malformed` packets were dropped; `refused` connections were wanted by either side and
        not had; `violations` were ended since the guest broke the protocol. Open are
        `host_connections` + `guest_connections` - `closed`.
        """
        stats = ffi.new("struct vsock_stats *")
        lib.vsock_engine_stats(self._c, stats)
        return counters(stats, _COUNTERS)
