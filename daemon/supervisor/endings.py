# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What a worker's end says about its VM."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import Any, Final

from api.models.vms import VmState

from .channel import clean
from .records import ReasonRecord
from .vm_table import reason
from .workers import Ending

# What a worker's last words carry after hosteld's own "quit".
_ENDED_ON_REQUEST: Final = "killed"
MAX_DETAIL_CHARS: Final = 2000


@dataclass(frozen=True, slots=True)
class Verdict:
    """The state that follows, and why, if it was not asked for."""

    state: VmState
    reason: ReasonRecord | None


def judge(ending: Ending, *, was_killed: bool) -> Verdict:
    """Return what becomes of a VM whose worker has ended.

    Args:
        ending: how it ended.
        was_killed: whether a client asked for just that.
    """
    words = ending.last_words
    if was_killed:
        return Verdict(VmState.STOPPED, None)
    if words is not None and words.state == "stopped":
        code = (words.reason or {}).get("code", "stopped")
        asked = code == _ENDED_ON_REQUEST
        return Verdict(VmState.STOPPED, None if asked else reason_of(words.reason))
    if words is not None and words.state == "crashed":
        return Verdict(VmState.CRASHED, reason_of(words.reason))
    return Verdict(VmState.CRASHED, _death(ending))


def reason_of(told: dict[str, Any] | None) -> ReasonRecord | None:
    """Return a worker's reason as it is kept, with bounded texts."""
    if told is None:
        return None
    detail = told.get("detail")
    return reason(
        clean(told.get("code", "unknown"), 64),
        clean(told.get("message", ""), MAX_DETAIL_CHARS),
        {
            clean(key, 64): value if isinstance(value, int) else clean(value, MAX_DETAIL_CHARS)
            for key, value in (detail if isinstance(detail, dict) else {}).items()
        },
    )


_HINTS: Final = {
    "SIGKILL": " (the kernel does that when memory runs out: see dmesg)",
    "SIGBUS": " (the kernel does that when the file system of a pmem file is full, or the file was"
    " shrunk, or memory is broken: see dmesg)",
}


def _death(ending: Ending) -> ReasonRecord:
    detail: dict[str, Any] = {"log": "\n".join(ending.log_tail)[-MAX_DETAIL_CHARS:]}
    last_line = f"; its log ends with: {ending.log_tail[-1]}" if ending.log_tail else ""
    status = ending.wait_status
    if status is None:
        message = "its worker is gone, and nobody saw how it ended"
        return reason("worker_lost", message + last_line, detail)
    if os.WIFSIGNALED(status):
        name = signal_name(os.WTERMSIG(status))
        message = f"its worker was killed by {name}{_HINTS.get(name, '')}{last_line}"
        return reason("worker_killed", message, {"signal": name, **detail})
    code = os.waitstatus_to_exitcode(status)
    message = f"its worker ended by itself with exit status {code}{last_line}"
    return reason("worker_failed", message, {"exit_status": code, **detail})


def signal_name(number: int) -> str:
    """Return a signal's name, such as SIGKILL."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
