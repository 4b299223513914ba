# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A switch over vhost-user for the tests: each frame goes to all other ports, or back if alone.

Written from the specifications and not from the code under test: QEMU docs/interop/vhost-user.rst;
VIRTIO 1.2, 2.7 and 5.1. It has no CONFIG, no REPLY_ACK and no in-flight memory, as simple switches.
"""

from __future__ import annotations

import array
import mmap
import os
import selectors
import socket
import struct
import threading
from dataclasses import dataclass, field
from pathlib import Path

FEATURES = 1 << 32 | 1 << 30  # VERSION_1, PROTOCOL_FEATURES
RX, TX = 0, 1
NEXT = 1
HEADER_BYTES = 12  # struct virtio_net_hdr


@dataclass
class Ring:
    """One queue of a port."""

    size: int = 0
    desc: int = 0
    avail: int = 0
    used: int = 0
    next: int = 0
    kick: int = -1
    call: int = -1


@dataclass
class Port:
    """One connection: a guest's interface."""

    sock: socket.socket
    regions: list[tuple[int, int, mmap.mmap, int]] = field(default_factory=list)
    rings: dict[int, Ring] = field(default_factory=lambda: {RX: Ring(), TX: Ring()})

    def at(self, gpa: int, length: int) -> memoryview:
        """Return guest memory; this front end uses guest addresses for its own."""
        for start, size, mapped, offset in self.regions:
            if start <= gpa and gpa + length <= start + size:
                place = gpa - start + offset
                return memoryview(mapped)[place : place + length]
        raise ValueError(f"no guest memory at {gpa:#x}")

    def u16(self, gpa: int) -> int:
        return int.from_bytes(self.at(gpa, 2), "little")

    def pop(self, ring: Ring) -> tuple[int, list[memoryview]] | None:
        if ring.kick < 0 or self.u16(ring.avail + 2) == ring.next:
            return None
        head = index = self.u16(ring.avail + 4 + 2 * (ring.next % ring.size))
        ring.next = (ring.next + 1) & 0xFFFF
        buffers, flags = [], NEXT
        while flags & NEXT:
            raw = self.at(ring.desc + 16 * index, 16)
            gpa, length, flags, index = struct.unpack("<QIHH", raw)
            buffers.append(self.at(gpa, length))
        return head, buffers

    def push(self, ring: Ring, head: int, written: int) -> None:
        idx = self.u16(ring.used + 2)
        self.at(ring.used + 4 + 8 * (idx % ring.size), 8)[:] = struct.pack("<II", head, written)
        self.at(ring.used + 2, 2)[:] = struct.pack("<H", (idx + 1) & 0xFFFF)
        if ring.call >= 0:
            os.eventfd_write(ring.call, 1)


