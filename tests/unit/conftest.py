# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Hypothesis without its deadline: on a busy machine an example takes as long as it takes."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")
