# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Pieces of the OpenAPI document that routes share, and the document itself.

Shapes are named here and resolved from pydantic in one go, so that the document holds each
model once, under its own name, and FastAPI does not validate replies that are valid already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from .models.common import Page, Problem
from .models.limits import RateGroupPatch
from .models.resources import (
    ApiRoot,
    Event,
    Host,
    Image,
    ImageImport,
    Kernel,
    KernelImport,
    Operation,
)
from .models.vms import (
    ConsoleInput,
    DiskPatch,
    NicPatch,
    StopRequest,
    Vm,
    VmCreate,
    VmPatch,
    VmStats,
)
from .problem import PROBLEM_TYPE
from .route import STREAMED

Json = dict[str, Any]
Responses = dict[int | str, dict[str, Any]]


class VmPage(Page[Vm]):
    """One page of VMs."""


class KernelPage(Page[Kernel]):
    """One page of kernels."""


class ImagePage(Page[Image]):
    """One page of images."""


class OperationPage(Page[Operation]):
    """One page of operations."""


class EventPage(Page[Event]):
    """One page of events."""


REQUEST_MODELS: Final[Sequence[type[BaseModel]]] = (
    VmCreate,
    VmPatch,
    DiskPatch,
    NicPatch,
    RateGroupPatch,
    StopRequest,
    KernelImport,
    ImageImport,
)
RESPONSE_MODELS: Final[Sequence[type[BaseModel]]] = (
    ApiRoot,
    Host,
    Vm,
    VmPage,
    VmStats,
    ConsoleInput,
    Kernel,
    KernelPage,
    Image,
    ImagePage,
    Operation,
    OperationPage,
    Event,
    EventPage,
    Problem,
)

_PROBLEMS: Final[Mapping[int, str]] = {
    400: "The request is malformed: not JSON, a header that cannot be read, a body cut short.",
    401: "Over TCP: the bearer token is missing or wrong.",
    403: "Over TCP: the Host header names another machine.",
    404: "There is no such object.",
    408: "The client stopped sending its body.",
    409: "Not in this state, or the name is taken, or the object is in use.",
    412: "If-Match names another version than the object has now.",
    413: "The body is too large.",
    415: "The body is not of the type that this path takes.",
    422: "A value is out of range, a field is unknown, or something named is not there.",
    426: "This path is a WebSocket.",
    500: "A defect of the daemon; its log has the trace under the request's id.",
    502: "The host or a worker could not do it.",
    503: "Busy: try again after the seconds in Retry-After.",
    507: "The state directory is full or read-only.",
}
# What any call can meet.
_ALWAYS: Final = (400, 401, 403, 422, 500, 502, 503)

_REQUEST_ID: Final = {"$ref": "#/components/headers/X-Request-Id"}
_ETAG: Final = {"$ref": "#/components/headers/ETag"}
_LOCATION: Final = {"$ref": "#/components/headers/Location"}

_HEADERS: Final[Json] = {
    "X-Request-Id": {
        "description": "The request's id: the client's own where it sent one.",
        "schema": {"type": "string"},
    },
    "ETag": {
        "description": "The object's version, for If-Match and If-None-Match.",
        "schema": {"type": "string"},
    },
    "Location": {
        "description": "Path of the new object, or of the operation to follow.",
        "schema": {"type": "string"},
    },
}
_KEY_PARAMETER: Final[Json] = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "Chosen by the client, such as a UUID. The same request with the same key "
    "gets the first one's reply, with `Idempotency-Replayed: true`, and does nothing again.",
    "schema": {"type": "string", "pattern": "^[!-~]{1,128}$"},
}
_IF_MATCH_PARAMETER: Final[Json] = {
    "name": "If-Match",
    "in": "header",
    "required": False,
    "description": "Change the object only if this is its ETag; 412 otherwise.",
    "schema": {"type": "string"},
}
_IF_NONE_MATCH_PARAMETER: Final[Json] = {
    "name": "If-None-Match",
    "in": "header",
    "required": False,
    "description": "Answer 304 if this is the object's ETag.",
    "schema": {"type": "string"},
}


