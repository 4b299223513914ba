# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A limited engine on the real clock; how near it comes to its limit is told by bench/limits.py."""

from __future__ import annotations

import pytest

from bench.limits import LIMITS, burst_of, serve


@pytest.mark.slow
@pytest.mark.parametrize("limit", LIMITS)
def test_never_more_is_served_than_the_limit_and_one_burst(limit: int) -> None:
    served = serve(limit, 0.3)
    assert served.requests <= limit * served.seconds + burst_of(limit)
    assert served.requests > burst_of(limit)
