# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What this API is called and what has been added to it."""

from __future__ import annotations

from typing import Final

API_VERSIONS: Final[tuple[str, ...]] = ("v1",)
# One name for each addition to v1 after its first release, oldest first; never taken away.
API_EXTENSIONS: Final[tuple[str, ...]] = ()
