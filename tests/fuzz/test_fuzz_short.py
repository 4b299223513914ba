# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A few seconds of each fuzz target, under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.fuzz.fuzzing import TARGETS, build, fuzz

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("clang") is None, reason="clang is not installed"),
]


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_found_in_a_short_run(target: str, tmp_path: Path) -> None:
    fuzz(target, tmp_path, ["-seed=1", "-runs=40000", "-max_total_time=10"])


def test_a_guest_that_rewrites_its_ring_meanwhile_cannot_break_the_engine(tmp_path: Path) -> None:
    program = build("scribble", tmp_path, is_fuzzer=False)
    subprocess.run([str(program), "20000"], check=True)
