# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Every error as RFC 9457 ``application/problem+json``."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Final

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route

from .errors import ApiError, BadRequest, Busy, MethodNotAllowed, NotFound, Unauthorized

PROBLEM_TYPE: Final = "application/problem+json"

# Set by the outermost middleware for the whole of a request; log formatters may read it.
request_id: ContextVar[str] = ContextVar("request_id", default="")


def problem_response(error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
    """Return the response that tells ``error``."""
    current = request_id.get()
    problem = error.problem(f"urn:hostel:request:{current}" if current else None)
    return Response(
        problem.model_dump_json(exclude_none=True),
        status_code=error.status,
        headers={**_headers_for(error), **(headers or {})},
        media_type=PROBLEM_TYPE,
    )


def _headers_for(error: ApiError) -> dict[str, str]:
    if isinstance(error, Unauthorized):
        return {"WWW-Authenticate": 'Bearer realm="hostel"'}
    if isinstance(error, MethodNotAllowed):
        return {"Allow": ", ".join(error.allowed or ())}
    if isinstance(error, Busy):
        return {"Retry-After": "1"}
    # After these the rest of the body is in the way of the next request.
    return {"Connection": "close"} if error.status in {408, 413} else {}


def from_http_exception(request: Request, error: HTTPException) -> ApiError:
    """Return what the framework itself raised, such as an unknown path, as one of ours."""
    path = request.url.path
    if error.status_code == 404:
        return NotFound(
            "path_not_found", f"{path}: no such path; GET /openapi.json lists all that there are"
        )
    if error.status_code == 405:
        allowed = allowed_methods(request)
        return MethodNotAllowed(
            "method_not_allowed",
            f"{request.method} {path}: this path takes {', '.join(allowed)}",
            allowed=allowed,
        )
    return BadRequest("bad_request", str(error.detail))


def allowed_methods(request: Request) -> list[str]:
    """Return every method that the request's path takes, sorted."""
    matching = [
        route
        for route in request.app.routes
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE
    ]
    # `/v1/kernels/upload` is a path of its own, though `/v1/kernels/{kernel}` matches it too.
    fewest = min((len(route.param_convertors) for route in matching), default=0)
    named = [route for route in matching if len(route.param_convertors) == fewest]
    return sorted({method for route in named for method in route.methods or ()})
