# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvm_ffi.system import Kvm

DEVICE = "/dev/kvm"
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.kvm)


@pytest.fixture(scope="session")
def kvm() -> Iterator[Kvm]:
    """/dev/kvm, or a skip that says why; a failure where HOSTEL_REQUIRE_KVM=1 says it must work."""
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        if os.environ.get("HOSTEL_REQUIRE_KVM") == "1":
            pytest.fail(f"HOSTEL_REQUIRE_KVM=1, but {DEVICE} cannot be opened")
        pytest.skip(f"{DEVICE} cannot be opened")
    with Kvm.open() as system:
        yield system
