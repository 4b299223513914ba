# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What a run of these tests says on a host whose /dev/kvm cannot be opened."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# One test of each folder; none is run.
WANTED = [
    "tests/kvm/kvm_ffi/test_state.py",
    "tests/kvm/devices/test_virtio_in_guest.py",
    "tests/kvm/daemon/test_boot_entry.py",
    "tests/kvm/daemon/test_worker.py",
    "tests/kvm/hosteld/test_ports.py",
]
# On a file system with `nodev` nobody opens a device node, root neither.
HIDE = (
    'mount -t tmpfs -o nodev tmpfs "$1" && mknod "$1/kvm" c 10 232'
    ' && mount --bind "$1/kvm" /dev/kvm && shift && exec "$@"'
)


def outcome(directory: Path, ci: str) -> str:
    """Run the wanted tests without KVM and return pytest's last line."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to hide /dev/kvm in a mount namespace of its own")
    argv = ["unshare", "--mount", "sh", "-c", HIDE, "sh", str(directory)]
    argv += [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=no", *WANTED]
    env = {**os.environ, "CI": ci}
    run = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)
    if "permission denied" in run.stderr or "Operation not permitted" in run.stderr:
        pytest.skip(f"mounting is not permitted: {run.stderr.strip()}")
    return run.stdout.strip().splitlines()[-1]


def test_without_kvm_tests_are_skipped_on_a_laptop(tmp_path: Path) -> None:
    last = outcome(tmp_path, "")
    assert "skipped" in last
    assert not {"passed", "failed", "error", "errors"} & set(last.replace(",", "").split())


def test_without_kvm_tests_fail_in_ci(tmp_path: Path) -> None:
    last = outcome(tmp_path, "true")
    assert "error" in last
    assert not {"passed", "skipped"} & set(last.replace(",", "").split())
