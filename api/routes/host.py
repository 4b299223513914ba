# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The host, and where to start."""

from __future__ import annotations

from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from ..models.resources import ApiRoot, Host
from ..openapi import bare, if_none_match, problems, success
from ..reply import object_response, service_of
from ..route import make_router
from ..version import API_EXTENSIONS, API_VERSIONS

router = make_router("host")

_LINKS: Final = {
    "host": "/v1/host",
    "vms": "/v1/vms",
    "kernels": "/v1/kernels",
    "images": "/v1/images",
    "operations": "/v1/operations",
    "events": "/v1/events",
    "metrics": "/metrics",
    "openapi": "/openapi.json",
}


@router.get(
    "/v1",
    summary="Versions and links.",
    responses={
        **success(ApiRoot, "Where to start.", is_object=True),
        **bare(304, "Nothing has changed."),
        **problems(),
    },
    openapi_extra=if_none_match(),
)
async def get_root(request: Request) -> Response:
    """`api_extensions` grows; nothing in `v1` is taken away."""
    root = ApiRoot(
        version=request.app.version,
        api_versions=list(API_VERSIONS),
        api_extensions=list(API_EXTENSIONS),
        links=dict(_LINKS),
    )
    return object_response(request, root)


router.add_api_route("/", get_root, methods=["GET"], include_in_schema=False, name="get_top")


@router.get(
    "/v1/host",
    summary="Describe the host and what it can do.",
    responses={
        **success(Host, "The host.", is_object=True),
        **bare(304, "Nothing has changed."),
        **problems(),
    },
    openapi_extra=if_none_match(),
)
async def get_host(request: Request) -> Response:
    """`checks` name each lack and its remedy."""
    return object_response(request, await service_of(request).host())
