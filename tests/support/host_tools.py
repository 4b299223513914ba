# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Tools of the host that tests need: losetup, mount, mkfs and their like."""

from __future__ import annotations

import subprocess

import pytest


def run(*command: str) -> str:
    """Run a tool of the host, and skip where it does not work."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.CalledProcessError) as err:
        pytest.skip(f"{command[0]}: {getattr(err, 'stderr', None) or err}")
    return done.stdout.strip()
