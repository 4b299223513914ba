# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The FastAPI app: everything between HTTP and the daemon's one door."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any, Final

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError, WebSocketRequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.websockets import WebSocket

from .auth import Auth
from .errors import ApiError, Busy
from .middleware import RequestContext
from .openapi import build_openapi
from .ports import HostelService
from .problem import from_http_exception, problem_response
from .reply import JSON_TYPE
from .routes import console, events, host, images, kernels, metrics, operations, vms
from .streams import Followers
from .validation import MAX_ERRORS, explain, invalid

_LOG = logging.getLogger(__name__)

_DESCRIPTION: Final = """\
Hostel creates and runs virtual machines on one Linux host.

- An object is addressed by its client-chosen `name` or by its `id`.
- What can take longer than a second answers 202 with an operation; `?wait=SECONDS` waits for it.
- Every single object has an `ETag`; send it back as `If-Match` to change only what you have seen.
- `Idempotency-Key` on any POST makes it safe to send again.
- Every error is `application/problem+json` with a stable `code`, the `field`, and what to do.
"""
_TAGS: Final = [
    {"name": "vms", "description": "Virtual machines."},
    {"name": "console", "description": "Serial consoles: log, input, interactive WebSocket."},
    {"name": "kernels", "description": "Imported kernels."},
    {"name": "images", "description": "Imported disk images and initrds."},
    {"name": "operations", "description": "Work that takes longer than a request."},
    {"name": "events", "description": "What happened, with a durable cursor."},
    {"name": "host", "description": "The host and the daemon."},
]
# In the order of how often they are called: routes are tried one after the other.
_ROUTERS: Final[tuple[APIRouter, ...]] = (
    vms.router,
    operations.router,
    console.router,
    images.router,
    kernels.router,
    events.router,
    metrics.router,
    host.router,
)


class HostelApi(FastAPI):
    """The app, with an OpenAPI document of our own making."""

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI 3.1 document; it is built once."""
        if self.openapi_schema is None:
            self.openapi_schema = build_openapi(self)
        return self.openapi_schema


def create_app(service: HostelService, *, token: str | None, version: str) -> FastAPI:
    """Return the ASGI app.

    Args:
        service: the daemon.
        token: the bearer token that TCP connections need; None refuses them all.
        version: of the daemon.
    """
    app = HostelApi(
        title="Hostel",
        summary="A host-model hypervisor for Linux.",
        description=_DESCRIPTION,
        version=version,
        openapi_tags=_TAGS,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    app.state.followers = Followers()
    for router in _ROUTERS:
        # The routes themselves, not include_router: that would match every request twice.
        app.router.routes.extend(router.routes)
    app.add_route("/openapi.json", _serve_openapi, include_in_schema=False)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(WebSocketRequestValidationError, _on_invalid)
    app.add_middleware(Auth, token=token)
    app.add_middleware(RequestContext)
    return app


async def _serve_openapi(request: Request) -> Response:
    state = request.app.state
    if not hasattr(state, "openapi_body"):
        state.openapi_body = json.dumps(request.app.openapi()).encode()
    return Response(state.openapi_body, media_type=JSON_TYPE)


async def _on_api_error(request: Request | WebSocket, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    if error.status >= 500 and not isinstance(error, Busy):
        _LOG.warning(
            "request refused status=%d code=%s path=%s: %s",
            error.status,
            error.code,
            request.url.path,
            error.detail,
        )
    return await _answer(request, error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return problem_response(from_http_exception(request, error))


async def _on_invalid(request: Request | WebSocket, error: Exception) -> Response:
    """Answer wrong path, query and header values; bodies are read in api/body.py."""
    assert isinstance(error, RequestValidationError | WebSocketRequestValidationError)
    errors = [explain(_without_source(each)) for each in error.errors()[:MAX_ERRORS]]
    return await _answer(request, invalid(errors))


async def _answer(request: Request | WebSocket, error: ApiError) -> Response:
    """Return the problem; a WebSocket that is not open yet gets it as its handshake's reply."""
    response = problem_response(error)
    if isinstance(request, WebSocket):
        await request.send_denial_response(response)
    return response


def _without_source(error: Mapping[str, Any]) -> dict[str, Any]:
    """Return the error with its place as a client writes it: `limit`, not `query.limit`."""
    return {**error, "loc": error["loc"][1:]}
