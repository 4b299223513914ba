# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Disks on storage that hangs: just then the operator has to get at the VM."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.rest import ApiFailure
from tests.support.disk_kernel import BLOCK_BYTES, FILL, DiskGuest
from tests.support.frozen import MIB, FrozenDisk, frozen_disk
from tests.support.hostel import Hostel, children_of, name_of

WAIT_S = 30.0


@pytest.fixture
def frozen(directory: Path) -> Iterator[FrozenDisk]:
    with frozen_disk(directory) as disk:
        yield disk


@pytest.fixture
def new(directory: Path) -> Path:
    path = directory / "new.raw"
    path.write_bytes(bytes(MIB))
    return path


@contextlib.contextmanager
def hostel_with(directory: Path, frozen: FrozenDisk, sync_timeout_s: float) -> Iterator[Hostel]:
    """A hosteld that waits so long for a sync; it ends before its disk does."""
    config = directory / "hosteld.toml"
    config.write_text(f"sync_timeout_s = {sync_timeout_s}\n")
    hostel = Hostel(directory, ["--config", str(config)])
    try:
        hostel.start()
        yield hostel
    finally:
        frozen.thaw()
        hostel.end()


@pytest.fixture
def impatient(directory: Path, frozen: FrozenDisk) -> Iterator[Hostel]:
    """A hosteld that waits a moment."""
    with hostel_with(directory, frozen, 0.5) as hostel:
        yield hostel


@pytest.fixture
def patient(directory: Path, frozen: FrozenDisk) -> Iterator[Hostel]:
    """A hosteld that waits longer than any test."""
    with hostel_with(directory, frozen, 3600) as hostel:
        yield hostel


def syncs(hostel: Hostel) -> list[int]:
    assert hostel.daemon.process is not None
    return [pid for pid in children_of(hostel.daemon.process.pid) if name_of(pid) == "sync"]


def test_a_swap_away_from_it_fails_in_time_and_works_when_it_answers(
    impatient: Hostel, frozen: FrozenDisk, new: Path
) -> None:
    guest = DiskGuest(impatient, frozen.path)
    assert guest.ask("A") == ["0\x001"]
    frozen.freeze()
    assert guest.ask("B") == ["0\x001"]
    for _ in range(3):
        with pytest.raises(ApiFailure, match="not synced within") as told:
            guest.swap(new)
        assert (told.value.status, told.value.code) == (502, "disk_hangs")
        assert len(syncs(impatient)) == 1
    assert impatient.api.vm(guest.name)["disks"][0]["path"] == str(frozen.path)
    # Neither does it keep hosteld from ending, and the next one from being there.
    impatient.restart()
    guest.follow()
    assert guest.ask("a") == ["0w1"]
    frozen.thaw()
    guest.swap(new)
    assert guest.ask("a") == ["0\x001"]
    old = frozen.path.read_bytes()[: 2 * BLOCK_BYTES]
    assert (old[:1], old[BLOCK_BYTES : BLOCK_BYTES + 1]) == (FILL, FILL)
    guest.delete()


@pytest.mark.parametrize("how", ["kill", "delete"])
def test_a_vm_can_be_ended_while_a_swap_waits_for_it(
    patient: Hostel, frozen: FrozenDisk, new: Path, how: str
) -> None:
    guest = DiskGuest(patient, frozen.path)
    frozen.freeze()
    guest.ask("A")
    failures: list[ApiFailure] = []

    def swap() -> None:
        with pytest.raises(ApiFailure) as told:
            guest.swap(new)
        failures.append(told.value)

    swapping = threading.Thread(target=swap)
    swapping.start()
    deadline = time.monotonic() + WAIT_S
    while not syncs(patient):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if how == "kill":
        patient.api.act(guest.name, "kill")
        assert patient.api.vm(guest.name)["state"] == "stopped"
    else:
        patient.delete(guest.name)
    swapping.join(WAIT_S)
    assert [failure.code for failure in failures] == ["worker_gone"]
    patient.wait_workers()
    # The process that hangs is left.
    assert len(syncs(patient)) == 1
    guest.console.close()
