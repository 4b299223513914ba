# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A net engine between a synthetic driver and a socket pair that stands for a tap."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

from kvm_ffi._kvm import lib
from kvm_ffi.eventfd import EventFd
from kvm_ffi.memory import GuestMemory
from kvm_ffi.net_engine import NetEngine
from kvm_ffi.rate_limiter import RateLimiter
from kvm_ffi.types import Gpa
from kvm_ffi.virtqueue import Virtqueue
from tests.support.ring_driver import WRITE, RingDriver

RX_BUFFERS = 0x100000
TX_BUFFER = 0x400000
MEMORY = 8 << 20
BUFFER = 1024  # smaller than a frame of 1514 bytes: two are needed for one
# flags and gso fields are the tap's; num_buffers (offset 10) is the device's.
HEADER = bytes([1, 3, 5, 0, 7, 0, 9, 0, 11, 0, 0, 0])
RX_SIZE = 256


def header(num_buffers: int) -> bytes:
    return HEADER[:10] + struct.pack("<H", num_buffers)


@dataclass
class Nic:
    """A network device whose tap is one end of a socket pair; `wire` is the other end."""

    memory: GuestMemory
    rx: RingDriver
    tx: RingDriver
    rx_queue: Virtqueue
    tx_queue: Virtqueue
    engine: NetEngine
    wire: socket.socket
    tap: socket.socket
    rx_kick: EventFd
    tx_kick: EventFd
    rx_irq: EventFd
    tx_irq: EventFd
    fault: EventFd

    def serve(self) -> int:
        """Look at the tap and the rings once, without waiting."""
        waited = lib.net_engine_wait(self.engine._c, 0)
        return waited if waited < 0 else lib.net_engine_serve(self.engine._c)

    def arrive(self, frame: bytes) -> None:
        self.wire.send(HEADER + frame)

    def offer_rx(self, count: int, length: int = BUFFER) -> None:
        heads: list[int] = []
        for _ in range(count):
            slot = (self.rx.avail_idx + len(heads)) % RX_SIZE
            heads.append(self.rx.chain([(RX_BUFFERS + slot * 0x2000, length, WRITE)], first=slot))
        self.rx.offer(*heads)

    def received(self) -> list[tuple[int, bytes]]:
        """(head, bytes) of each used receive chain."""
        return [
            (head, self.memory.read(Gpa(RX_BUFFERS + head * 0x2000), written))
            for head, written in self.rx.take_used()
        ]

    def send(self, data: bytes, *, cuts: tuple[int, ...] = ()) -> None:
        """Offer a packet for transmission, cut into buffers at the given offsets."""
        self.memory.write(Gpa(TX_BUFFER), data)
        edges = [0, *cuts, len(data)]
        buffers = [
            (TX_BUFFER + start, end - start, 0)
            for start, end in zip(edges, edges[1:], strict=False)  # noqa: RUF007 - clearer
        ]
        self.tx.offer(self.tx.chain(buffers))

    def close(self) -> None:
        self.engine.close()
        self.wire.close()
        self.tap.close()
        for event in (self.rx_kick, self.tx_kick, self.rx_irq, self.tx_irq, self.fault):
            event.close()


def make_nic(
    memory: GuestMemory,
    *,
    mergeable: bool = True,
    event_idx: bool = False,
    rx_limiter: RateLimiter | None = None,
    tx_limiter: RateLimiter | None = None,
) -> Nic:
    """Build a network device over a memory of MEMORY bytes; to be closed before it."""
    wire, near = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    wire.setblocking(False)
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    rx = RingDriver(memory, size=RX_SIZE, base=0x10000)
    tx = RingDriver(memory, size=16, base=0x20000)
    rx_queue, tx_queue = rx.queue(event_idx=event_idx), tx.queue(event_idx=event_idx, index=1)
    rx_kick, tx_kick, rx_irq, tx_irq, fault = (EventFd() for _ in range(5))
    engine = NetEngine(
        memory, near.fileno(), rx=rx_queue, tx=tx_queue, rx_kick=rx_kick, tx_kick=tx_kick,
        rx_irq=rx_irq, tx_irq=tx_irq, fault=fault, mergeable=mergeable,
        rx_limiter=rx_limiter, tx_limiter=tx_limiter,
    )  # fmt: skip
    return Nic(
        memory, rx, tx, rx_queue, tx_queue, engine, wire, near, rx_kick, tx_kick, rx_irq, tx_irq,
        fault,
    )  # fmt: skip
