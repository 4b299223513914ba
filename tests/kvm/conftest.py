# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The one rule for all tests that need /dev/kvm.

Where this user cannot open it they are skipped, and say so; with CI set they fail instead, as a run
there that tests nothing must not be green.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvm_ffi.system import Kvm

DEVICE = "/dev/kvm"
HERE = Path(__file__).parent


def why_not() -> str | None:
    """Return why /dev/kvm cannot be used; None when it can."""
    try:
        os.close(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as err:
        return f"{DEVICE} cannot be opened: {err.strerror}"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is below this folder."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.kvm)


@pytest.fixture(scope="session", autouse=True)
def kvm_device() -> None:
    """/dev/kvm, or a skip that says why it is none; a failure where CI is set."""
    reason = why_not()
    if reason is not None and os.environ.get("CI"):
        pytest.fail(f"{reason}, and CI is set")
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def kvm(kvm_device: None) -> Iterator[Kvm]:
    """An open /dev/kvm."""
    with Kvm.open() as system:
        yield system
