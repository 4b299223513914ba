# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The one translator from what can go wrong inside to what a client is told."""

from __future__ import annotations

import errno
import logging
from typing import Final

from api.errors import ApiError, Busy, Conflict, HostFailure, Internal, Invalid, NoSpace
from api.models.vms import VmState

from ..errors import WorkerError
from ..images.errors import Cancelled, ImageError, StorageError
from .store import StoreBusy, StoreFailed, StoreFull

log = logging.getLogger(__name__)

# What a worker cannot do because of its guest.
_GUEST_REFUSALS: Final = frozenset({"guest_ignores_keys"})
# What a file system says that takes nothing more, and what helps.
_REMEDIES: Final = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room, or raise its quota",
    errno.EROFS: "mount it read-write",
}


def translate(err: Exception, doing: str) -> ApiError:
    """Return the API's error for any other; what is not foreseen is logged with its trace.

    Args:
        err: what was raised.
        doing: for messages, such as ``vm.start web-1``.
    """
    if isinstance(err, ApiError):
        return err
    if isinstance(err, StoreBusy):
        return Busy("database_busy", str(err))
    if isinstance(err, StoreFull) and not isinstance(err, StoreFailed):
        return NoSpace("state_dir_full", str(err))
    if isinstance(err, WorkerError):
        return HostFailure(err.code, f"{doing}: {err}")
    if isinstance(err, ImageError):
        return _image_error(err)
    if isinstance(err, OSError):
        if err.errno in _REMEDIES:
            return NoSpace("state_dir_full", f"{doing}: {_os_text(err)}; {_REMEDIES[err.errno]}")
        log.error("host failure doing=%r", doing, exc_info=err)
        return HostFailure("host_failure", f"{doing}: {_os_text(err)}")
    log.error("defect doing=%r", doing, exc_info=err)
    return Internal("internal", f"{doing}: a defect of hosteld, its log has the trace")


def start_failure(err: WorkerError | OSError, vm: str, message: str) -> ApiError:
    """Return what a client is told of a start that failed.

    Args:
        err: what was raised; a file system that takes nothing more is told as such.
        vm: its name.
        message: why, as it is kept.
    """
    if isinstance(err, OSError) and err.errno in _REMEDIES:
        return translate(err, f"vm.start {vm}")
    return HostFailure("start_failed", f"VM {vm}: {message}")


def refusal(err: WorkerError, doing: str, state: VmState) -> ApiError:
    """Return what a client is told of what a worker refused: most of it is the host's failure."""
    if err.code in _GUEST_REFUSALS:
        return Conflict(err.code, f"{doing}: {err}", state=state.value)
    return HostFailure(err.code, f"{doing}: {err}")


def _image_error(err: ImageError) -> ApiError:
    if isinstance(err, StorageError):
        return NoSpace(err.code, err.detail, field=err.field)
    if isinstance(err, Cancelled):
        return Conflict(err.code, err.detail)
    return Invalid(err.code, err.detail, field=err.field)


def _os_text(err: OSError) -> str:
    return f"{err.filename}: {err.strerror}" if err.filename else str(err.strerror or err)
