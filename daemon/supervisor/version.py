# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Which Hostel this is."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def hostel_version() -> str:
    """Return the installed version, or "0+unknown" in a checkout that is not installed."""
    try:
        return version("hostel")
    except PackageNotFoundError:
        return "0+unknown"
