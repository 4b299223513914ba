# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What an API call can fail with; each one becomes an RFC 9457 problem.

ApiError             .status .code .detail .field .errors
 +- BadRequest 400   the request itself is wrong
 +- Unauthorized 401 no or wrong credentials
 +- Forbidden 403    these credentials, or this Host header, may not
 +- NotFound 404     no such object
 +- MethodNotAllowed 405     the path is right, the method is not (.allowed)
 +- RequestTimeout 408       the client stopped sending
 +- Conflict 409     wrong state (.state, .allowed), name taken, in use
 +- PreconditionFailed 412   If-Match named another version
 +- TooLarge 413     the body passes the limit
 +- UnsupportedMedia 415     the body is not what the path takes
 +- Invalid 422      a value is out of range, or names something that is not there
 +- UpgradeRequired 426      the path is a WebSocket
 +- Internal 500     a defect of the daemon; the log has the trace
 +- HostFailure 502  the host or a worker could not do it
 +- Busy 503         try again
 +- NoSpace 507      the state directory is full or read-only
"""

from __future__ import annotations

from collections.abc import Sequence

from .models.common import FieldError, Problem


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
        errors: Sequence[FieldError] | None = None,
    ) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.field = field
        self.state = state
        self.allowed = None if allowed is None else list(allowed)
        self.errors = None if errors is None else list(errors)

    def problem(self, instance: str | None = None) -> Problem:
        """Return the body that a client gets; ``instance`` names the request."""
        return Problem(
            title=self.title,
            status=self.status,
            code=self.code,
            detail=self.detail,
            field=self.field,
            state=self.state,
            allowed=self.allowed,
            errors=self.errors,
            instance=instance,
        )


class BadRequest(ApiError):
    """400."""

    status, title = 400, "Bad request"


class Unauthorized(ApiError):
    """401."""

    status, title = 401, "Unauthorized"


class Forbidden(ApiError):
    """403."""

    status, title = 403, "Forbidden"


class NotFound(ApiError):
    """404."""

    status, title = 404, "Not found"


class MethodNotAllowed(ApiError):
    """405."""

    status, title = 405, "Method not allowed"


class RequestTimeout(ApiError):
    """408."""

    status, title = 408, "Request timeout"


class Conflict(ApiError):
    """409."""

    status, title = 409, "Conflict"


class PreconditionFailed(ApiError):
    """412."""

    status, title = 412, "Precondition failed"


class TooLarge(ApiError):
    """413."""

    status, title = 413, "Content too large"


class UnsupportedMedia(ApiError):
    """415."""

    status, title = 415, "Unsupported media type"


class Invalid(ApiError):
    """422."""

    status, title = 422, "Invalid value"


class UpgradeRequired(ApiError):
    """426."""

    status, title = 426, "Upgrade required"


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


_BY_STATUS: dict[int, type[ApiError]] = {
    kind.status: kind
    for kind in (
        BadRequest,
        Unauthorized,
        Forbidden,
        NotFound,
        MethodNotAllowed,
        RequestTimeout,
        Conflict,
        PreconditionFailed,
        TooLarge,
        UnsupportedMedia,
        Invalid,
        UpgradeRequired,
        Internal,
        HostFailure,
        Busy,
        NoSpace,
    )
}


def error_from_problem(problem: Problem) -> ApiError:
    """Return the error that a problem body stands for, as a client raises it."""
    error = _BY_STATUS.get(problem.status, ApiError)(
        problem.code,
        problem.detail,
        field=problem.field,
        state=problem.state,
        allowed=problem.allowed,
        errors=problem.errors,
    )
    error.status, error.title = problem.status, problem.title
    return error
