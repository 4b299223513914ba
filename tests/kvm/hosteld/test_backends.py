# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Devices that another process serves: started, lost, brought back, and never leaked."""

from __future__ import annotations

import os
import signal
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab.hosteld import is_running
from lab.rest import ApiFailure, Json
from tests.support import tiny_kernel as tiny
from tests.support.hostel import Hostel, is_locked, kill
from tests.support.processes import back_ends
from tests.support.storage_daemon import StorageDaemon, make_image, run_qmp

QUIET = tiny.boot_timer() + tiny.HALT
SIZE_BYTES = 64 << 20
LIMIT_S = 30.0


def wait(check: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not check():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def events(hostel: Hostel, name: str, kind: str) -> list[Json]:
    """Return what happened to a VM."""
    items: list[Json] = hostel.api.get("/v1/events?limit=1000")["items"]
    return [e for e in items if e["type"] == f"vm.backend_{kind}" and e["object"]["name"] == name]


@pytest.fixture
def image(directory: Path) -> Path:
    return make_image(directory / "disk.qcow2", SIZE_BYTES)


def run(hostel: Hostel, image: Path, **options: object) -> str:
    disk = {"id": "root", "path": str(image), "format": "qcow2"}
    return hostel.run(QUIET, disks=[disk], **options)


def test_qcow2_disk_is_served_and_all_goes_with_the_vm(hostel: Hostel, image: Path) -> None:
    name = run(hostel, image)
    (disk,) = hostel.api.vm(name)["disks"]
    assert (disk["format"], disk["size_bytes"]) == ("qcow2", SIZE_BYTES)
    assert len(back_ends(hostel)) == 1
    assert is_locked(image)
    hostel.delete(name)
    assert back_ends(hostel) == set()
    assert not is_locked(image)


def test_lock_of_a_qcow2_disk_keeps_a_second_vm_away(hostel: Hostel, image: Path) -> None:
    name = run(hostel, image)
    with pytest.raises(ApiFailure, match="disk_in_use"):
        run(hostel, image)
    hostel.delete(name)
    other = run(hostel, image)
    hostel.delete(other)


def test_killed_back_end_comes_back(hostel: Hostel, image: Path) -> None:
    name = run(hostel, image)
    worker = hostel.api.vm(name)["pid"]
    for count in (1, 2):
        (pid,) = back_ends(hostel)
        kill(pid)
        wait(lambda n=count: len(events(hostel, name, "recovered")) == n, "no recovery")  # type: ignore[misc]
        assert back_ends(hostel) != {pid}
    (lost, _) = events(hostel, name, "lost")
    assert lost["data"]["device"] == "root"
    vm = hostel.api.vm(name)
    assert (vm["state"], vm["pid"]) == ("running", worker)
    assert is_locked(image)
    assert hostel.api.get(f"/v1/vms/{name}/stats")["disks"]["root"]["reconnects"] == 2
    hostel.delete(name)
    assert back_ends(hostel) == set()


def test_back_end_lives_on_without_hosteld_and_ends_with_its_worker(
    own_hostel: Hostel, image: Path
) -> None:
    name = run(own_hostel, image)
    before = back_ends(own_hostel)
    own_hostel.restart()
    assert back_ends(own_hostel) == before
    kill(own_hostel.api.vm(name)["pid"])
    own_hostel.api.wait_state(name, "crashed", limit_s=LIMIT_S)
    assert back_ends(own_hostel) == set()
    own_hostel.api.act(name, "start")
    own_hostel.delete(name)


def test_back_end_lost_while_hosteld_was_away_comes_back(own_hostel: Hostel, image: Path) -> None:
    name = run(own_hostel, image)
    (pid,) = back_ends(own_hostel)
    own_hostel.daemon.kill()
    kill(pid)
    own_hostel.daemon.start()
    wait(lambda: bool(events(own_hostel, name, "recovered")), "no recovery")
    own_hostel.delete(name)
    assert back_ends(own_hostel) == set()


def test_back_end_whose_vm_ended_while_hosteld_was_away_is_ended(
    own_hostel: Hostel, image: Path
) -> None:
    name = run(own_hostel, image)
    worker = own_hostel.api.vm(name)["pid"]
    own_hostel.daemon.kill()
    kill(worker)
    assert len(back_ends(own_hostel)) == 1
    own_hostel.daemon.start()
    assert own_hostel.api.vm(name)["state"] == "crashed"
    assert back_ends(own_hostel) == set()
    own_hostel.delete(name)


def test_reset_pause_and_resume_keep_the_back_end(hostel: Hostel, image: Path) -> None:
    name = run(hostel, image)
    before = back_ends(hostel)
    for action in ("reset", "pause", "resume"):
        hostel.api.act(name, action)
    assert back_ends(hostel) == before
    assert events(hostel, name, "lost") == []
    hostel.delete(name)


def test_back_end_that_cannot_come_back_is_given_up_and_told(hostel: Hostel, image: Path) -> None:
    name = run(hostel, image)
    image.unlink()
    (pid,) = back_ends(hostel)
    kill(pid)
    wait(lambda: bool(events(hostel, name, "failed")), "no end of it")
    (failed,) = events(hostel, name, "failed")
    assert "no such file" in failed["data"]["message"]
    assert hostel.api.vm(name)["state"] == "running"
    hostel.delete(name)
    assert back_ends(hostel) == set()


def test_loss_is_told_once_though_its_worker_dies_too(hostel: Hostel, image: Path) -> None:
    name = run(hostel, image)
    image.unlink()
    (pid,) = back_ends(hostel)
    kill(pid)
    wait(lambda: bool(events(hostel, name, "lost")), "no word of it")
    kill(hostel.api.vm(name)["pid"])
    hostel.api.wait_state(name, "crashed", limit_s=LIMIT_S)
    time.sleep(0.5)  # more than most of the waits between attempts
    assert len(events(hostel, name, "lost")) == 1
    hostel.delete(name)


def test_back_end_that_is_stopped_is_killed_with_its_vm(hostel: Hostel, image: Path) -> None:
    name = run(hostel, image)
    (pid,) = back_ends(hostel)
    os.kill(pid, signal.SIGSTOP)  # it does not take SIGTERM either
    hostel.delete(name)
    assert not is_running(pid)


@pytest.mark.parametrize("kind", ["vmdk", "vhdx"])
def test_other_formats_are_served(hostel: Hostel, directory: Path, kind: str) -> None:
    image = make_image(directory / f"disk.{kind}", SIZE_BYTES, kind)
    name = hostel.run(QUIET, disks=[{"id": "d", "path": str(image), "format": kind}])
    (disk,) = hostel.api.vm(name)["disks"]
    assert (disk["format"], disk["size_bytes"]) == (kind, SIZE_BYTES)
    hostel.delete(name)


@pytest.fixture
def nbd(directory: Path, image: Path) -> Iterator[str]:
    """An NBD server and its URI."""
    path = directory / "nbd.sock"
    server = StorageDaemon(image, path, nbd=True)
    server.connect().close()
    yield f"nbd+unix:///disk?socket={path}"
    server.kill()


def test_network_block_device_is_served(hostel: Hostel, nbd: str) -> None:
    name = hostel.run(QUIET, disks=[{"id": "d", "nbd": nbd}])
    (disk,) = hostel.api.vm(name)["disks"]
    assert (disk["format"], disk["path"], disk["size_bytes"]) == ("nbd", nbd, SIZE_BYTES)
    hostel.delete(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="virtiofsd needs root")
@pytest.mark.parametrize("read_only", [False, True])
def test_share_is_served_and_goes_with_the_vm(
    hostel: Hostel, directory: Path, read_only: bool
) -> None:
    shared = directory / "shared"
    shared.mkdir()
    share = {"tag": "src", "path": str(shared), "read_only": read_only}
    name = hostel.run(QUIET, shares=[share])
    assert hostel.api.vm(name)["shares"] == [share]
    (first, *_) = sorted(back_ends(hostel))
    kill(first)
    wait(lambda: bool(events(hostel, name, "recovered")), "no recovery")
    hostel.delete(name)
    wait(lambda: back_ends(hostel) == set(), "it is leaked")


# --- what is refused


def refused(hostel: Hostel, **disk: object) -> Json:
    with pytest.raises(ApiFailure) as caught:
        hostel.create(QUIET, disks=[{"id": "root", **disk}])
    assert back_ends(hostel) == set()
    return caught.value.problem


def test_file_of_another_format_is_refused(hostel: Hostel, directory: Path) -> None:
    raw = directory / "raw"
    raw.write_bytes(bytes(1 << 20))
    problem = refused(hostel, path=str(raw), format="qcow2")
    assert (problem["code"], problem["field"]) == ("disk_format", "disks.0.path")
    problem = refused(hostel, path=str(raw), format="vmdk")
    assert problem["code"] == "backend_failed"
    assert str(raw) in problem["detail"]


def test_overlay_is_refused_and_its_backing_file_named(
    hostel: Hostel, directory: Path, image: Path
) -> None:
    overlay = directory / "overlay.qcow2"
    overlay.touch()
    options = {
        "driver": "qcow2", "file": "file", "size": SIZE_BYTES,
        "backing-file": str(image), "backing-fmt": "qcow2",
    }  # fmt: skip
    run_qmp(
        ("blockdev-add", {"driver": "file", "node-name": "file", "filename": str(overlay)}),
        ("blockdev-create", {"job-id": "create", "options": options}),
    )
    problem = refused(hostel, path=str(overlay), format="qcow2")
    assert problem["code"] == "disk_backing"
    assert str(image) in problem["detail"]


def test_image_with_its_data_elsewhere_is_refused(hostel: Hostel, image: Path) -> None:
    with image.open("rb+") as file:
        file.seek(72)
        file.write(struct.pack(">Q", 1 << 2))  # incompatible features: external data file
    assert refused(hostel, path=str(image), format="qcow2")["code"] == "disk_external"


def test_nbd_server_that_is_not_there_is_named(hostel: Hostel, directory: Path) -> None:
    problem = refused(hostel, nbd=f"nbd+unix:///x?socket={directory}/none")
    assert problem["code"] == "backend_failed"
    assert "No such file" in problem["detail"]


def test_share_of_what_is_no_directory_is_refused(hostel: Hostel, image: Path) -> None:
    with pytest.raises(ApiFailure, match="share_missing"):
        hostel.create(QUIET, shares=[{"tag": "x", "path": str(image)}])
    with pytest.raises(ApiFailure, match="share_holds_state_dir"):
        hostel.create(QUIET, shares=[{"tag": "x", "path": "/"}])