def schema_ref(model: type[BaseModel]) -> Json:
    """Return a reference to ``model``'s schema."""
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def problems(*statuses: int) -> Responses:
    """Return the documented errors of a route: ``statuses`` and those that any call can meet."""
    documented: Responses = {}
    for status in sorted({*statuses, *_ALWAYS}):
        documented[status] = {
            "description": _PROBLEMS[status],
            "headers": {"X-Request-Id": _REQUEST_ID},
            "content": {PROBLEM_TYPE: {"schema": schema_ref(Problem)}},
        }
    return documented


def success(
    model: type[BaseModel],
    description: str,
    *,
    status: int = 200,
    is_object: bool = False,
    has_location: bool = False,
) -> Responses:
    """Return the documented reply that holds ``model``; ``is_object``: it has an ETag."""
    headers: Json = {"X-Request-Id": _REQUEST_ID}
    if is_object:
        headers["ETag"] = _ETAG
    if has_location:
        headers["Location"] = _LOCATION
    content = {"application/json": {"schema": schema_ref(model)}}
    return {status: {"description": description, "headers": headers, "content": content}}


def accepted() -> Responses:
    """Return the documented 202 with the operation that goes on."""
    return success(Operation, "It goes on: follow the operation.", status=202, has_location=True)


def bare(status: int, description: str) -> Responses:
    """Return a documented reply without a body."""
    return {status: {"description": description, "headers": {"X-Request-Id": _REQUEST_ID}}}


def content(media_type: str, description: str, headers: Json | None = None) -> Responses:
    """Return a documented 200 that is not JSON."""
    return {
        200: {
            "description": description,
            "headers": {"X-Request-Id": _REQUEST_ID, **(headers or {})},
            "content": {media_type: {}},
        }
    }


def takes(
    model: type[BaseModel], example: Json, *, is_required: bool = True, has_if_match: bool = False
) -> Json:
    """Return the documentation of a JSON body."""
    body = {
        "required": is_required,
        "content": {
            "application/json": {
                "schema": schema_ref(model),
                "examples": {"usual": {"value": example}},
            }
        },
    }
    return {"requestBody": body, **(if_match() if has_if_match else {})}


def takes_bytes(description: str, *, is_streamed: bool = True) -> Json:
    """Return the documentation of a raw body."""
    media = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    return {
        "requestBody": {"required": False, "description": description, "content": media},
        STREAMED: is_streamed,
    }


def if_match() -> Json:
    """Return the documentation of the If-Match header."""
    return {"parameters": [_IF_MATCH_PARAMETER]}


def if_none_match() -> Json:
    """Return the documentation of the If-None-Match header."""
    return {"parameters": [_IF_NONE_MATCH_PARAMETER]}


def build_openapi(app: FastAPI) -> Json:
    """Return the OpenAPI 3.1 document of ``app``."""
    document: Json = get_openapi(
        title=app.title,
        version=app.version,
        openapi_version="3.1.0",
        summary=app.summary,
        description=app.description,
        routes=app.routes,
        tags=app.openapi_tags,
    )
    _, definitions = models_json_schema(
        [
            *((model, "validation") for model in REQUEST_MODELS),
            *((model, "serialization") for model in RESPONSE_MODELS),
        ],
        ref_template="#/components/schemas/{model}",
    )
    document["components"] = {
        "schemas": definitions["$defs"],
        "headers": _HEADERS,
        "securitySchemes": {
            "bearer": {"type": "http", "scheme": "bearer", "description": "Over TCP only."}
        },
    }
    document["security"] = [{}, {"bearer": []}]
    for path in document["paths"].values():
        for method, operation in path.items():
            operation.pop(STREAMED, None)
            if method == "post":
                operation.setdefault("parameters", []).append(_KEY_PARAMETER)
    return document
