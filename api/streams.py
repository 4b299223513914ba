# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Followers: replies that go on as things happen (SSE, console logs, WebSockets).

A follower pulls: the next event or console bytes are asked for when the last ones have gone into
the socket. So a slow follower holds one batch of the service and one socket buffer, however far
behind it is. One that takes nothing for ``SEND_STALL_S`` is disconnected: the reason is queued
behind what it has not read, and it resumes from its cursor (an event id or a console offset).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, TypeVar

from starlette.exceptions import WebSocketException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from .errors import ApiError, BadRequest, Busy

T = TypeVar("T")

# What api/server.py puts into a connection's state: say this last, then hang up.
CutStream = Callable[[bytes], None]
CutSocket = Callable[[int, str], None]

_LOG = logging.getLogger(__name__)

# A follower whose socket takes nothing for this long is slower than what it follows.
SEND_STALL_S: Final = 30.0
# Below the 60 s after which common proxies drop a silent connection.
HEARTBEAT_S: Final = 15.0
# Each holds a task, a socket and one batch; the cap keeps one client from taking every fd.
MAX_FOLLOWERS: Final = 512

TOO_SLOW: Final = f"too slow: took nothing for {SEND_STALL_S:g} s; resume from your cursor"
CLOSE_DONE: Final = 1000
CLOSE_RESTART: Final = 1012
CLOSE_TOO_SLOW: Final = 1013
# 4000 + the HTTP status that the same error has elsewhere.
CLOSE_ERROR_BASE: Final = 4000
# RFC 6455, 5.5: a control frame holds 125 bytes, of which 2 are the code.
MAX_REASON_BYTES: Final = 123


class Stalled(Exception):
    """A follower took nothing for ``SEND_STALL_S``."""


class Followers:
    """All followers of one app: counted, and ended together when the daemon stops."""

    def __init__(self, limit: int = MAX_FOLLOWERS) -> None:
        self.stopping = asyncio.Event()
        self._limit = limit
        self._count = 0

    @property
    def count(self) -> int:
        """How many there are now."""
        return self._count

    @contextmanager
    def join(self) -> Iterator[None]:
        """Count one follower in.

        Raises:
            Busy: there are too many.
        """
        if self._count >= self._limit:
            raise Busy("too_many_followers", f"{self._limit} followers are the most: close some")
        self._count += 1
        try:
            yield
        finally:
            self._count -= 1

    def stop(self) -> None:
        """End them all."""
        self.stopping.set()


async def with_heartbeat(source: AsyncIterator[T], every_s: float) -> AsyncIterator[T | None]:
    """Yield what ``source`` yields, and None whenever it has been silent for ``every_s``."""
    step: asyncio.Task[T] | None = None
    try:
        while True:
            step = step or asyncio.create_task(_next(source))
            done, _ = await asyncio.wait({step}, timeout=every_s)
            if not done:
                yield None
                continue
            finished, step = step, None
            try:
                item = finished.result()
            except StopAsyncIteration:
                return
            yield item
    finally:
        if step is not None:
            await _cancel(step)
        await close_source(source)


async def _next(source: AsyncIterator[T]) -> T:
    return await anext(source)


