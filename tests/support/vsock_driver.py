# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A synthetic vsock driver and the host's programs around an engine: VIRTIO 1.2, 5.10.6.

Packets are built and read by themselves, without the code under test.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvm_ffi._kvm import lib
from kvm_ffi.eventfd import EventFd
from kvm_ffi.memory import GuestMemory
from kvm_ffi.types import Gpa
from kvm_ffi.vsock_engine import VsockEngine
from tests.support.ring_driver import WRITE, RingDriver

CID: Final = 77
HOST: Final = 2
STREAM: Final = 1
REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = range(1, 8)
RCV, SEND, BOTH = 1, 2, 3
HEADER: Final = struct.Struct("<QQIIIHHIII")
NAME: Final = "v.sock"
RING_SIZE: Final = 256
RX_BUFFERS: Final = 0x100000
TX_BUFFER: Final = 0x600000
MEMORY_BYTES: Final = 8 << 20
LONG_S: Final = 30.0


@dataclass(frozen=True)
class Packet:
    """One packet, in either direction."""

    op: int
    src_port: int
    dst_port: int
    data: bytes = b""
    flags: int = 0
    buf_alloc: int = 1 << 20
    fwd_cnt: int = 0
    src_cid: int = CID
    dst_cid: int = HOST
    type: int = STREAM
    length: int | None = None  # what the header says, when that is not the truth

    def pack(self) -> bytes:
        length = len(self.data) if self.length is None else self.length
        header = HEADER.pack(
            self.src_cid, self.dst_cid, self.src_port, self.dst_port, length, self.type, self.op,
            self.flags, self.buf_alloc, self.fwd_cnt,
        )  # fmt: skip
        return header + self.data

    @classmethod
    def unpack(cls, raw: bytes) -> Packet:
        src, dst, src_port, dst_port, length, kind, op, flags, alloc, fwd = HEADER.unpack_from(raw)
        data = raw[HEADER.size :]
        assert len(data) == length
        return cls(op, src_port, dst_port, data, flags, alloc, fwd, src, dst, kind)


class Vsock:
    """A vsock engine, its driver, and a directory of the host."""

    def __init__(
        self,
        directory: Path,
        *,
        event_idx: bool = False,
        buffer_bytes: int = 4096,
        **options: float,
    ) -> None:
        self.directory = directory
        self.memory = GuestMemory([(Gpa(0), MEMORY_BYTES)])
        self.rx = RingDriver(self.memory, size=RING_SIZE, base=0x10000)
        self.tx = RingDriver(self.memory, size=RING_SIZE, base=0x20000)
        self.rx_queue = self.rx.queue(event_idx=event_idx)
        self.tx_queue = self.tx.queue(event_idx=event_idx, index=1)
        self.rx_kick, self.tx_kick, self.rx_irq, self.tx_irq, self.fault = (
            EventFd() for _ in range(5)
        )
        self.buffer_bytes = buffer_bytes
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(directory / NAME))
        self.listener.listen(1024)
        self.directory_fd = os.open(directory, os.O_PATH | os.O_DIRECTORY)
        self.engine = VsockEngine(
            self.memory,
            guest_cid=CID,
            listener_fd=self.listener.fileno(),
            directory_fd=self.directory_fd,
            name=NAME,
            rx=self.rx_queue,
            tx=self.tx_queue,
            rx_kick=self.rx_kick,
            tx_kick=self.tx_kick,
            rx_irq=self.rx_irq,
            tx_irq=self.tx_irq,
            fault=self.fault,
            **options,
        )
        self._sockets: list[socket.socket] = []

    def close(self) -> None:
        self.engine.close()
        for sock in (*self._sockets, self.listener):
            sock.close()
        os.close(self.directory_fd)
        for event in (self.rx_kick, self.tx_kick, self.rx_irq, self.tx_irq, self.fault):
            event.close()
        self.memory.close()

    # --- the host's programs

    def dial(self) -> socket.socket:
        """Connect to the listener."""
        sock = self._keep(socket.socket(socket.AF_UNIX))
        sock.connect(str(self.directory / NAME))
        sock.setblocking(False)
        return sock

    def listen(self, port: int, backlog: int = 64) -> socket.socket:
        """Listen where the guest's connections to a port arrive."""
        sock = self._keep(socket.socket(socket.AF_UNIX))
        sock.bind(str(self.directory / f"{NAME}_{port}"))
        sock.listen(backlog)
        sock.setblocking(False)
        return sock

    def accept(self, listener: socket.socket) -> socket.socket:
        sock = self._keep(listener.accept()[0])
        sock.setblocking(False)
        return sock

    def _keep(self, sock: socket.socket) -> socket.socket:
        self._sockets.append(sock)
        return sock

    # --- the guest's driver

    def offer_rx(self, count: int = RING_SIZE, length: int | None = None) -> None:
        """Offer receive buffers, and kick."""
        length = self.buffer_bytes if length is None else length
        heads = []
        for index in range(count):
            slot = (self.rx.avail_idx + index) % RING_SIZE
            gpa = RX_BUFFERS + slot * self.buffer_bytes
            heads.append(self.rx.chain([(gpa, length, WRITE)], first=slot))
        self.rx.offer(*heads)
        self.rx_kick.signal()

    def received(self) -> list[Packet]:
        """Packets since the last call; the buffers are not offered again."""
        return [
            Packet.unpack(self.memory.read(Gpa(RX_BUFFERS + head * self.buffer_bytes), written))
            for head, written in self.rx.take_used()
        ]

    def send(self, packet: Packet, cuts: Sequence[int] = ()) -> None:
        """Offer a packet, cut into buffers at the given offsets, and kick."""
        self.send_raw(packet.pack(), cuts)

    def send_raw(self, raw: bytes, cuts: Sequence[int] = ()) -> None:
        self.memory.write(Gpa(TX_BUFFER), raw)
        edges = [0, *cuts, len(raw)]
        buffers = [(TX_BUFFER + start, end - start, 0) for start, end in itertools.pairwise(edges)]
        self.tx.offer(self.tx.chain(buffers))
        self.tx_kick.signal()

    # --- the engine, step by step

    def serve(self) -> int:
        """Look at everything until there is nothing more to do."""
        quiet = 0
        while quiet < 3:  # what one round accepts is ready for the next
            waited = lib.vsock_engine_wait(self.engine._c, 0)
            assert waited == 0, errno.errorcode[-waited]
            ret = lib.vsock_engine_serve(self.engine._c)
            if ret < 0:
                return ret
            quiet = 0 if ret > 0 else quiet + 1
        return 0

    def exchange(self, *packets: Packet) -> list[Packet]:
        """Send packets one by one; what came back."""
        for packet in packets:
            self.send(packet)
            assert self.serve() == 0
        assert self.serve() == 0
        return self.received()
