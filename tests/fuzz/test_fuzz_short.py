# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A few seconds of each fuzz target; what is C under AddressSanitizer and UBSan."""

from __future__ import annotations

import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.fuzz.fuzzing import C_TARGETS, PYTHON_TARGETS, build, fuzz

pytestmark = pytest.mark.slow
needs_clang = pytest.mark.skipif(shutil.which("clang") is None, reason="clang is not installed")
needs_atheris = pytest.mark.skipif(
    find_spec("atheris") is None, reason="no Atheris for this Python"
)


@needs_clang
@pytest.mark.parametrize("target", C_TARGETS)
def test_nothing_is_found_in_a_short_run(target: str, tmp_path: Path) -> None:
    fuzz(target, tmp_path, ["-seed=1", "-runs=40000", "-max_total_time=10"])


@needs_atheris
@pytest.mark.parametrize("target", PYTHON_TARGETS)
def test_nothing_is_found_in_a_short_run_of_a_parser(target: str, tmp_path: Path) -> None:
    fuzz(target, tmp_path, ["-seed=1", "-runs=40000", "-max_total_time=10"])


@needs_clang
def test_a_guest_that_rewrites_its_ring_meanwhile_cannot_break_the_engine(tmp_path: Path) -> None:
    program = build("scribble", tmp_path, is_fuzzer=False)
    subprocess.run([str(program), "20000"], check=True)
