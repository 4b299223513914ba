# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Events, with a durable cursor: as a page, as server-sent events, as a WebSocket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Final

from fastapi import Query, WebSocket
from starlette.requests import Request
from starlette.responses import Response
from starlette.websockets import WebSocketDisconnect

from ..errors import ApiError, BadRequest, Invalid, UpgradeRequired
from ..models.common import Page
from ..models.resources import Event
from ..openapi import EventPage, bare, content, problems, success
from ..ports import HostelService
from ..reply import json_response, service_of
from ..route import make_router
from ..streams import (
    HEARTBEAT_S,
    TOO_SLOW,
    Followers,
    FollowResponse,
    close_source,
    run_socket,
    send_text_in_time,
    with_heartbeat,
)
from .parameters import Limit

router = make_router("events", "/v1/events")

SSE_TYPE: Final = "text/event-stream; charset=utf-8"
# Ids are SQLite row ids.
MAX_EVENT_ID: Final = 2**63 - 1

After = Annotated[
    int | None,
    Query(
        ge=0, le=MAX_EVENT_ID, description="Replay what came after this id; left out: only news."
    ),
]


@router.get(
    "",
    summary="Read events in order.",
    responses={**success(EventPage, "One page."), **problems()},
)
async def list_events(
    request: Request,
    after: Annotated[int, Query(ge=0, le=MAX_EVENT_ID, description="Id of the last one seen.")] = 0,
    limit: Limit = 100,
) -> Response:
    """Pass the last event's id as `after` to go on; `next_cursor` is that id on a full page."""
    service = service_of(request)
    events = await service.list_events(after, limit)
    if not events:
        await _check_cursor(service, after)
    cursor = str(events[-1].id) if len(events) == limit else None
    return json_response(Page[Event](items=events, next_cursor=cursor))


@router.get(
    "/stream",
    summary="Follow events (server-sent events).",
    responses={**content("text/event-stream", "`id`, `event` and `data` lines."), **problems()},
    openapi_extra={
        "parameters": [
            {
                "name": "Last-Event-ID",
                "in": "header",
                "required": False,
                "description": "As a browser sends it; goes before `after`.",
                "schema": {"type": "string", "pattern": "^[0-9]{1,18}$"},
            }
        ]
    },
)
async def stream_events(request: Request, after: After = None) -> Response:
    """A comment line every 15 s shows that the stream lives."""
    cursor = _last_event_id(request, after)
    service: HostelService = service_of(request)
    await _check_cursor(service, cursor)
    followers: Followers = request.app.state.followers
    return FollowResponse(
        _sse_lines(service.follow_events(cursor)),
        followers,
        media_type=SSE_TYPE,
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        farewell=b": the daemon is stopping, connect again\n\n",
        complaint=f": {TOO_SLOW}\n\n".encode(),
    )


async def _check_cursor(service: HostelService, cursor: int | None) -> None:
    """Refuse an id that no event has had: whoever holds it would wait for what never comes.

    The newest event is never dropped, so an id that is not above it has something after the id
    before.

    Raises:
        Invalid: there is no such event, as after a restore of the daemon's database.
    """
    if not cursor or await service.list_events(cursor - 1, 1):
        return
    raise Invalid(
        "cursor_unknown",
        f"event {cursor}: no event has had this id; read /v1/events from 0, then follow from there",
        field="after",
    )


def _last_event_id(request: Request, after: int | None) -> int | None:
    header = request.headers.get("last-event-id")
    if header is None:
        return after
    if not (header.isascii() and header.isdigit()) or len(header) > 18:
        raise BadRequest(
            "malformed_last_event_id", f"Last-Event-ID {header[:32]!r}: must be an event's id"
        )
    return int(header)


async def _sse_lines(events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
    yield b"retry: 2000\n\n"
    lines = with_heartbeat(events, HEARTBEAT_S)
    try:
        async for event in lines:
            yield b": alive\n\n" if event is None else _sse_event(event)
    except ApiError as err:
        yield f"event: problem\ndata: {err.problem().model_dump_json()}\n\n".encode()
    finally:
        await close_source(lines)


def _sse_event(event: Event) -> bytes:
    return f"id: {event.id}\nevent: {event.type}\ndata: {event.model_dump_json()}\n\n".encode()


@router.get(
    "/ws",
    summary="Follow events (WebSocket).",
    status_code=101,
    responses={**bare(101, "A WebSocket: one event as JSON a text frame."), **problems(426)},
)
async def socket_events_by_http(after: After = None) -> Response:
    """The server sends; what the client sends is ignored."""
    del after
    raise UpgradeRequired(
        "websocket_only", "this path is a WebSocket; for plain HTTP use /v1/events/stream"
    )


@router.websocket("/ws")
async def socket_events(websocket: WebSocket, after: After = None) -> None:
    """Serve one follower."""
    service: HostelService = websocket.app.state.service
    followers: Followers = websocket.app.state.followers
    with followers.join():
        await _check_cursor(service, after)
        await websocket.accept()
        feed = _send_events(websocket, service.follow_events(after))
        await run_socket(websocket, followers, feed, _until_gone(websocket))


async def _send_events(websocket: WebSocket, events: AsyncIterator[Event]) -> None:
    try:
        async for event in events:
            await send_text_in_time(websocket, event.model_dump_json())
    finally:
        await close_source(events)


async def _until_gone(websocket: WebSocket) -> None:
    while True:
        message = await websocket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1005))
