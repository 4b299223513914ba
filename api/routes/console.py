# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Serial consoles: the log, input, and an interactive WebSocket."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Final

from fastapi import Query, WebSocket
from starlette.exceptions import WebSocketException
from starlette.requests import Request
from starlette.responses import Response
from starlette.websockets import WebSocketDisconnect

from ..body import read_body
from ..errors import UpgradeRequired
from ..models.vms import ConsoleInput
from ..openapi import bare, content, problems, success, takes_bytes
from ..ports import ConsoleChunk, HostelService
from ..reply import json_response, service_of
from ..route import make_router
from ..streams import Followers, FollowResponse, close_source, run_socket, send_bytes_in_time
from .parameters import VmPath

router = make_router("console", "/v1/vms/{vm}/console")

LOG_TYPE: Final = "text/plain; charset=utf-8"
DEFAULT_LOG_BYTES: Final = 1024 * 1024
# One read is held in memory; the log itself is longer and is read in pieces.
MAX_LOG_BYTES: Final = 4 * 1024 * 1024
# Typed by people or pasted: the guest's UART takes 16 bytes at a time.
MAX_INPUT_BYTES: Final = 64 * 1024
# What one who attaches late is shown of what happened before.
RECENT_BYTES: Final = 16 * 1024
# While the guest does not read its input; its UART has no way to call us.
INPUT_RETRY_S: Final = 0.02
MAX_INPUT_RETRY_S: Final = 1.0
# What one attached client may have typed ahead of a guest that does not read.
MAX_PENDING_BYTES: Final = 256 * 1024
# What was typed just before the client went is still handed on for so long.
LAST_TYPED_S: Final = 1.0
# RFC 6455, 7.4.1.
CLOSE_TOO_BIG: Final = 1009
TOO_MUCH_TYPED: Final = (
    f"the guest does not read its console: at most {MAX_PENDING_BYTES} bytes may wait for it"
)

_OFFSET_HEADERS: Final = {
    name: {"description": text, "schema": {"type": "integer"}}
    for name, text in {
        "Console-Offset": "Where the body starts; more than was asked for if that was dropped.",
        "Console-Next-Offset": "Pass as `offset` to go on. Not with `follow`.",
        "Console-End-Offset": "The log's end when it was read.",
    }.items()
}


@router.get(
    "/log",
    summary="Read the console log, and follow it.",
    responses={
        **content("text/plain", "The guest's own bytes.", _OFFSET_HEADERS),
        **problems(404),
    },
)
async def get_console_log(
    request: Request,
    vm: VmPath,
    offset: Annotated[
        int,
        Query(
            ge=-(2**53),
            le=2**53,
            description="Byte to start at, from the VM's creation on; negative: from the end.",
        ),
    ] = 0,
    follow: Annotated[bool, Query(description="Go on as it grows, until it is deleted.")] = False,
    limit: Annotated[
        int, Query(ge=1, le=MAX_LOG_BYTES, description="Most bytes at once.")
    ] = DEFAULT_LOG_BYTES,
) -> Response:
    """The log outlives restarts of the guest; the oldest bytes are dropped first."""
    service = service_of(request)
    chunk = await service.read_console(vm, offset, limit)
    headers = {
        "Console-Offset": str(chunk.offset),
        "Console-End-Offset": str(chunk.end),
        "Cache-Control": "no-store",
    }
    if not follow:
        headers["Console-Next-Offset"] = str(chunk.offset + len(chunk.data))
        return Response(chunk.data, 200, headers, LOG_TYPE)
    followers: Followers = request.app.state.followers
    body = _follow_log(service, vm, chunk)
    return FollowResponse(body, followers, media_type=LOG_TYPE, headers=headers)


async def _follow_log(service: HostelService, vm: str, first: ConsoleChunk) -> AsyncIterator[bytes]:
    if first.data:
        yield first.data
    source = service.follow_console(vm, first.offset + len(first.data))
    try:
        async for chunk in source:
            if chunk.data:
                yield chunk.data
    finally:
        await close_source(source)