class Hub:
    """Listens on a path until it is closed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(4)
        self._stop = os.eventfd(0)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._stop, selectors.EVENT_READ, lambda: None)
        self._ports: list[Port] = []
        self._is_open = True
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Hang up on all, and remove the socket."""
        self._is_open = False
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        for port in list(self._ports):
            self._drop(port)
        self._listener.close()
        self._selector.close()
        os.close(self._stop)
        self.path.unlink()

    @property
    def n_ports(self) -> int:
        """How many guests' interfaces are connected."""
        return len(self._ports)

    def _run(self) -> None:
        while self._is_open:
            for key, _ in self._selector.select():
                if key.fd in self._selector.get_map():
                    key.data()

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        port = Port(sock)
        self._ports.append(port)
        self._selector.register(sock, selectors.EVENT_READ, lambda: self._serve(port))

    def _drop(self, port: Port) -> None:
        self._ports.remove(port)
        self._selector.unregister(port.sock)
        port.sock.close()
        for ring in port.rings.values():
            self._set_kick(port, ring, -1)
            _close(ring.call)
        self._unmap(port)

    def _unmap(self, port: Port) -> None:
        for _, _, mapped, _ in port.regions:
            mapped.close()
        port.regions = []

    # --- messages

    def _serve(self, port: Port) -> None:
        head, ancillary, _, _ = port.sock.recvmsg(12, socket.CMSG_SPACE(8 * 4))
        if len(head) < 12:
            self._drop(port)
            return
        fds = array.array("i")
        for _, _, data in ancillary:
            fds.frombytes(data)
        request, _, size = struct.unpack("<III", head)
        payload = port.sock.recv(size, socket.MSG_WAITALL) if size else b""
        self._handle(port, request, payload, list(fds))

    def _handle(self, port: Port, request: int, payload: bytes, fds: list[int]) -> None:
        if request in (1, 15):  # GET_FEATURES, GET_PROTOCOL_FEATURES
            value = FEATURES if request == 1 else 0
            port.sock.send(struct.pack("<IIIQ", request, 5, 8, value))
        elif request == 5:  # SET_MEM_TABLE
            self._unmap(port)
            for index, fd in enumerate(fds):
                gpa, size, _, offset = struct.unpack_from("<QQQQ", payload, 8 + 32 * index)
                port.regions.append((gpa, size, mmap.mmap(fd, offset + size), offset))
                os.close(fd)
        elif request == 9:  # SET_VRING_ADDR
            index, _, desc, used, avail, _ = struct.unpack("<IIQQQQ", payload)
            ring = port.rings[index]
            ring.desc, ring.used, ring.avail = desc, used, avail
        elif request in (8, 10, 11):
            self._handle_state(port, request, *struct.unpack("<II", payload))
        elif request in (12, 13, 14):
            self._handle_fd(port, request, payload[0], fds)

    def _handle_state(self, port: Port, request: int, index: int, value: int) -> None:
        ring = port.rings[index]
        if request == 8:  # SET_VRING_NUM
            ring.size = value
        elif request == 10:  # SET_VRING_BASE
            ring.next = value
        else:  # GET_VRING_BASE
            self._set_kick(port, ring, -1)
            port.sock.send(struct.pack("<IIIII", request, 5, 8, index, ring.next))

    def _handle_fd(self, port: Port, request: int, index: int, fds: list[int]) -> None:
        ring = port.rings[index]
        fd = fds[0] if fds else -1
        if request == 12:  # SET_VRING_KICK
            self._set_kick(port, ring, fd)
        elif request == 13:  # SET_VRING_CALL
            _close(ring.call)
            ring.call = fd
        else:
            _close(fd)

    def _set_kick(self, port: Port, ring: Ring, fd: int) -> None:
        if ring.kick >= 0:
            self._selector.unregister(ring.kick)
            os.close(ring.kick)
        ring.kick = fd
        if fd >= 0:
            self._selector.register(fd, selectors.EVENT_READ, lambda: self._on_kick(port, fd))

    # --- frames

    def _on_kick(self, port: Port, kick: int) -> None:
        os.eventfd_read(kick)
        ring = port.rings[TX]
        while (chain := port.pop(ring)) is not None:
            head, buffers = chain
            frame = b"".join(bytes(buffer) for buffer in buffers)[HEADER_BYTES:]
            port.push(ring, head, 0)
            for other in [o for o in self._ports if o is not port and o.rings[RX].kick >= 0] or [
                port
            ]:
                self._deliver(other, frame)

    def _deliver(self, port: Port, frame: bytes) -> None:
        ring = port.rings[RX]
        chain = port.pop(ring)
        if chain is None:
            return  # no room: dropped, as a wire does
        head, buffers = chain
        # num_buffers is 1: the last field of the header, which VERSION_1 always has.
        left = memoryview(bytes(10) + b"\1\0" + frame)
        written = len(left)
        for buffer in buffers:
            piece = left[: len(buffer)]
            buffer[: len(piece)] = piece
            left = left[len(piece) :]
        port.push(ring, head, written)


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)
