# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Prometheus metrics."""

from __future__ import annotations

from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from ..openapi import content, problems
from ..reply import service_of
from ..route import make_router

router = make_router("host")

METRICS_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


@router.get(
    "/metrics",
    summary="Prometheus metrics.",
    responses={**content("text/plain", "The text exposition."), **problems()},
)
async def get_metrics(request: Request) -> Response:
    """Over TCP the scraper needs the bearer token, as any other caller."""
    return Response(await service_of(request).metrics(), media_type=METRICS_TYPE)
