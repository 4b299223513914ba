# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Another file behind a disk, while its guest uses it."""

from __future__ import annotations

import http.client
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.rest import ApiFailure
from tests.support.disk_kernel import BLOCK_BYTES, FILL, DiskGuest
from tests.support.hostel import Hostel, is_locked

MIB = 1 << 20


def disk_file(hostel: Hostel, name: str, fill: bytes, size_mib: int = 1) -> Path:
    path = hostel.directory / name
    path.write_bytes(fill * (size_mib * MIB))
    return path


@pytest.fixture
def old(hostel: Hostel) -> Path:
    return disk_file(hostel, "old.raw", b"o")


@pytest.fixture
def new(hostel: Hostel) -> Path:
    return disk_file(hostel, "new.raw", b"n", size_mib=3)


@pytest.fixture(params=["auto", "threads"])
def guest(hostel: Hostel, old: Path, request: pytest.FixtureRequest) -> Iterator[DiskGuest]:
    guest = DiskGuest(hostel, old, io_engine=request.param)
    yield guest
    guest.delete()


def shown(guest: DiskGuest) -> tuple[str, int]:
    [disk] = guest.hostel.api.vm(guest.name)["disks"]
    return disk["path"], disk["size_bytes"]


def test_the_guest_goes_on_with_the_new_file_and_its_size(
    guest: DiskGuest, old: Path, new: Path
) -> None:
    assert guest.ask("aB") == ["0o1", "0o1"]
    vm = guest.swap(new)
    assert vm["disks"][0]["path"] == str(new)
    assert shown(guest) == (str(new), 3 * MIB)
    assert (is_locked(old), is_locked(new)) == (False, True)
    assert guest.ask("abC") == ["0n3", "0n3", "0n3"]
    # Each file has what was written while it was the disk's.
    assert old.read_bytes()[BLOCK_BYTES : 2 * BLOCK_BYTES].startswith(FILL)
    assert old.read_bytes()[2 * BLOCK_BYTES :] == b"o" * (MIB - 2 * BLOCK_BYTES)
    assert new.read_bytes()[2 * BLOCK_BYTES :].startswith(FILL)
    assert guest.events("vm.disk_swapped") == [{"disk": "root", "path": str(new)}]
    # It is its file now, for a reset and for another swap.
    guest.act("reset")
    assert guest.ask("a") == ["0n3"]
    guest.swap(old)
    assert guest.ask("a") == ["0o1"]


def test_a_paused_vm_has_the_new_file_when_it_is_resumed(guest: DiskGuest, new: Path) -> None:
    guest.ask("a")
    guest.hostel.api.act(guest.name, "pause")
    guest.swap(new)
    guest.hostel.api.act(guest.name, "resume")
    assert guest.ask("a") == ["0n3"]


def test_a_stopped_vm_starts_with_the_new_file(guest: DiskGuest, new: Path) -> None:
    guest.hostel.api.act(guest.name, "kill")
    guest.swap(new)
    guest.act("start")
    assert guest.ask("a") == ["0n3"]


def test_what_cannot_be_swapped_is_refused_and_the_old_file_stays(
    guest: DiskGuest, old: Path, new: Path
) -> None:
    hostel = guest.hostel
    other = hostel.run(b"\xf4\xeb\xfd", disks=[{"id": "root", "path": str(new)}])
    image = {"name": "base", "kind": "disk", "path": str(old)}
    hostel.api.post("/v1/images?wait=60", image)
    own = hostel.create(b"\xf4", disks=[{"id": "root", "image": "base"}])
    odd = hostel.directory / "odd.raw"
    odd.write_bytes(b"x" * 100)
    refusals = {
        new: (409, "disk_in_use"),
        hostel.directory / "missing.raw": (422, "disk_missing"),
        hostel.directory: (422, "disk_kind"),
        odd: (422, "disk_size"),
        Path(hostel.api.vm(own)["disks"][0]["path"]): (422, "disk_in_state_dir"),
    }
    told = {}
    for path in refusals:
        with pytest.raises(ApiFailure) as caught:
            guest.swap(path)
        told[path] = (caught.value.status, caught.value.code)
    assert told == refusals
    with pytest.raises(ApiFailure, match="own copy"):
        hostel.api.call("PATCH", f"/v1/vms/{own}/disks/root", {"path": str(old)})
    assert shown(guest) == (str(old), MIB)
    assert guest.ask("a") == ["0o1"]
    assert (is_locked(old), guest.events("vm.disk_swapped")) == (True, [])
    for name in (own, other):
        hostel.delete(name)
    hostel.api.delete("/v1/images/base")


def test_a_disk_that_may_be_written_refuses_a_device_that_may_not(
    guest: DiskGuest, old: Path, new: Path
) -> None:
    command = ["losetup", "--read-only", "--find", "--show", str(new)]
    made = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if made.returncode != 0:
        pytest.skip(f"losetup: {made.stderr.strip()}")
    device = Path(made.stdout.strip())
    try:
        with pytest.raises(ApiFailure) as refused:
            guest.swap(device)
    finally:
        subprocess.run(["losetup", "--detach", str(device)], check=True, timeout=60)
    assert (refused.value.status, refused.value.code) == (422, "disk_permission")
    assert (guest.ask("a"), shown(guest)) == (["0o1"], (str(old), MIB))


def test_a_guest_that_writes_all_the_while_loses_nothing(
    guest: DiskGuest, old: Path, new: Path
) -> None:
    """Its answers count: an OK write is in one of the two files, and never in none."""
    answers: list[str] = []
    letters = "".join(chr(ord("A") + n % 26) for n in range(200))
    writing = threading.Thread(target=lambda: answers.extend(guest.ask(letters)))
    writing.start()
    paths = [new, old]
    for n in range(20):
        guest.swap(paths[n % 2])
    writing.join()
    assert {answer[0] for answer in answers} == {"0"}
    blocks = [path.read_bytes()[: 26 * BLOCK_BYTES : BLOCK_BYTES] for path in (old, new)]
    assert all(FILL[0] in pair for pair in zip(*blocks, strict=True))
    # Each swap has been told, in order.
    told = [event["path"] for event in guest.events("vm.disk_swapped")]
    assert told == [str(paths[n % 2]) for n in range(20)]


def test_a_hosteld_that_is_killed_over_a_swap_believes_the_worker(own_hostel: Hostel) -> None:
    old, new = disk_file(own_hostel, "old.raw", b"o"), disk_file(own_hostel, "new.raw", b"n", 3)
    guest = DiskGuest(own_hostel, old)
    for round_ in range(6):
        asking = threading.Thread(target=_swap_or_fail, args=(guest, [new, old][round_ % 2]))
        asking.start()
        time.sleep(0.002 * round_)
        own_hostel.restart()
        asking.join()
        guest.follow()
        [answer] = guest.ask("a")
        path = {"o": old, "n": new}[answer[1]]
        assert shown(guest)[0] == str(path)
        assert (is_locked(old), is_locked(new)) == (path == old, path == new)
    guest.delete()


def _swap_or_fail(guest: DiskGuest, path: Path) -> None:
    try:
        guest.swap(path)
    except (OSError, http.client.HTTPException, ApiFailure):
        return
