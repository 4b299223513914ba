# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The linters, as ordinary tests: a missing one fails in CI and is skipped, loudly, elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def run_tool(*argv: str) -> None:
    """Run a linter at the root of the tree and fail with what it says."""
    tool = shutil.which(argv[0], path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    if tool is None:
        if os.environ.get("CI"):
            pytest.fail(f"{argv[0]} is not installed")
        pytest.skip(f"{argv[0]} is not installed: make setup installs it")
    run = subprocess.run(
        [tool, *argv[1:]], cwd=ROOT, capture_output=True, text=True, timeout=110, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


def tracked(*patterns: str) -> list[str]:
    """Return the tracked and new files that match, relative to the root."""
    run = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [name for name in run.stdout.split() if (ROOT / name).exists()]


def test_ruff_finds_nothing() -> None:
    run_tool("ruff", "check", ".")


def test_python_is_formatted() -> None:
    run_tool("ruff", "format", "--check", ".")


def test_types_hold() -> None:
    run_tool("mypy")


def test_c_is_formatted() -> None:
    run_tool("clang-format", "--dry-run", "--Werror", *tracked("*.c", "*.h"))


def test_spelling() -> None:
    run_tool("codespell", *tracked("*.py", "*.md", "*.c", "*.h", "*.toml", "Makefile"))


def test_shell_scripts_are_sound() -> None:
    scripts = [
        name
        for name in tracked()
        if name.endswith(".sh")
        or (ROOT / name).read_bytes()[:30].startswith(b"#!/usr/bin/env bash")
    ]
    assert ".ci/run" in scripts
    run_tool("shellcheck", *scripts)
