# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""vhost-user messages as a front end speaks them, on a connected stream socket.

A back end is trusted with guest memory and with nothing else: each of its answers has a deadline,
a size and a form that are checked before use, and whatever does not fit ends the conversation.

Source: QEMU docs/interop/vhost-user.rst, "Message Specification".
"""

from __future__ import annotations

import array
import contextlib
import select
import socket
import struct
import time
from collections.abc import Sequence
from typing import Final

from devices.errors import BackendError

# Front-end message types.
GET_FEATURES: Final = 1
SET_FEATURES: Final = 2
SET_OWNER: Final = 3
SET_MEM_TABLE: Final = 5
SET_VRING_NUM: Final = 8
SET_VRING_ADDR: Final = 9
SET_VRING_BASE: Final = 10
GET_VRING_BASE: Final = 11
SET_VRING_KICK: Final = 12
SET_VRING_CALL: Final = 13
SET_VRING_ERR: Final = 14
GET_PROTOCOL_FEATURES: Final = 15
SET_PROTOCOL_FEATURES: Final = 16
SET_VRING_ENABLE: Final = 18
SET_BACKEND_REQ_FD: Final = 21
GET_CONFIG: Final = 24
GET_INFLIGHT_FD: Final = 31
SET_INFLIGHT_FD: Final = 32

# Back-end message types; the others are not negotiated.
BACKEND_CONFIG_CHANGE: Final = 2

# Bit masks. The first is a virtio feature bit, the others are protocol features.
VHOST_USER_F_PROTOCOL_FEATURES: Final = 1 << 30
PROTOCOL_F_MQ: Final = 1 << 0
PROTOCOL_F_REPLY_ACK: Final = 1 << 3
PROTOCOL_F_BACKEND_REQ: Final = 1 << 5
PROTOCOL_F_CONFIG: Final = 1 << 9
PROTOCOL_F_INFLIGHT_SHMFD: Final = 1 << 12

_VERSION: Final = 1
_VERSION_MASK: Final = 3
_FLAG_REPLY: Final = 1 << 2
_FLAG_NEED_REPLY: Final = 1 << 3

HEADER: Final = struct.Struct("<III")  # request, flags, bytes of payload
U64: Final = struct.Struct("<Q")
VRING_STATE: Final = struct.Struct("<II")  # queue index, number
VRING_ADDR: Final = struct.Struct("<IIQQQQ")  # index, flags, descriptors, used, available, log
MEM_TABLE: Final = struct.Struct("<I4x")  # count; then so many regions
MEM_REGION: Final = struct.Struct("<QQQQ")  # guest address, size, front end's address, file offset
MAX_MEM_REGIONS: Final = 8
CONFIG: Final = struct.Struct("<III")  # offset, size, flags; then the bytes
MAX_CONFIG_BYTES: Final = 256
INFLIGHT: Final = struct.Struct("<QQHH")  # bytes, offset, queues, entries of a queue
# libvhost-user takes the structure with the padding of a C compiler, and nothing else.
INFLIGHT_PADDING: Final = bytes(4)

# The largest that a back end may send: a config space. So no length of its own sizes a buffer.
MAX_REPLY_BYTES: Final = CONFIG.size + MAX_CONFIG_BYTES
# A back end answers in microseconds; the slowest answer is that to a memory table, which it maps.
REPLY_TIMEOUT_S: Final = 5.0


class Conversation:
    """A front end's side of one connection.

    Args:
        sock: connected SOCK_STREAM Unix socket; owned from now on.
        peer: what the back end is called in errors.
        timeout_s: for each message and its answer.

    Threads: one at a time; the owner has a lock.
    """

    def __init__(self, sock: socket.socket, peer: str, timeout_s: float = REPLY_TIMEOUT_S) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._peer = peer
        self._timeout_s = timeout_s
        self.has_reply_ack = False

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._sock.fileno()

    def close(self) -> None:
        """Hang up, also for who holds a duplicate of the descriptor."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def tell(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send a message that has no answer of its own; with REPLY_ACK, see that it was done.

        Raises:
            BackendError: hung up, too slow, refused, or not to be understood.
        """
        flags = _VERSION | (_FLAG_NEED_REPLY if self.has_reply_ack else 0)
        deadline = self._send(request, flags, payload, fds)
        if self.has_reply_ack:
            answer, _ = self._receive(request, deadline, (U64.size, U64.size))
            (status,) = U64.unpack(answer)
            if status != 0:
                raise self._error(f"refused message {request} with {status:#x}")

    def ask(self, request: int, payload: bytes = b"", *, sizes: tuple[int, int]) -> bytes:
        """Send a message and return its answer's payload, of at least and at most ``sizes`` bytes.

        Raises:
            BackendError: as tell().
        """
        answer, fd = self._ask(request, payload, sizes)
        if fd is not None:
            socket.close(fd)
            raise self._error(f"sent a descriptor with its answer to {request}")
        return answer

    def ask_for_fd(
        self, request: int, payload: bytes = b"", *, sizes: tuple[int, int]
    ) -> tuple[bytes, int]:
        """Send a message whose answer brings one descriptor, which the caller then owns.

        Raises:
            BackendError: as tell().
        """
        answer, fd = self._ask(request, payload, sizes)
        if fd is None:
            raise self._error(f"sent no descriptor with its answer to {request}")
        return answer, fd

    def ask_u64(self, request: int) -> int:
        """Send a message whose answer is a 64-bit number.

        Raises:
            BackendError: as tell().
        """
        (value,) = U64.unpack(self.ask(request, sizes=(U64.size, U64.size)))
        return int(value)

    def _ask(
        self, request: int, payload: bytes, sizes: tuple[int, int]
    ) -> tuple[bytes, int | None]:
        deadline = self._send(request, _VERSION, payload, ())
        return self._receive(request, deadline, sizes)

    def _send(self, request: int, flags: int, payload: bytes, fds: Sequence[int]) -> float:
        deadline = time.monotonic() + self._timeout_s
        data = HEADER.pack(request, flags, len(payload)) + payload
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        while data:
            try:
                sent = self._sock.sendmsg([data], rights, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._wait(select.POLLOUT, deadline, request)
                continue
            except OSError as err:
                raise self._error(f"message {request}: {err.strerror}") from err
            data, rights = data[sent:], []
        return deadline

    def _receive(
        self, request: int, deadline: float, sizes: tuple[int, int]
    ) -> tuple[bytes, int | None]:
        fds: list[int] = []
        try:
            head = self._read(HEADER.size, deadline, request, fds)
            got, flags, size = HEADER.unpack(head)
            if got != request or flags & ~_FLAG_NEED_REPLY != _VERSION | _FLAG_REPLY:
                raise self._error(f"answered {request} with message {got} flags {flags:#x}")
            if not sizes[0] <= size <= sizes[1]:
                raise self._error(
                    f"answered {request} with {size} bytes, not {sizes[0]}..{sizes[1]}"
                )
            payload = self._read(size, deadline, request, None)
            if len(fds) > 1:
                raise self._error(f"sent {len(fds)} descriptors with its answer to {request}")
        except BackendError:
            for fd in fds:
                socket.close(fd)
            raise
        return payload, fds[0] if fds else None

    def _read(self, size: int, deadline: float, request: int, fds: list[int] | None) -> bytes:
        """Read exactly ``size`` bytes; descriptors go to ``fds``, or nowhere."""
        data = b""
        space = 0 if fds is None else socket.CMSG_SPACE(4)
        while len(data) < size:
            try:
                piece, rights, flags, _ = self._sock.recvmsg(
                    size - len(data), space, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                self._wait(select.POLLIN, deadline, request)
                continue
            except OSError as err:
                raise self._error(f"message {request}: {err.strerror}") from err
            for _level, _kind, cmsg in rights:
                if fds is not None:
                    fds.extend(array.array("i", cmsg[: len(cmsg) - len(cmsg) % 4]))
            if flags & socket.MSG_CTRUNC:
                raise self._error(f"sent descriptors that nobody asked for, at message {request}")
            if not piece:
                raise self._error(f"hung up at message {request}")
            data += piece
        return data

    def _wait(self, events: int, deadline: float, request: int) -> None:
        poller = select.poll()
        poller.register(self._sock, events)
        left_s = deadline - time.monotonic()
        if left_s <= 0 or not poller.poll(left_s * 1000):
            raise self._error(f"did not take or answer message {request} in {self._timeout_s:g} s")

    def _error(self, reason: str) -> BackendError:
        return BackendError(self._peer, reason)


class BackendRequests:
    """The other direction: what a back end asks of its front end, on a socket pair of its own.

    Threads: one at a time.
    """

    # More than one wakeup takes in; a partial message waits in the socket's buffer and in ours.
    READ_BYTES: Final = 4096

    def __init__(self, peer: str) -> None:
        self._sock, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.setblocking(False)
        self._peer = peer
        self._unread = b""

    def fileno(self) -> int:
        """Return our end's descriptor."""
        return self._sock.fileno()

    def receive(self) -> bool:
        """Take in and answer what is there; whether the config space has changed.

        Raises:
            BackendError: hung up, or sent something that is no message.
        """
        try:
            data = self._sock.recv(self.READ_BYTES)
        except BlockingIOError:
            return False
        except OSError as err:
            raise BackendError(self._peer, f"its requests: {err.strerror}") from err
        if not data:
            raise BackendError(self._peer, "closed its request channel")
        try:
            requests, self._unread = split_requests(self._unread + data)
            for request, flags in requests:
                if flags & _FLAG_NEED_REPLY:
                    self._answer(request, int(request != BACKEND_CONFIG_CHANGE))
        except (ValueError, OSError) as err:
            raise BackendError(self._peer, f"its requests: {err}") from err
        return any(request == BACKEND_CONFIG_CHANGE for request, _ in requests)

    def _answer(self, request: int, status: int) -> None:
        reply = HEADER.pack(request, _VERSION | _FLAG_REPLY, U64.size) + U64.pack(status)
        if self._sock.send(reply, socket.MSG_NOSIGNAL) != len(reply):
            raise ValueError("it does not read its answers")

    def close(self) -> None:
        """Close both ends."""
        self._sock.close()
        self.theirs.close()


def split_requests(data: bytes) -> tuple[list[tuple[int, int]], bytes]:
    """Split bytes of a back end into (request, flags) pairs and the incomplete rest.

    Raises:
        ValueError: not a message, or larger than any that could be meant.
    """
    requests = []
    while len(data) >= HEADER.size:
        request, flags, size = HEADER.unpack_from(data)
        if flags & ~_FLAG_NEED_REPLY != _VERSION or size > MAX_REPLY_BYTES:
            raise ValueError(f"message {request} with flags {flags:#x} and {size} bytes")
        if len(data) < HEADER.size + size:
            break
        requests.append((request, flags))
        data = data[HEADER.size + size :]
    return requests, data
