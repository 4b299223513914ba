# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What routes answer with: objects and their ETags, operations, preconditions.

Bodies are serialised once, by pydantic: a model that the service built is valid already, so
FastAPI's own pass over a response (validate, copy, serialise) would only repeat that work.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, Protocol, cast

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from .errors import PreconditionFailed
from .models.resources import Image, Kernel, Operation
from .ports import Call, HostelService

JSON_TYPE: Final = "application/json"

_TAG = re.compile(r'\s*(W/)?"([\x21\x23-\x7e\x80-\xff]*)"\s*(?:,|$)')


class Versioned(Protocol):
    """An object whose ETag is its id and version."""

    @property
    def id(self) -> str:
        """Its id."""

    @property
    def version(self) -> int:
        """Grows with every change."""


def service_of(request: Request) -> HostelService:
    """Return the daemon behind this app."""
    return cast(HostelService, request.app.state.service)


def call_of(request: Request, wait_s: float = 1.0, if_match: int | None = None) -> Call:
    """Return who calls, as the auth middleware found out, and how long they wait."""
    return Call(request.scope["state"]["actor"], wait_s, if_match)


def json_response(
    model: BaseModel, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return ``model`` as JSON."""
    return Response(model.model_dump_json(), status, headers, JSON_TYPE)


def etag_of(model: Versioned) -> str:
    """Return the strong tag of an object's version, with its quotes."""
    return f'"{model.id}.{model.version}"'


def object_response(
    request: Request,
    model: BaseModel,
    *,
    tag: str | None = None,
    status: int = 200,
    location: str | None = None,
) -> Response:
    """Return one object with its ETag; 304 when a GET names that tag in If-None-Match.

    Args:
        request: the request that is answered.
        model: the object.
        tag: its ETag; None makes one of the body, for objects that have no version.
        status: 200 or 201.
        location: path of the object, for 201.
    """
    body = model.model_dump_json().encode()
    if tag is None:
        tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {"ETag": tag}
    if location is not None:
        headers["Location"] = location
    known = request.headers.get("if-none-match")
    if known is not None and request.method == "GET" and _names_tag(known, tag):
        return Response(status_code=304, headers=headers)
    return Response(body, status, headers, JSON_TYPE)


def created_response(
    request: Request, outcome: Kernel | Image | Operation, collection: str
) -> Response:
    """Return 201 for a new object of a collection, such as ``/v1/images``, or 202."""
    if isinstance(outcome, Operation):
        return operation_response(outcome)
    location = f"{collection}/{outcome.id}"
    return object_response(request, outcome, tag=etag_of(outcome), status=201, location=location)


def operation_response(operation: Operation) -> Response:
    """Return 202 for work that goes on."""
    return json_response(operation, 202, {"Location": f"/v1/operations/{operation.id}"})


def matched_version(request: Request, current: Versioned) -> int:
    """Check If-Match against the object as it is, and return the version to insist on.

    The service checks the version again when it makes the change; the id cannot change in between
    when the caller addresses the object by it.

    Raises:
        PreconditionFailed: no tag of the header is the object's.
    """
    header = request.headers.get("if-match", "*")
    if header.strip() != "*" and (False, etag_of(current)[1:-1]) not in _parse_tags(header):
        raise PreconditionFailed(
            "version_changed",
            f"If-Match {header[:64]!r}: it is {etag_of(current)} now; GET it and try again",
        )
    return current.version


async def precondition(
    request: Request, ref: str, get: Callable[[str], Awaitable[Versioned]]
) -> tuple[str, int | None]:
    """Return how to address an object, and the version it must have if the client insists on one.

    Args:
        request: the request that would change it.
        ref: its name or id, as the client gave it.
        get: finds it by that.

    Raises:
        PreconditionFailed: as matched_version().
    """
    if "if-match" not in request.headers:
        return ref, None
    found = await get(ref)
    return found.id, matched_version(request, found)


def _parse_tags(header: str) -> list[tuple[bool, str]]:
    """Return (is weak, tag) for each entity tag of a header."""
    return [(bool(weak), tag) for weak, tag in _TAG.findall(header)]


def _names_tag(header: str, tag: str) -> bool:
    """Return whether If-None-Match names ``tag``; the comparison is the weak one."""
    return header.strip() == "*" or any(known == tag[1:-1] for _, known in _parse_tags(header))
