# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The route class of every HTTP route: strict query strings, Idempotency-Key on POST."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Callable, Coroutine
from typing import Any, Final

from fastapi import APIRouter
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from .body import MAX_JSON_BYTES, read_body
from .errors import ApiError, BadRequest
from .models.common import FieldError
from .ports import StoredReply
from .reply import service_of
from .validation import invalid, suggest

Handler = Callable[[Request], Coroutine[Any, Any, Response]]

KEY_HEADER: Final = "Idempotency-Key"
# In openapi_extra of a POST whose body is streamed: its bytes are no part of the fingerprint.
STREAMED: Final = "x-hostel-streamed"

_KEY = re.compile(r"[\x21-\x7e]{1,128}")
# Others, such as X-Request-Id, belong to the request that is answered, not to the work.
_KEPT_HEADERS: Final = ("content-type", "location", "etag")


class HostelRoute(APIRoute):
    """A route that refuses query parameters it does not know and honours Idempotency-Key."""

    def get_route_handler(self) -> Handler:
        """Wrap the handler that FastAPI made."""
        handle = super().get_route_handler()
        known = sorted(_query_names(self.dependant))
        is_post = "POST" in (self.methods or ())
        is_streamed = bool((self.openapi_extra or {}).get(STREAMED))

        async def checked(request: Request) -> Response:
            if request.scope["query_string"]:
                _refuse_unknown(request, known)
            if not is_post:
                return await handle(request)
            key = request.headers.get(KEY_HEADER)
            if key is None:
                return await handle(request)
            return await _once(request, key, handle, is_streamed=is_streamed)

        return checked


def make_router(tag: str, prefix: str = "") -> APIRouter:
    """Return a router whose operation ids are the names of its functions."""
    return APIRouter(
        prefix=prefix,
        tags=[tag],
        route_class=HostelRoute,
        generate_unique_id_function=lambda route: route.name,
    )


def _query_names(dependant: Dependant) -> set[str]:
    names = {field.alias for field in dependant.query_params}
    return names.union(*(_query_names(below) for below in dependant.dependencies))


def _refuse_unknown(request: Request, known: list[str]) -> None:
    names = [name for name, _ in request.query_params.multi_items()]
    for name in names:
        if name not in known:
            shown = name[:64]
            detail = f"{shown}: unknown query parameter{suggest(shown, known)}"
            raise invalid([FieldError(field=shown, detail=detail)])
        if names.count(name) > 1:
            raise invalid([FieldError(field=name, detail=f"{name}: give it once")])


async def _once(request: Request, key: str, handle: Handler, *, is_streamed: bool) -> Response:
    """Do the work, or repeat the reply that it had under the same key.

    Only a success is kept: what failed has changed nothing, so the same key may try again.
    """
    if not _KEY.fullmatch(key):
        raise BadRequest(
            "malformed_idempotency_key",
            f"{KEY_HEADER} {key[:32]!r}: must be 1 to 128 printable ASCII characters, no spaces",
        )
    service = service_of(request)
    # A key belongs to who sent it: one caller can neither see nor block another's.
    own_key = f"{key} of {request.scope['state']['actor']}"
    fingerprint = await _fingerprint(request, is_streamed=is_streamed)
    try:
        stored = await service.claim_key(own_key, fingerprint)
    except ApiError as err:
        # The client knows the key as it sent it.
        err.detail = err.detail.replace(own_key, key)
        raise
    if stored is not None:
        headers = {**stored.headers, "Idempotency-Replayed": "true"}
        if is_streamed:
            headers["Connection"] = "close"  # the body was not read
        return Response(stored.body, stored.status, headers)
    kept: StoredReply | None = None
    try:
        response = await handle(request)
        if response.status_code < 300:
            kept = _to_store(response)
        return response
    finally:
        # Also when the request is cancelled, or the key would stay claimed for ever.
        await asyncio.shield(service.settle_key(own_key, kept))


async def _fingerprint(request: Request, *, is_streamed: bool) -> str:
    body = b"" if is_streamed else await read_body(request, MAX_JSON_BYTES)
    digest = hashlib.sha256()
    scope = request.scope
    for part in (scope["method"].encode(), scope["path"].encode(), scope["query_string"], body):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def _to_store(response: Response) -> StoredReply:
    headers = {name: value for name, value in response.headers.items() if name in _KEPT_HEADERS}
    return StoredReply(response.status_code, headers, bytes(response.body))
