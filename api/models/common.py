# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Shapes that every resource shares."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Final, Generic, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

T = TypeVar("T")

NAME_PATTERN: Final = r"^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$"
MAX_NAME_CHARS: Final = 63
NAME_TEXT: Final = (
    "Client-chosen name: 1 to 63 of a-z, 0-9, '-', '.'; no '-' or '.' at an end, and no UUID."
)
# Ids are UUIDs, and a name or an id addresses an object: the two must never be mistaken.
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
NOT_A_UUID: Final[dict[str, Any]] = {
    "not": {"pattern": r"^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$"}
}


def refuse_uuid(name: str) -> str:
    """Return ``name``.

    Raises:
        ValueError: it has the form of an id.
    """
    if _UUID.fullmatch(name):
        raise ValueError(
            f"{name!r} has the form of an id, and would be mistaken for one: choose another name"
        )
    return name


Name = Annotated[
    str,
    StringConstraints(pattern=NAME_PATTERN, max_length=MAX_NAME_CHARS),
    AfterValidator(refuse_uuid),
    Field(description=NAME_TEXT, examples=["web-1"], json_schema_extra=NOT_A_UUID),
]
Ref = Annotated[
    str,
    StringConstraints(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$"),
    Field(description="Name or id of an object: either one addresses it."),
]
Labels = Annotated[
    dict[
        Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9./_-]{0,62}$")],
        Annotated[str, StringConstraints(max_length=256)],
    ],
    Field(description="Free key-value pairs, at most 32.", max_length=32),
]
DeviceId = Annotated[
    str,
    StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,15}$"),
    Field(description="Client-chosen id of a device, unique in its VM.", examples=["root"]),
]
HostPath = Annotated[
    str,
    StringConstraints(pattern=r"^/[^\x00]*$", max_length=4095),
    Field(description="Absolute path on the host.", examples=["/srv/disks/web-1.raw"]),
]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Request(BaseModel):
    """Base of every request body: an unknown field is an error, and no type is guessed."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Response(BaseModel):
    """Base of every response body: v1 grows, so a client ignores fields that it does not know."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Page(Response, Generic[T]):
    """One page of a list."""

    items: list[T]
    next_cursor: str | None = Field(
        default=None, description="Pass as `cursor` for the next page; null on the last one."
    )


class FieldError(Response):
    """One wrong value of a request."""

    field: str | None = Field(
        default=None, description="Path of the field; left out: the body as a whole."
    )
    detail: str


class Problem(Response):
    """RFC 9457 problem details: what was wrong, where, and what to do."""

    type: str = Field(default="about:blank", description="A URI that names the kind of problem.")
    title: str
    status: int = Field(ge=400, le=599)
    code: str = Field(description="Stable, for programs.", examples=["vm_not_found"])
    detail: str = Field(description="One sentence with the value, the limit and what to do.")
    field: str | None = Field(
        default=None, description="Path of the offending field.", examples=["disks.0.path"]
    )
    state: str | None = Field(default=None, description="On 409: the object's state now.")
    allowed: list[str] | None = Field(
        default=None, description="On 409: the actions or states that are allowed now."
    )
    errors: list[FieldError] | None = Field(
        default=None, description="On 422: every wrong value; the first is in `detail` too."
    )
    instance: str | None = Field(
        default=None,
        description="Names this request in the daemon's log.",
        examples=["urn:hostel:request:0f3a9c5e7b2d4186"],
    )


class ObjectRef(Response):
    """Which object something is about."""

    kind: Literal["vm", "kernel", "image", "operation", "host"]
    id: str
    name: str | None = None


Timestamp = Annotated[datetime, Field(description="RFC 3339, UTC.")]
Json = dict[str, Any]
