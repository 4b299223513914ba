# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Runs the app under uvicorn: on the Unix socket, and on a loopback TCP socket where configured.

uvicorn's protocols are extended where a hostile or broken client could otherwise hold a
connection: a request's head has a deadline and a size, connections are counted, and every reply,
also to bytes that are not HTTP, is a problem. The kernel's word on who is at the other end of a
Unix socket goes into ``scope["state"]["peer"]``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
import sys
from collections.abc import Iterator
from typing import Any, Final, cast

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from .auth import Peer
from .errors import ApiError, BadRequest, Busy, RequestTimeout, TooLarge
from .problem import PROBLEM_TYPE
from .streams import Followers

_LOG = logging.getLogger(__name__)

# From the first byte of a request, or from the connection's begin, to the end of its head.
HEAD_DEADLINE_S: Final = 10.0
# The parser has no limit of its own: an endless head would fill the memory.
MAX_HEAD_BYTES: Final = 64 * 1024
# Well below the usual limit of open files, of which each VM needs about ten. Each listener has its
# own count: who may come in over TCP without a token cannot shut the Unix socket's callers out.
MAX_CONNECTIONS: Final = 1024
MAX_TCP_CONNECTIONS: Final = 256
KEEP_ALIVE_S: Final = 75
GRACE_S: Final = 5.0
# Then they are cancelled, which each may tell its client.
LAST_WORDS_S: Final = 1.0
# A client that takes nothing of an ordinary reply for this long is cut off.
REPLY_STALL_S: Final = 30.0
# How long a follower that is cut may take to read why.
LINGER_S: Final = 5.0
# Consoles are typed into by people; larger frames are refused.
MAX_FRAME_BYTES: Final = 64 * 1024
# A client that answers no ping for the two together is gone.
PING_INTERVAL_S: Final = 20.0
PING_TIMEOUT_S: Final = 20.0
# A tick keeps the Date header right; shutdown does not wait for it.
TICK_S: Final = 1.0
_TICKS_OF_UVICORN: Final = 10


def peer_of(transport: asyncio.BaseTransport) -> Peer | None:
    """Return who is at the other end of a Unix socket; None for TCP.

    Source: unix(7), SO_PEERCRED: the credentials at the time of connect(2).
    """
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family != socket.AF_UNIX:
        return None
    # struct ucred: pid_t, uid_t, gid_t
    size = struct.calcsize("iII")
    return Peer(*struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)))


def listener_of(transport: asyncio.BaseTransport) -> int:
    """Return through which listener a connection came: its socket's address family, or -1."""
    sock = transport.get_extra_info("socket")
    return -1 if sock is None else int(sock.family)


