# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""One hosteld for the whole tier: where Linux guests need the lab, every start of it is dear."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.guests import Guest, find_guest
from lab.where import why_not_here
from tests.support.hostel import Hostel

# An emulated CPU runs these 15 to 30 times slower than a host.
TIMEOUT_S = 600


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.guest)
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))


@pytest.fixture(scope="session")
def guest() -> Guest:
    """The Linux guest's files; skips where no Linux guest runs, but never in the lab."""
    reason = why_not_here()
    if reason is not None:
        pytest.skip(f"{reason}: make test-guest runs this in the lab")
    return find_guest()


@pytest.fixture(scope="session")
def hostel(guest: Guest) -> Iterator[Hostel]:
    """A running hosteld with the guest's files imported."""
    directory = Path(tempfile.mkdtemp(prefix="hg-"))
    hostel = Hostel(directory)
    try:
        hostel.start()
        api = hostel.api
        api.post("/v1/kernels?wait=60", {"name": "debian", "path": str(guest.kernel)})
        for name, kind, path in (
            ("initrd", "initrd", guest.initrd),
            ("instant", "initrd", guest.instant),
            ("root", "disk", guest.disk),
        ):
            image = {"name": name, "kind": kind, "path": str(path)}
            api.post("/v1/images?wait=60", image)
        yield hostel
    finally:
        hostel.end()
        shutil.rmtree(directory)
