# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The worker's control socket: one connection to hosteld at a time, the newest wins."""

from __future__ import annotations

import collections
import logging
import selectors
import socket
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from .. import protocol
from ..errors import ProtocolError, WorkerError

log = logging.getLogger(__name__)

Handler = Callable[[str, dict[str, Any], tuple[int, ...]], dict[str, Any]]
FdHandler = Callable[[dict[str, Any], tuple[int, ...]], dict[str, Any]]

# A hosteld that is slow to read gets this many messages later; one that does not read at all is
# hung up on, and asks for the status when it comes back.
MAX_UNSENT: Final = 256


class ControlServer:
    """Answers requests that come over a SOCK_SEQPACKET socket.

    A later connection replaces the one before: it is a restarted hosteld. A connection that breaks
    the protocol, or that does not read, is closed; the guest runs on and hosteld may come back.

    Args:
        listener: where connections come in; None if adopt() brings the only one.
        handler: called as handler(op, args, fds), returns the reply or raises WorkerError; it owns
            the descriptors that it is given.

    Threads: the worker's main thread only.
    """

    def __init__(
        self, listener: socket.socket | None, selector: selectors.BaseSelector, handler: Handler
    ) -> None:
        self._listener = listener
        self._selector = selector
        self._handler = handler
        self._peer: socket.socket | None = None
        self._unsent: collections.deque[dict[str, Any]] = collections.deque()
        if listener is not None:
            listener.setblocking(False)
            selector.register(listener, selectors.EVENT_READ, partial(self._accept, listener))

    def adopt(self, peer: socket.socket) -> None:
        """Serve a connection, owned from here on, instead of the one before."""
        self._hang_up()
        peer.setblocking(False)
        self._peer = peer
        self._selector.register(peer, selectors.EVENT_READ, self._serve)

    def notify(self, notice: str, data: dict[str, Any]) -> None:
        """Tell hosteld, if it is there; one that is not asks for the status when it comes."""
        if self._peer is not None:
            self._send({"notice": notice, "data": data})

    def close(self) -> None:
        """Close the connection and the listener."""
        self._hang_up()
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()

    def _accept(self, listener: socket.socket) -> None:
        try:
            peer, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError as err:
            log.warning("control connection not accepted: %s", err)
            return
        self.adopt(peer)

    def _serve(self) -> None:
        if self._peer is None:
            return
        try:
            message = protocol.receive(self._peer)
        except BlockingIOError:
            return
        except (ProtocolError, OSError) as err:
            log.warning("control connection dropped: %s", err)
            self._hang_up()
            return
        if message is None:
            self._hang_up()
            return
        self._send(self._answer(message))

    def _answer(self, message: protocol.Message) -> dict[str, Any]:
        body = message.body
        request_id, op, args = body.get("id"), body.get("op"), body.get("args", {})
        if not isinstance(op, str) or not isinstance(args, dict):
            protocol.close_all(message.fds)
            return _error(request_id, "bad_request", "op must be a string and args an object")
        try:
            return {"id": request_id, "ok": self._handler(op, args, message.fds)}
        except WorkerError as err:
            return _error(request_id, err.code, str(err))
        except ProtocolError as err:
            return _error(request_id, "bad_request", str(err))
        except Exception as err:
            # The border "worker message": a defect in one request must not end the guest.
            log.exception("request failed op=%s", op)
            return _error(request_id, "worker_defect", f"{op}: {type(err).__name__}: {err}")

    def _send(self, body: dict[str, Any]) -> None:
        if self._peer is None:
            return
        if len(self._unsent) >= MAX_UNSENT:
            log.warning("control connection dropped: hosteld does not read")
            self._hang_up()
            return
        self._unsent.append(body)
        if len(self._unsent) == 1:
            self._flush()
            if self._unsent and self._peer is not None:
                both = selectors.EVENT_READ | selectors.EVENT_WRITE
                self._selector.modify(self._peer, both, self._flush_and_serve)

    def _flush(self) -> None:
        """Send what waits, as far as the socket takes it."""
        while self._unsent and self._peer is not None:
            try:
                protocol.send(self._peer, self._unsent[0])
            except BlockingIOError:
                return
            except OSError as err:
                log.warning("control connection dropped: %s", err)
                self._hang_up()
                return
            self._unsent.popleft()

    def _flush_and_serve(self) -> None:
        self._flush()
        if self._peer is not None and not self._unsent:
            self._selector.modify(self._peer, selectors.EVENT_READ, self._serve)
        self._serve()

    def _hang_up(self) -> None:
        if self._peer is not None:
            self._selector.unregister(self._peer)
            self._peer.close()
            self._peer = None
            self._unsent.clear()


def _error(request_id: object, code: str, message: str) -> dict[str, Any]:
    return {"id": request_id, "error": {"code": code, "message": message}}
