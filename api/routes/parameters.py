# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Path and query parameters that routes share."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Path, Query
from pydantic import AfterValidator

from ..models.common import MAX_NAME_CHARS, NAME_PATTERN, NAME_TEXT, NOT_A_UUID, refuse_uuid
from ..models.vms import VmState
from ..ports import DetachQuery, ListQuery

_REF = r"^[A-Za-z0-9._-]+$"

VmPath = Annotated[
    str,
    Path(min_length=1, max_length=64, pattern=_REF, description="Name or id.", examples=["web-1"]),
]
KernelPath = Annotated[
    str,
    Path(min_length=1, max_length=64, pattern=_REF, description="Name or id.", examples=["debian"]),
]
ImagePath = Annotated[
    str,
    Path(min_length=1, max_length=64, pattern=_REF, description="Name or id.", examples=["debian"]),
]
DiskPath = Annotated[
    str, Path(pattern=r"^[a-z][a-z0-9-]{0,15}$", description="The disk's id.", examples=["root"])
]
GroupPath = Annotated[
    str,
    Path(
        pattern=r"^[a-z][a-z0-9-]{0,15}$", description="The rate group's id.", examples=["tenant"]
    ),
]
NicPath = Annotated[
    str,
    Path(pattern=r"^[a-z][a-z0-9-]{0,15}$", description="The interface's id.", examples=["net0"]),
]
OperationPath = Annotated[
    str, Path(min_length=1, max_length=64, pattern=_REF, description="The operation's id.")
]

Wait = Annotated[
    float,
    Query(
        ge=0,
        le=60,
        allow_inf_nan=False,
        description="Seconds to wait for the end; what takes longer answers 202 with an operation.",
    ),
]
NewName = Annotated[
    str,
    # Query first: behind a validator, its pattern would be missing in the document.
    Query(
        max_length=MAX_NAME_CHARS,
        pattern=NAME_PATTERN,
        description=NAME_TEXT,
        json_schema_extra=NOT_A_UUID,
    ),
    AfterValidator(refuse_uuid),
]
Digest = Annotated[
    str | None,
    Query(pattern=r"^[0-9a-f]{64}$", description="Refuse the body if its sha256 differs."),
]
Limit = Annotated[int, Query(ge=1, le=1000, description="Most objects in the page.")]
Cursor = Annotated[
    str | None,
    Query(min_length=1, max_length=256, description="`next_cursor` of the page before."),
]


def page_query(limit: Limit = 100, cursor: Cursor = None) -> ListQuery:
    """Return which part of a list is asked for."""
    return ListQuery(limit=limit, cursor=cursor)


def vm_query(
    limit: Limit = 100,
    cursor: Cursor = None,
    state: Annotated[VmState | None, Query(description="Only VMs in this state.")] = None,
    label: Annotated[
        str | None,
        Query(
            max_length=320,
            pattern=r"^[a-z0-9][a-z0-9./_-]{0,62}(=.*)?$",
            description="Only VMs with this label: `key` or `key=value`.",
            examples=["env=prod"],
        ),
    ] = None,
) -> ListQuery:
    """Return which VMs are asked for."""
    return ListQuery(limit=limit, cursor=cursor, state=state, label=label)


def detach_query(
    force: Annotated[
        bool, Query(description="Pull it out without asking the guest, as from a live machine.")
    ] = False,
    timeout_s: Annotated[
        float,
        Query(
            ge=0,
            le=600,
            allow_inf_nan=False,
            description="Seconds that a running guest has to let go of it.",
        ),
    ] = 10.0,
) -> DetachQuery:
    """Return how a device is detached."""
    return DetachQuery(force=force, timeout_s=timeout_s)


PageQuery = Annotated[ListQuery, Depends(page_query)]
VmQuery = Annotated[ListQuery, Depends(vm_query)]
Detach = Annotated[DetachQuery, Depends(detach_query)]
