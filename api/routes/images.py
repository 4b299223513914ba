# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Imported disk images and initrds."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from fastapi import Query
from starlette.requests import Request
from starlette.responses import Response

from ..body import read_model, stream_upload
from ..models.resources import Image, ImageImport
from ..openapi import (
    ImagePage,
    accepted,
    bare,
    if_match,
    if_none_match,
    problems,
    success,
    takes,
    takes_bytes,
)
from ..reply import (
    call_of,
    created_response,
    etag_of,
    json_response,
    object_response,
    precondition,
    service_of,
)
from ..route import make_router
from .parameters import Digest, ImagePath, NewName, PageQuery, Wait

COLLECTION: Final = "/v1/images"
router = make_router("images", COLLECTION)

# As large as a disk may be (DiskCreate.size_mib); the state directory is full before that.
MAX_IMAGE_BYTES: Final = 64 * 1024**4

_CREATED: Final = {
    **success(Image, "It is there.", status=201, is_object=True, has_location=True),
    **accepted(),
}


@router.get(
    "",
    summary="List images in order of name.",
    responses={**success(ImagePage, "One page."), **problems()},
)
async def list_images(request: Request, query: PageQuery) -> Response:
    """Page with `limit` and `cursor`."""
    return json_response(await service_of(request).list_images(query))


@router.post(
    "",
    summary="Import an image from a path of the host.",
    status_code=201,
    responses={**_CREATED, **problems(408, 409, 413, 415, 507)},
    openapi_extra=takes(ImageImport, {"name": "debian", "path": "/srv/debian.raw"}),
)
async def import_image(request: Request, wait: Wait = 1.0) -> Response:
    """A raw disk image or an initrd; it is copied, so the file may change afterwards."""
    wanted = await read_model(request, ImageImport)
    outcome = await service_of(request).import_image(wanted, call_of(request, wait))
    return created_response(request, outcome, COLLECTION)


@router.post(
    "/upload",
    summary="Import an image from the request's body.",
    status_code=201,
    responses={**_CREATED, **problems(408, 409, 413, 415, 507)},
    openapi_extra=takes_bytes("The file's bytes, at most 64 TiB."),
)
async def upload_image(
    request: Request,
    name: NewName,
    kind: Annotated[Literal["disk", "initrd"], Query(description="What it is.")] = "disk",
    sha256: Digest = None,
    wait: Wait = 1.0,
) -> Response:
    """`curl --data-binary @FILE -H 'Content-Type: application/octet-stream'` or `curl -T FILE`."""
    body = stream_upload(request, MAX_IMAGE_BYTES)
    call = call_of(request, wait)
    outcome = await service_of(request).upload_image(name, kind, sha256, body, call)
    return created_response(request, outcome, COLLECTION)


@router.get(
    "/{image}",
    summary="Show an image.",
    responses={
        **success(Image, "The image.", is_object=True),
        **bare(304, "It still has the version in If-None-Match."),
        **problems(404),
    },
    openapi_extra=if_none_match(),
)
async def get_image(request: Request, image: ImagePath) -> Response:
    """An image is addressed by its name or its id."""
    found = await service_of(request).get_image(image)
    return object_response(request, found, tag=etag_of(found))


@router.delete(
    "/{image}",
    summary="Delete an image that no VM uses.",
    status_code=204,
    responses={**bare(204, "It is gone."), **problems(404, 409, 412, 507)},
    openapi_extra=if_match(),
)
async def delete_image(request: Request, image: ImagePath, wait: Wait = 1.0) -> Response:
    """409 names the VMs that use it."""
    service = service_of(request)
    ref, version = await precondition(request, image, service.get_image)
    await service.delete_image(ref, call_of(request, wait, version))
    return Response(status_code=204)