async def close_source(source: AsyncIterator[Any]) -> None:
    """Let go of what a followed iterator holds, such as a subscription."""
    close: Callable[[], Coroutine[Any, Any, None]] | None = getattr(source, "aclose", None)
    if close is not None:
        await close()


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    """Cancel ``tasks`` and wait for their end; what they raise is no longer of interest."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class FollowResponse(Response):
    """A chunked response that ends with its source, its client or the daemon."""

    def __init__(
        self,
        source: AsyncIterator[bytes],
        followers: Followers,
        *,
        media_type: str,
        headers: Mapping[str, str],
        farewell: bytes = b"",
        complaint: bytes = b"",
    ) -> None:
        """Build the reply.

        Args:
            source: the body.
            followers: counts it and tells when the daemon stops.
            media_type: its Content-Type.
            headers: further headers.
            farewell: sent last when the daemon stops.
            complaint: sent last to a client that is too slow.
        """
        super().__init__(None, 200, headers, media_type)
        del self.headers["content-length"]
        self._source = source
        self._followers = followers
        self._farewell = farewell
        self._complaint = complaint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until one of the three ends it."""
        try:
            with self._followers.join():
                await self._stream(scope, receive, send)
        finally:
            await close_source(self._source)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_half_closed: Callable[[], bool] = scope["state"].get("is_half_closed", bool)
        if is_half_closed():
            raise BadRequest(
                "client_half_closed",
                "a follower keeps its side of the connection open: that it closes is how it leaves",
            )
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        feed = asyncio.create_task(self._feed(send))
        gone = asyncio.create_task(_disconnected(receive))
        stop = asyncio.create_task(self._followers.stopping.wait())
        try:
            await asyncio.wait({feed, gone, stop}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            is_fed = feed.done() and not feed.cancelled()
            await _cancel(gone, stop, *(() if is_fed else (feed,)))
        if is_fed and isinstance(err := feed.exception(), Stalled):
            _LOG.warning("slow follower cut path=%s stalled_s=%g", scope["path"], SEND_STALL_S)
            cut: CutStream = scope["state"].get("cut_stream", _no_transport)
            cut(self._complaint)
            return
        if is_fed and err is not None:
            raise err
        if self._followers.stopping.is_set() and not is_fed:
            await _send_in_time(send, self._farewell)
        await _send_in_time(send, b"", is_last=True)

    async def _feed(self, send: Send) -> None:
        async for data in self._source:
            await _send_in_time(send, data)


def _no_transport(*_: object) -> None:
    """Stand in for the server's cut where there is no connection (in-process clients)."""


async def _send_in_time(send: Send, data: bytes, *, is_last: bool = False) -> None:
    try:
        async with asyncio.timeout(SEND_STALL_S):
            await send({"type": "http.response.body", "body": data, "more_body": not is_last})
    except TimeoutError:
        raise Stalled from None


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def run_socket(
    websocket: WebSocket,
    followers: Followers,
    feed: Coroutine[Any, Any, None],
    *others: Coroutine[Any, Any, None],
) -> None:
    """Run an accepted WebSocket until its source, its client or the daemon ends it.

    Args:
        websocket: accepted.
        followers: tells when the daemon stops.
        feed: sends; its end closes the socket normally.
        others: one receives, and raises WebSocketDisconnect when the client goes; what one of
            them raises ends them all.
    """
    workers = [asyncio.create_task(work) for work in (feed, *others)]
    stop = asyncio.create_task(followers.stopping.wait())
    try:
        done, _ = await asyncio.wait({*workers, stop}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        finished = [task for task in workers if task.done() and not task.cancelled()]
        await _cancel(*(task for task in (*workers, stop) if not task.done()))
    errors = [err for task in finished if (err := task.exception()) is not None]
    if stop in done and not errors:
        await close_socket(websocket, CLOSE_RESTART, "the daemon is stopping; connect again")
        return
    await _close_for(websocket, errors)


async def _close_for(websocket: WebSocket, errors: list[BaseException]) -> None:
    if any(isinstance(err, WebSocketDisconnect) for err in errors):
        return
    if any(isinstance(err, Stalled) for err in errors):
        path = websocket.scope["path"]
        _LOG.warning("slow follower cut path=%s stalled_s=%g", path, SEND_STALL_S)
        cut: CutSocket = websocket.scope["state"].get("cut_socket", _no_transport)
        cut(CLOSE_TOO_SLOW, TOO_SLOW)
        return
    for err in errors:
        if isinstance(err, WebSocketException):
            await close_socket(websocket, err.code, err.reason)
            return
        if not isinstance(err, ApiError):
            raise err
        await close_socket(websocket, CLOSE_ERROR_BASE + err.status, err.detail)
        return
    await close_socket(websocket, CLOSE_DONE, "the end")


async def close_socket(websocket: WebSocket, code: int, reason: str) -> None:
    """Close with a reason cut to what a close frame holds; a client that is gone is no error."""
    if websocket.client_state is WebSocketState.DISCONNECTED:
        return
    text = reason.encode()[:MAX_REASON_BYTES].decode(errors="ignore")
    try:
        async with asyncio.timeout(SEND_STALL_S):
            await websocket.close(code, text)
    except (TimeoutError, WebSocketDisconnect):
        _LOG.debug("websocket gone before its close code=%d", code)


async def send_bytes_in_time(websocket: WebSocket, data: bytes) -> None:
    """Send one binary frame.

    Raises:
        Stalled: the socket took nothing for ``SEND_STALL_S``.
    """
    await _frame_in_time(websocket.send_bytes(data))


async def send_text_in_time(websocket: WebSocket, text: str) -> None:
    """Send one text frame.

    Raises:
        Stalled: the socket took nothing for ``SEND_STALL_S``.
    """
    await _frame_in_time(websocket.send_text(text))


async def _frame_in_time(sending: Coroutine[Any, Any, None]) -> None:
    try:
        async with asyncio.timeout(SEND_STALL_S):
            await sending
    except TimeoutError:
        raise Stalled from None
