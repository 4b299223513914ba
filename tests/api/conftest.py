# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""An in-process client of the API on a daemon in memory; every reply is held to the document."""

# ruff: noqa: ANN401 - what is handed on to httpx has httpx's types

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from api.app import create_app
from api.auth import Peer
from tests.api.conformance import check_reply
from tests.api.fake_service import FakeService
from tests.api.live import LiveServer

TOKEN = "0123456789abcdef"


@functools.cache
def document() -> dict[str, Any]:
    """Return the OpenAPI document; it is the same for every service."""
    return create_app(FakeService(), token=None, version="0.1.0").openapi()


class UnixPeer:
    """Stands in for api.server: says who is at the other end of the Unix socket."""

    def __init__(self, app: ASGIApp, peer: Peer) -> None:
        self._app = app
        self._peer = peer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"] = {"peer": self._peer}
        await self._app(scope, receive, send)


class Api:
    """Synchronous face of the in-process API: each call runs on one event loop."""

    def __init__(self, service: FakeService, runner: asyncio.Runner) -> None:
        self.service = service
        self.app = create_app(service, token=TOKEN, version="0.1.0")
        self.document = document()
        self._runner = runner

    def client(self, *, uid: int | None = 1000) -> httpx.AsyncClient:
        """Return a client on the Unix socket, or over TCP with uid None."""
        app = self.app if uid is None else UnixPeer(self.app, Peer(pid=1, uid=uid, gid=uid))
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://localhost")

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine to its end."""
        return self._runner.run(work)

    def call(
        self, method: str, path: str, *, uid: int | None = 1000, **more: Any
    ) -> httpx.Response:
        """Make one call and hold its reply to the OpenAPI document."""

        async def one() -> httpx.Response:
            async with self.client(uid=uid) as client:
                return await client.request(method, path, **more)

        reply: httpx.Response = self.run(one())
        check_reply(self.document, method, path, reply)
        return reply

    def get(self, path: str, **more: Any) -> httpx.Response:
        return self.call("GET", path, **more)

    def post(self, path: str, **more: Any) -> httpx.Response:
        return self.call("POST", path, **more)

    def patch(self, path: str, **more: Any) -> httpx.Response:
        return self.call("PATCH", path, **more)

    def delete(self, path: str, **more: Any) -> httpx.Response:
        return self.call("DELETE", path, **more)

    def create(self, name: str = "web-1", **more: Any) -> dict[str, Any]:
        """Create a VM and return it."""
        reply = self.post("/v1/vms", json={"name": name, "kernel": "debian", **more})
        assert reply.status_code == 201
        made: dict[str, Any] = reply.json()
        return made


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def api(runner: asyncio.Runner) -> Api:
    return Api(FakeService(), runner)


MakeApi = Callable[[FakeService], Api]


@pytest.fixture
def make_api(runner: asyncio.Runner) -> MakeApi:
    return lambda service: Api(service, runner)


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LiveServer]:
    server = LiveServer(tmp_path, TOKEN)
    yield server
    server.close()
