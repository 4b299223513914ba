# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Imported kernels."""

from __future__ import annotations

from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from ..body import read_model, stream_upload
from ..models.resources import Kernel, KernelImport
from ..openapi import (
    KernelPage,
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
from .parameters import Digest, KernelPath, NewName, PageQuery, Wait

COLLECTION: Final = "/v1/kernels"
router = make_router("kernels", COLLECTION)

# An unstripped vmlinux with debug info is below 1 GiB.
MAX_KERNEL_BYTES: Final = 2 * 1024**3

_CREATED: Final = {
    **success(Kernel, "It is there.", status=201, is_object=True, has_location=True),
    **accepted(),
}


@router.get(
    "",
    summary="List kernels in order of name.",
    responses={**success(KernelPage, "One page."), **problems()},
)
async def list_kernels(request: Request, query: PageQuery) -> Response:
    """Page with `limit` and `cursor`."""
    return json_response(await service_of(request).list_kernels(query))


@router.post(
    "",
    summary="Import a kernel from a path of the host.",
    status_code=201,
    responses={**_CREATED, **problems(408, 409, 413, 415, 507)},
    openapi_extra=takes(KernelImport, {"name": "debian", "path": "/boot/vmlinuz"}),
)
async def import_kernel(request: Request, wait: Wait = 1.0) -> Response:
    """A bzImage or an ELF; a bzImage is unpacked once, here."""
    wanted = await read_model(request, KernelImport)
    outcome = await service_of(request).import_kernel(wanted, call_of(request, wait))
    return created_response(request, outcome, COLLECTION)


@router.post(
    "/upload",
    summary="Import a kernel from the request's body.",
    status_code=201,
    responses={**_CREATED, **problems(408, 409, 413, 415, 507)},
    openapi_extra=takes_bytes("The file's bytes, at most 2 GiB."),
)
async def upload_kernel(
    request: Request, name: NewName, sha256: Digest = None, wait: Wait = 1.0
) -> Response:
    """`curl --data-binary @FILE -H 'Content-Type: application/octet-stream'` or `curl -T FILE`."""
    body = stream_upload(request, MAX_KERNEL_BYTES)
    call = call_of(request, wait)
    outcome = await service_of(request).upload_kernel(name, sha256, body, call)
    return created_response(request, outcome, COLLECTION)


@router.get(
    "/{kernel}",
    summary="Show a kernel.",
    responses={
        **success(Kernel, "The kernel.", is_object=True),
        **bare(304, "It still has the version in If-None-Match."),
        **problems(404),
    },
    openapi_extra=if_none_match(),
)
async def get_kernel(request: Request, kernel: KernelPath) -> Response:
    """A kernel is addressed by its name or its id."""
    found = await service_of(request).get_kernel(kernel)
    return object_response(request, found, tag=etag_of(found))


@router.delete(
    "/{kernel}",
    summary="Delete a kernel that no VM uses.",
    status_code=204,
    responses={**bare(204, "It is gone."), **problems(404, 409, 412, 507)},
    openapi_extra=if_match(),
)
async def delete_kernel(request: Request, kernel: KernelPath, wait: Wait = 1.0) -> Response:
    """409 names the VMs that use it."""
    service = service_of(request)
    ref, version = await precondition(request, kernel, service.get_kernel)
    await service.delete_kernel(ref, call_of(request, wait, version))
    return Response(status_code=204)
