# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Rate limits of one device, and of several together."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints, model_validator

from .common import Request, Response

# As kvm_ffi/rate_limiter.py has them.
MAX_RATE = 10**12
MAX_BURST = 1 << 32
Rate = Annotated[int, Field(ge=1, le=MAX_RATE)]
Burst = Annotated[int, Field(ge=1, le=MAX_BURST)]
GroupId = Annotated[
    str,
    StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,15}$"),
    Field(description="Client-chosen id of a rate group, unique in its VM.", examples=["tenant"]),
]


class RateLimit(Request):
    """What a device may do in a second, and at once after it was idle; null is no limit."""

    bytes_per_s: Rate | None = None
    bytes_burst: Burst | None = Field(
        default=None,
        description="Left out, a tenth of a second's worth; at least a hundredth counts.",
    )
    ops_per_s: Rate | None = Field(default=None, description="Requests of any kind.")
    ops_burst: Burst | None = Field(default=None, description="As bytes_burst.")

    @model_validator(mode="after")
    def _burst_of_a_rate(self) -> RateLimit:
        for name in ("bytes", "ops"):
            if getattr(self, f"{name}_burst") and not getattr(self, f"{name}_per_s"):
                raise ValueError(f"`{name}_burst` goes with `{name}_per_s` only")
        return self


class RateGroupCreate(Request):
    """A limit that disks of one VM share, each by naming it as its `rate_group`."""

    id: GroupId
    rate_limit: RateLimit | None = Field(
        default=None, description="Of all its disks in sum; a disk's own limit holds too."
    )


class RateGroup(Response):
    """A limit that disks of the VM share, as it is."""

    id: str
    rate_limit: RateLimit | None


class RateGroupPatch(Request):
    """A rate group's new limits, at once."""

    rate_limit: RateLimit | None = Field(description="Null takes the limits away.")
