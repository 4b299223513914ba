# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What an API call can fail with; each one becomes an RFC 9457 problem.

ApiError             .status .code .detail .field
 +- BadRequest 400   the request itself is wrong
 +- Unauthorized 401 no or wrong credentials
 +- NotFound 404     no such object
 +- Conflict 409     wrong state (.state, .allowed), name taken, in use
 +- PreconditionFailed 412   If-Match named another version
 +- TooLarge 413     the body passes the limit
 +- Invalid 422      a value is out of range, or names something that is not there
 +- Internal 500     a defect of the daemon; the log has the trace
 +- HostFailure 502  the host or a worker could not do it
 +- Busy 503         try again
 +- NoSpace 507      the state directory is full or read-only
"""

from __future__ import annotations

from collections.abc import Sequence

from .models.common import Problem


class ApiError(Exception):
    """Base: ``detail`` is one sentence with the value, the limit and what to do."""

    status = 500
    title = "Internal error"

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        field: str | None = None,
        state: str | None = None,
        allowed: Sequence[str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.field = field
        self.state = state
        self.allowed = None if allowed is None else list(allowed)

    def problem(self) -> Problem:
        """Return the body that a client gets."""
        return Problem(
            title=self.title,
            status=self.status,
            code=self.code,
            detail=self.detail,
            field=self.field,
            state=self.state,
            allowed=self.allowed,
        )


class BadRequest(ApiError):
    """400."""

    status, title = 400, "Bad request"


class Unauthorized(ApiError):
    """401."""

    status, title = 401, "Unauthorized"


class NotFound(ApiError):
    """404."""

    status, title = 404, "Not found"


class Conflict(ApiError):
    """409."""

    status, title = 409, "Conflict"


class PreconditionFailed(ApiError):
    """412."""

    status, title = 412, "Precondition failed"


class TooLarge(ApiError):
    """413."""

    status, title = 413, "Content too large"


class Invalid(ApiError):
    """422."""

    status, title = 422, "Invalid value"


class Internal(ApiError):
    """500."""

    status, title = 500, "Internal error"


class HostFailure(ApiError):
    """502."""

    status, title = 502, "Host failure"


class Busy(ApiError):
    """503."""

    status, title = 503, "Busy"


class NoSpace(ApiError):
    """507."""

    status, title = 507, "Insufficient storage"