@router.post(
    "/input",
    summary="Type into the console.",
    responses={
        **success(ConsoleInput, "What was taken."),
        **problems(404, 408, 409, 413),
    },
    openapi_extra=takes_bytes(
        "Raw bytes, at most 64 KiB, as a terminal would send them.", is_streamed=False
    ),
)
async def write_console(request: Request, vm: VmPath) -> Response:
    """A slow guest may take fewer bytes than were sent."""
    data = await read_body(request, MAX_INPUT_BYTES)
    accepted = await service_of(request).write_console(vm, data) if data else 0
    return json_response(ConsoleInput(accepted_bytes=accepted))


@router.get(
    "",
    summary="Attach to the console (WebSocket).",
    status_code=101,
    responses={
        **bare(101, "A WebSocket: binary frames both ways. It first sends what was last printed."),
        **problems(404, 426),
    },
)
async def attach_console_by_http(
    vm: VmPath,
    offset: Annotated[
        int | None,
        Query(description="Byte to start at; negative: from the end. Left out: the last 16 KiB."),
    ] = None,
) -> Response:
    """Several may attach at once: all see the same output, and what each types is taken in turn."""
    del vm, offset
    raise UpgradeRequired(
        "websocket_only",
        "this path is a WebSocket: use a WebSocket client, `hostel vm console`, or console/log",
    )


@router.websocket("")
async def attach_console(websocket: WebSocket, vm: VmPath, offset: int | None = None) -> None:
    """Serve one attached terminal."""
    service: HostelService = websocket.app.state.service
    followers: Followers = websocket.app.state.followers
    with followers.join():
        start = -RECENT_BYTES if offset is None else offset
        first = await service.read_console(vm, start, RECENT_BYTES)
        await websocket.accept()
        feed = _send_output(websocket, _follow_log(service, vm, first))
        typed = _Typed()
        listen = typed.receive(websocket)
        await run_socket(websocket, followers, feed, listen, typed.type_into(service, vm))


async def _send_output(websocket: WebSocket, source: AsyncIterator[bytes]) -> None:
    try:
        async for data in source:
            await send_bytes_in_time(websocket, data)
    finally:
        await close_source(source)


class _Typed:
    """What a client has typed and the guest has not taken yet: bounded."""

    def __init__(self) -> None:
        self._pending = bytearray()
        self._has_some = asyncio.Event()
        self._all_taken = asyncio.Event()
        self._all_taken.set()

    async def receive(self, websocket: WebSocket) -> None:
        """Take what the client sends, also while the guest reads nothing, until the client goes.

        Raises:
            WebSocketDisconnect: the client went.
            WebSocketException: more than ``MAX_PENDING_BYTES`` wait for the guest.
        """
        while True:
            message = await websocket.receive()
            if message["type"] == "websocket.disconnect":
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LAST_TYPED_S):
                        await self._all_taken.wait()
                raise WebSocketDisconnect(message.get("code", 1005))
            self._pending += message.get("bytes") or (message.get("text") or "").encode()
            if len(self._pending) > MAX_PENDING_BYTES:
                raise WebSocketException(CLOSE_TOO_BIG, TOO_MUCH_TYPED)
            if self._pending:
                self._all_taken.clear()
                self._has_some.set()

    async def type_into(self, service: HostelService, vm: str) -> None:
        """Hand it on as the guest takes it, for ever."""
        while True:
            await self._has_some.wait()
            self._has_some.clear()
            delays = retry_delays()
            while self._pending:
                taken = await service.write_console(vm, bytes(self._pending[:MAX_INPUT_BYTES]))
                del self._pending[:taken]
                if taken:
                    delays = retry_delays()
                if self._pending:
                    await asyncio.sleep(next(delays))
            self._all_taken.set()


def retry_delays() -> Iterator[float]:
    """Yield the seconds between tries while the guest takes nothing: longer and longer."""
    delay = INPUT_RETRY_S
    while True:
        yield delay
        delay = min(2 * delay, MAX_INPUT_RETRY_S)