class HostelHttp(HttpToolsProtocol):
    """One connection: peer credentials, a bounded head, problems for what is not HTTP."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  uvicorn's own
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._unsent_bytes = 0
        self._is_half_closed = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Find out who connects; the first head's deadline begins."""
        super().connection_made(transport)
        self.app_state = {
            **self.app_state,
            "cut_stream": self._cut,
            "is_half_closed": lambda: self._is_half_closed,
        }
        peer = peer_of(transport)
        if peer is not None:
            self.app_state["peer"] = peer
        listener = listener_of(transport)
        limit = MAX_CONNECTIONS if peer is not None else MAX_TCP_CONNECTIONS
        if sum(listener_of(other.transport) == listener for other in self.connections) > limit:
            self._refuse(Busy("too_many_connections", f"{limit} connections are open"))
            return
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the deadlines."""
        self._disarm()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Stay open for the reply to a client that has sent all it will (``nc -N``).

        Not in the middle of a request, and not under a follower: to it, the end of what the
        client sends is the only sign that the client has gone.
        """
        if not self._is_replying() or self.cycle.more_body or self.cycle.chunked_encoding:
            return False
        self._is_half_closed = True
        # The cycle is the last request's: what is queued before it is answered too.
        self.cycle.keep_alive = False
        return True

    def pause_writing(self) -> None:
        """The client reads more slowly than we write: a deadline begins."""
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        """The client reads."""
        super().resume_writing()
        # Whatever is written next is more than nothing: the deadline begins anew.
        self._unsent_bytes = sys.maxsize

    def on_response_complete(self) -> None:
        """A reply is written; a client that never reads it would keep the connection for ever."""
        super().on_response_complete()
        if self.transport.get_write_buffer_size() > 0:
            self._watch_writing()

    def data_received(self, data: bytes) -> None:
        """Parse; count what belongs to a head."""
        if self._head_timer is None and not self._is_replying():
            self._await_head()
        super().data_received(data)
        if self._head_timer is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(TooLarge("head_too_large", f"at most {MAX_HEAD_BYTES} bytes of head"))

    def on_message_begin(self) -> None:
        """A head begins, perhaps behind a request that is still being answered."""
        super().on_message_begin()
        if self._head_timer is None:
            self._await_head()

    def on_headers_complete(self) -> None:
        """The head is there: its deadline is off."""
        self._disarm()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are not HTTP."""
        self._refuse(BadRequest("malformed_http", f"{msg.rstrip('.')}: send HTTP/1.1"))

    def _is_replying(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is not None and not cycle.response_complete

    def _watch_writing(self) -> None:
        if self._write_timer is None:
            self._unsent_bytes = self.transport.get_write_buffer_size()
            self._write_timer = self.loop.call_later(REPLY_STALL_S, self._check_writing)

    def _check_writing(self) -> None:
        self._write_timer = None
        unsent = self.transport.get_write_buffer_size()
        if unsent == 0:
            return
        is_following = self._is_replying() and self.cycle.chunked_encoding
        # A follower has a deadline of its own, with a last word.
        if unsent >= self._unsent_bytes and not is_following:
            _LOG.warning("client cut, it does not read stalled_s=%g", REPLY_STALL_S)
            self.transport.abort()
            return
        self._watch_writing()

    def _await_head(self) -> None:
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(HEAD_DEADLINE_S, self._head_is_late)

    def _disarm(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._refuse(
            RequestTimeout("head_timeout", f"no whole head came within {HEAD_DEADLINE_S:g} s")
        )

    def _refuse(self, error: ApiError) -> None:
        """Answer without the app and hang up."""
        self._disarm()
        if self._is_replying():
            self.transport.abort()
        if self.transport.is_closing():
            return
        body = error.problem().model_dump_json(exclude_none=True).encode()
        head = (
            f"Content-Type: {PROBLEM_TYPE}\r\nContent-Length: {len(body)}\r\n"
            "Connection: close\r\n\r\n"
        )
        self.transport.write(STATUS_LINE[error.status] + head.encode() + body)
        self.transport.close()

    def _cut(self, last_words: bytes) -> None:
        """Hang up on a follower that does not read; it has a moment to see why.

        Called with its chunked reply begun and not ended.
        """
        if last_words:
            self.transport.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(last_words), last_words))
        self.transport.close()
        self.loop.call_later(LINGER_S, self.transport.abort)


class HostelWebSocket(WebSocketsSansIOProtocol):
    """One WebSocket, which can be cut while it does not read."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  uvicorn's own
        super().__init__(*args, **kwargs)
        self.app_state = {**self.app_state, "cut_socket": self._cut}

    def _cut(self, code: int, reason: str) -> None:
        self.conn.send_close(code, reason)
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        self.transport.close()
        self.loop.call_later(LINGER_S, self.transport.abort)


class _Server(uvicorn.Server):
    """uvicorn's server, stopped by an event; signals belong to the daemon."""

    def __init__(self, config: uvicorn.Config, stop: asyncio.Event, followers: Followers) -> None:
        super().__init__(config)
        self._stop = stop
        self._followers = followers

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield

    async def main_loop(self) -> None:
        """Wait for the stop; uvicorn's own loop would wake ten times a second."""
        while not self._stop.is_set():
            # A multiple of its ten, on which it renews the Date header.
            await self.on_tick(_TICKS_OF_UVICORN)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), TICK_S)
        self._followers.stop()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let what is cancelled say so before the loop ends."""
        await super().shutdown(sockets)
        if self.server_state.tasks:
            await asyncio.wait(set(self.server_state.tasks), timeout=LAST_WORDS_S)


async def serve(
    app: FastAPI,
    *,
    socket: socket.socket,
    tcp_socket: socket.socket | None,
    stop: asyncio.Event,
    grace_s: float = GRACE_S,
) -> None:
    """Serve until ``stop`` is set and the running requests have ended or had their time.

    Args:
        app: from `api.app.create_app`.
        socket: bound Unix socket, listening or not; closed at the end.
        tcp_socket: bound loopback TCP socket, or None.
        stop: set it to stop; followers are ended at once.
        grace_s: how long running requests may go on then; what is left is answered 503.
    """
    config = uvicorn.Config(
        app,
        http=HostelHttp,
        ws=HostelWebSocket,
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        # uvicorn types it as whole seconds and hands it to asyncio.wait_for, which takes any.
        timeout_graceful_shutdown=cast(int, grace_s),
        ws_max_size=MAX_FRAME_BYTES,
        ws_ping_interval=PING_INTERVAL_S,
        ws_ping_timeout=PING_TIMEOUT_S,
        ws_per_message_deflate=False,
    )
    sockets = [socket] if tcp_socket is None else [socket, tcp_socket]
    await _Server(config, stop, app.state.followers).serve(sockets)
