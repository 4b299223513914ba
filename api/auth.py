# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Finds out who calls: peer credentials on the Unix socket, a bearer token over TCP.

The Unix socket's file mode decides who may connect; its peer's uid then names the caller. Over
TCP every path needs the token, and the Host header must name this machine's loopback, so that a
web page which rebinds its own name to 127.0.0.1 gets nowhere. There is no CORS.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import ApiError, Forbidden, Unauthorized
from .problem import problem_response

LOOPBACK_NAMES: Final = frozenset({"localhost", "127.0.0.1", "[::1]"})


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end of a Unix socket, as the kernel says (SO_PEERCRED)."""

    pid: int
    uid: int
    gid: int


class Auth:
    """Sets ``scope["state"]["actor"]``, or answers 401 or 403."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app = app
        self._token = None if token is None else token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request or WebSocket."""
        if scope["type"] not in {"http", "websocket"}:
            await self._app(scope, receive, send)
            return
        try:
            scope["state"]["actor"] = self._actor(scope)
        except ApiError as err:
            await refuse(err, scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _actor(self, scope: Scope) -> str:
        peer = scope["state"].get("peer")
        if isinstance(peer, Peer):
            return f"unix:uid={peer.uid}"
        headers = Headers(scope=scope)
        _check_host(headers.get("host", ""))
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if self._token is None:
            raise Unauthorized("no_token_configured", "no token is configured: use the Unix socket")
        if scheme.lower() != "bearer" or not given:
            raise Unauthorized(
                "token_missing", "no bearer token: send `Authorization: Bearer TOKEN`"
            )
        if not hmac.compare_digest(given.strip().encode(), self._token):
            raise Unauthorized("token_wrong", "the bearer token is not the configured one")
        return "token:api"


def _check_host(host: str) -> None:
    name = host.lower()
    if not name.endswith("]"):
        name, _, port = name.rpartition(":") if ":" in name else (name, "", "")
        name = name if not port or port.isdigit() else host
    if name not in LOOPBACK_NAMES:
        raise Forbidden(
            "host_not_allowed",
            f"Host {host[:64]!r}: must be one of {', '.join(sorted(LOOPBACK_NAMES))}",
        )


async def refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request, or a WebSocket that is not open yet, with ``error``."""
    if scope["type"] == "websocket":
        await receive()  # websocket.connect
        if "websocket.http.response" not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": 1008, "reason": error.code})
            return
    await problem_response(error)(scope, receive, send)
