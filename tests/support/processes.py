# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The processes that a hosteld under test has beside its workers."""

from __future__ import annotations

import os
from pathlib import Path

from tests.support.hostel import Hostel


def back_ends(hostel: Hostel, device: str = "") -> set[int]:
    """Return the back ends of a hosteld's VMs, or those of one device."""
    mark = os.fsencode(f"HOSTEL_BACKEND={hostel.daemon.runtime_dir}/")
    end = os.fsencode(f"/{device}" if device else "")
    found = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            values = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if any(value.startswith(mark) and value.endswith(end) for value in values):
            found.add(int(path.parent.name))
    return found
