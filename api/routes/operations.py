# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Operations: work that takes longer than a request may."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query
from starlette.requests import Request
from starlette.responses import Response

from ..models.resources import Operation
from ..openapi import OperationPage, bare, if_none_match, problems, success
from ..reply import call_of, json_response, object_response, service_of
from ..route import make_router
from .parameters import OperationPath, PageQuery

router = make_router("operations", "/v1/operations")


@router.get(
    "/{operation}",
    summary="Show an operation, or wait for its end.",
    responses={
        **success(Operation, "The operation.", is_object=True),
        **bare(304, "It has not changed."),
        **problems(404),
    },
    openapi_extra=if_none_match(),
)
async def get_operation(
    request: Request,
    operation: OperationPath,
    wait: Annotated[
        float,
        Query(ge=0, le=60, allow_inf_nan=False, description="Seconds to wait for its end."),
    ] = 0.0,
) -> Response:
    """It is answered at its end, or after `wait` seconds as it is then."""
    return object_response(request, await service_of(request).get_operation(operation, wait))


@router.get(
    "",
    summary="List operations, the newest first.",
    responses={**success(OperationPage, "One page."), **problems()},
)
async def list_operations(request: Request, query: PageQuery) -> Response:
    """Page with `limit` and `cursor`."""
    return json_response(await service_of(request).list_operations(query))


@router.delete(
    "/{operation}",
    summary="Cancel an operation.",
    responses={**success(Operation, "The operation.", is_object=True), **problems(404, 409)},
)
async def cancel_operation(request: Request, operation: OperationPath) -> Response:
    """What it made so far is removed; 409 when it may not be cancelled or has ended."""
    service = service_of(request)
    return object_response(request, await service.cancel_operation(operation, call_of(request)))
