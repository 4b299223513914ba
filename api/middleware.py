# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The outermost layer: names each request, and lets no exception out.

Plain ASGI: no task, queue or copy per request, as Starlette's BaseHTTPMiddleware would make.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, Busy, Internal
from .problem import problem_response, request_id

_LOG = logging.getLogger(__name__)

# What a client may name its request: it goes into logs and headers.
_CLIENT_ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class RequestContext:
    """Gives each request an id (the client's X-Request-Id where it is fit) and a last resort."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})
        current = _id_of(scope)
        token = request_id.set(current)
        exchange = _Exchange(scope, send, current)
        try:
            await self._app(scope, receive, exchange.send)
        except asyncio.CancelledError:
            # Only a stopping server cancels requests, when they have had their time.
            if exchange.has_started or scope["type"] != "http":
                raise
            error: ApiError = Busy("stopping", "the daemon is stopping: send it again in a moment")
            await problem_response(error)(scope, receive, exchange.send)
        except Exception as err:  # border: HTTP request
            _LOG.exception("request failed id=%s path=%s", current, scope["path"])
            if exchange.has_started or scope["type"] != "http":
                raise ConnectionAbortedError("the reply had begun") from err
            error = Internal(
                "internal_error",
                f"a defect of the daemon, not of the request: its log has the trace "
                f"under request {current}; please report it",
            )
            await problem_response(error)(scope, receive, exchange.send)
        finally:
            exchange.log()
            request_id.reset(token)


class _Exchange:
    """One request's send, which adds its id to the reply and keeps the status for the log."""

    def __init__(self, scope: Scope, send: Send, current: str) -> None:
        self._scope = scope
        self._send = send
        self._header = (b"x-request-id", current.encode())
        self._current = current
        self._status = 0
        self._started_at = time.perf_counter()

    @property
    def has_started(self) -> bool:
        """Whether a status line has gone out."""
        return self._status != 0

    async def send(self, message: Message) -> None:
        if message["type"] in {"http.response.start", "websocket.http.response.start"}:
            self._status = message["status"]
            message["headers"] = [*message.get("headers", ()), self._header]
        await self._send(message)

    def log(self) -> None:
        if not _LOG.isEnabledFor(logging.DEBUG):
            return
        _LOG.debug(
            "request id=%s actor=%s method=%s path=%s status=%d us=%d",
            self._current,
            self._scope["state"].get("actor"),
            self._scope.get("method", "WEBSOCKET"),
            self._scope["path"],
            self._status,
            (time.perf_counter() - self._started_at) * 1e6,
        )


def _id_of(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _CLIENT_ID.fullmatch(value):
            return str(value, "ascii")
    return os.urandom(8).hex()
