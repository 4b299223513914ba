# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Reads request bodies: bounded in size, in silence and in time.

The limits hold while the body comes in, so a chunked body without a length is bounded as well.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final, TypeVar

from pydantic import BaseModel
from starlette.requests import Request

from .errors import BadRequest, RequestTimeout, TooLarge, UnsupportedMedia
from .validation import parse_body

M = TypeVar("M", bound=BaseModel)

# A VM with everything that the models allow is about 200 KiB of JSON.
MAX_JSON_BYTES: Final = 1024 * 1024
# A client that sends nothing for this long is gone or hostile: it would hold memory for ever.
BODY_IDLE_S: Final = 30.0
# One byte every 29 s would pass the idle limit; a JSON body of 1 MiB needs no more than this.
BODY_TOTAL_S: Final = 120.0
# What is read and thrown away after a 413, so that a client sees the answer, not a reset.
MAX_DRAIN_BYTES: Final = 8 * 1024 * 1024
DRAIN_S: Final = 1.0

_BODY_KEY: Final = "hostel.body"


async def read_model(request: Request, model: type[M]) -> M:
    """Return the request's JSON body as ``model``.

    Raises:
        ApiError: 400, 408, 413, 415 or 422, each with what to do.
    """
    body = await read_body(request, MAX_JSON_BYTES)
    require_json(request)
    return parse_body(model, body)


async def read_optional_model(request: Request, model: type[M]) -> M | None:
    """Return the request's JSON body as ``model``, or None when there is no body."""
    body = await read_body(request, MAX_JSON_BYTES)
    if not body:
        return None
    require_json(request)
    return parse_body(model, body)


def require_json(request: Request) -> None:
    """Refuse a body that is not said to be JSON.

    Raises:
        UnsupportedMedia: the Content-Type is another one, or there is none.
    """
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedMedia(
            "unsupported_media_type",
            f"Content-Type {kind[:64]!r}: send `Content-Type: application/json` (curl: --json)",
        )


async def read_body(request: Request, limit: int) -> bytes:
    """Return the whole body; a second call returns the same bytes.

    Args:
        request: client-controlled.
        limit: most bytes that the body may have.

    Raises:
        TooLarge: the body passes the limit; a part of the rest has been thrown away.
        RequestTimeout: the client stopped sending.
        BadRequest: the client went away.
    """
    cached = request.scope.get(_BODY_KEY)
    if isinstance(cached, bytes):
        if len(cached) > limit:
            raise _too_large(limit)
        return cached
    parts = bytearray()
    deadline = asyncio.get_running_loop().time() + BODY_TOTAL_S
    async for chunk in stream_body(request, limit):
        parts += chunk
        if asyncio.get_running_loop().time() > deadline:
            raise _timeout(f"the body took longer than {BODY_TOTAL_S:g} s")
    body = bytes(parts)
    request.scope[_BODY_KEY] = body
    return body


async def stream_body(request: Request, limit: int) -> AsyncIterator[bytes]:
    """Yield the body as it comes in.

    Raises:
        TooLarge, RequestTimeout, BadRequest: as `read_body` does.
    """
    declared = request.headers.get("content-length", "0")
    # The HTTP parser has checked that it is a number, but not how long it is.
    if len(declared) > 18 or int(declared) > limit:
        await _drain(request)
        raise _too_large(limit)
    received = 0
    while True:
        try:
            async with asyncio.timeout(BODY_IDLE_S):
                message = await request.receive()
        except TimeoutError:
            raise _timeout(f"nothing came for {BODY_IDLE_S:g} s") from None
        if message["type"] == "http.disconnect":
            raise BadRequest("client_gone", "the client closed the connection within the body")
        chunk = message.get("body", b"")
        received += len(chunk)
        if received > limit:
            await _drain(request)
            raise _too_large(limit)
        if chunk:
            yield chunk
        if not message.get("more_body", False):
            return


async def stream_upload(request: Request, limit: int) -> AsyncIterator[bytes]:
    """Yield the bytes of an uploaded file.

    Raises:
        UnsupportedMedia: it is a form; others as `stream_body` does.
    """
    if request.headers.get("content-type", "").lower().startswith("multipart/"):
        raise UnsupportedMedia(
            "unsupported_media_type", "a form: send the file's bytes alone (curl: -T FILE)"
        )
    async for chunk in stream_body(request, limit):
        yield chunk


async def _drain(request: Request) -> None:
    """Throw away what the client is sending, within bounds."""
    # A client that waits for "100 Continue" has sent nothing: answer at once.
    if request.headers.get("expect", "").lower() == "100-continue":
        return
    dropped = 0
    try:
        async with asyncio.timeout(DRAIN_S):
            while dropped <= MAX_DRAIN_BYTES:
                message = await request.receive()
                dropped += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
    except TimeoutError:
        # It goes on sending; the connection is closed with the answer.
        return


def _too_large(limit: int) -> TooLarge:
    return TooLarge("body_too_large", f"the body is too large: at most {limit} bytes are taken")


def _timeout(reason: str) -> RequestTimeout:
    return RequestTimeout("body_timeout", f"{reason}: send the request again, without pauses")
