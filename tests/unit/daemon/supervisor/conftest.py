# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What the supervisor's tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.supervisor import Harness


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Harness]:
    """A directory for supervisors; no worker outlives the test."""
    made = Harness(tmp_path)
    try:
        yield made
    finally:
        made.end()
