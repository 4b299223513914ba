# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""hosteld's end of a control connection: requests with deadlines, replies, notices."""

from __future__ import annotations

import asyncio
import collections
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from .. import protocol
from ..errors import ProtocolError, WorkerError, WorkerGone, WorkerTimeout

log = logging.getLogger(__name__)

# So that one chatty peer does not keep the loop from the others.
MESSAGES_PER_WAKEUP: Final = 32
# A peer that has more waiting than its socket holds answers none: the rest waits here.
MAX_IN_FLIGHT: Final = 16
MAX_TEXT_CHARS: Final = 2000


@dataclass(frozen=True, slots=True)
class Handlers:
    """What a channel calls, synchronously and in the order in which messages came.

    Attributes:
        on_reply: (op, reply) of a request that succeeded, before its caller goes on.
        on_notice: (notice, data).
        on_close: the peer has gone, or broke the protocol; not called by close().
        on_late: a reply that nobody waits for any more; whoever is called owns its descriptors.
    """

    on_reply: Callable[[str, dict[str, Any]], None]
    on_notice: Callable[[str, dict[str, Any]], None]
    on_close: Callable[[], None]
    on_late: Callable[[protocol.Message], None] = lambda late: protocol.close_all(late.fds)


@dataclass(slots=True)
class _Request:
    op: str
    future: asyncio.Future[protocol.Message]


class Channel:
    """A connection to a worker or to the zygote.

    Args:
        sock: connected, SOCK_SEQPACKET; owned by the channel from here on.
        peer: who is at the other end, for messages.
        handlers: see there.

    Threads: the event loop's.
    """

    def __init__(self, sock: socket.socket, peer: str, handlers: Handlers) -> None:
        self._sock = sock
        self._peer = peer
        self._handlers = handlers
        self._loop = asyncio.get_running_loop()
        self._next_id = 0
        self._requests: dict[int, _Request] = {}
        self._unsent: collections.deque[tuple[int, dict[str, Any], tuple[int, ...]]] = (
            collections.deque()
        )
        self._slots = asyncio.Semaphore(MAX_IN_FLIGHT)
        self._is_open = True
        sock.setblocking(False)
        self._loop.add_reader(sock.fileno(), self._on_readable)

    @property
    def is_open(self) -> bool:
        """Whether requests can be sent."""
        return self._is_open

    async def request(
        self,
        op: str,
        args: dict[str, Any] | None = None,
        fds: tuple[int, ...] = (),
        *,
        timeout_s: float,
    ) -> protocol.Message:
        """Send a request and return its reply; the caller keeps ``fds`` and owns the reply's.

        Up to MAX_IN_FLIGHT are under way; waiting for a turn counts as waiting for the answer.

        Raises:
            WorkerGone: the peer has closed the connection, or does so meanwhile.
            WorkerTimeout: no answer in time; one that comes later is dropped.
            WorkerError: the peer refused or failed.
        """
        try:
            async with asyncio.timeout(timeout_s), self._slots:
                return await self._exchange(op, args or {}, fds)
        except TimeoutError as err:
            raise WorkerTimeout(op, timeout_s) from err

    async def _exchange(
        self, op: str, args: dict[str, Any], fds: tuple[int, ...]
    ) -> protocol.Message:
        if not self._is_open:
            raise WorkerGone(f"{self._peer} is gone")
        self._next_id += 1
        request_id = self._next_id
        future: asyncio.Future[protocol.Message] = self._loop.create_future()
        self._requests[request_id] = _Request(op, future)
        try:
            self._send(request_id, {"id": request_id, "op": op, "args": args}, fds)
            return await future
        finally:
            self._requests.pop(request_id, None)
            # The descriptors are the caller's and may be closed next.
            self._unsent = collections.deque(m for m in self._unsent if m[0] != request_id)

    def drain(self) -> None:
        """Take in all that the peer has sent, to its end; for a peer that has died."""
        while self._is_open and self._receive_one():
            pass

    def close(self) -> None:
        """Close the connection; requests under way raise WorkerGone."""
        if not self._is_open:
            return
        self._is_open = False
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        self._unsent.clear()
        for request in self._requests.values():
            if not request.future.done():
                request.future.set_exception(WorkerGone(f"{self._peer} went away"))

    # --- sending

    def _send(self, request_id: int, body: dict[str, Any], fds: tuple[int, ...]) -> None:
        try:
            if self._unsent:
                raise BlockingIOError
            protocol.send(self._sock, body, fds)
        except BlockingIOError:
            self._unsent.append((request_id, body, fds))
            self._loop.add_writer(self._sock.fileno(), self._on_writable)
        except OSError as err:
            # Its end is known at once, and not when the loop comes to it: who asks again is to
            # find the connection closed, or already the next one.
            self._requests.pop(request_id, None)
            self.drain()
            raise WorkerGone(f"{self._peer}: {err.strerror}") from err

    def _on_writable(self) -> None:
        while self._unsent:
            request_id, body, fds = self._unsent[0]
            try:
                protocol.send(self._sock, body, fds)
            except BlockingIOError:
                return
            except OSError as err:
                request = self._requests.get(request_id)
                if request is not None and not request.future.done():
                    request.future.set_exception(WorkerGone(f"{self._peer}: {err.strerror}"))
            self._unsent.popleft()
        self._loop.remove_writer(self._sock.fileno())

    # --- receiving

    def _on_readable(self) -> None:
        for _ in range(MESSAGES_PER_WAKEUP):
            if not self._is_open or not self._receive_one():
                return

    def _receive_one(self) -> bool:
        """Take in one message; False when there is none for now, or none ever."""
        try:
            message = protocol.receive(self._sock)
        except BlockingIOError:
            return False
        except (ProtocolError, OSError) as err:
            log.warning("connection broken peer=%s error=%s", self._peer, err)
            message = None
        if message is None:
            self.close()
            self._handlers.on_close()
            return False
        self._dispatch(message)
        return True

    def _dispatch(self, message: protocol.Message) -> None:
        body = message.body
        if "notice" in body:
            protocol.close_all(message.fds)
            data = body.get("data")
            self._handlers.on_notice(str(body["notice"]), data if isinstance(data, dict) else {})
            return
        request = self._requests.get(body["id"]) if isinstance(body.get("id"), int) else None
        if request is None or request.future.done():
            self._handlers.on_late(message)
            return
        ok, error = body.get("ok"), body.get("error")
        if isinstance(ok, dict):
            self._handlers.on_reply(request.op, ok)
            request.future.set_result(message)
            return
        protocol.close_all(message.fds)
        fields = error if isinstance(error, dict) else {}
        request.future.set_exception(
            WorkerError(
                clean(fields.get("code", "protocol")),
                clean(fields.get("message", f"{self._peer} sent neither ok nor error")),
            )
        )


def clean(told: object, max_chars: int = MAX_TEXT_CHARS) -> str:
    r"""Return a peer's text bounded, and without the lone surrogates that "\ud800" makes in JSON.

    They are no Unicode text: no encoder of ours takes them.
    """
    return str(told)[:max_chars].encode("utf-8", "replace").decode()
