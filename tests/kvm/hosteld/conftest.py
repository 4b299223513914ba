# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A hosteld of the tests' own, with tiny guests, on a host whose /dev/kvm they may open."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hostel import Hostel


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory with a path short enough for sockets."""
    path = Path(tempfile.mkdtemp(prefix="ht-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def hostel() -> Iterator[Hostel]:
    """A running hosteld that the tests of one module share."""
    path = Path(tempfile.mkdtemp(prefix="ht-"))
    hostel = Hostel(path)
    try:
        hostel.start()
        yield hostel
    finally:
        hostel.end()
        shutil.rmtree(path)


@pytest.fixture
def own_hostel(directory: Path) -> Iterator[Hostel]:
    """A running hosteld for one test that is rough with it."""
    hostel = Hostel(directory)
    try:
        hostel.start()
        yield hostel
    finally:
        hostel.end()
