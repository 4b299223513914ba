# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Which Hostel this is, what its API is called and what has been added to that."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Final

API_VERSIONS: Final[tuple[str, ...]] = ("v1",)
# One name for each addition to v1 after its first release, oldest first; never taken away.
API_EXTENSIONS: Final[tuple[str, ...]] = ()


def hostel_version() -> str:
    """Return the installed version, or "0+unknown" in a checkout that is not installed."""
    try:
        return version("hostel")
    except PackageNotFoundError:
        return "0+unknown"
