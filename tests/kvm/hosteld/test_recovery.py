# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""hosteld killed at any point: a restart repairs or reports, and leaks nothing."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.rest import ApiFailure, Console, Json
from tests.support import tiny_kernel as tiny
from tests.support.descriptors import WORKER_KINDS, held_by
from tests.support.hostel import (
    Hostel,
    has_tap,
    is_locked,
    is_running,
    kill,
    spare_of,
    zygote_of,
)

QUIET = tiny.boot_timer() + tiny.HALT
ECHO = tiny.boot_timer() + tiny.say("hello\n") + tiny.echo()
ROUNDS = 20
# Kills fall before, into and after what they are to disturb.
LATEST_KILL = 1.3


def test_a_restarted_hosteld_adopts_a_running_guest(own_hostel: Hostel) -> None:
    hostel = own_hostel
    name = hostel.run(ECHO, nics=[{"id": "net0", "tap": hostel.tap("adopt")}])
    before = hostel.api.wait_vm(name, lambda vm: vm["boot_time_us"] is not None, "timed")
    Console(hostel.api, name).wait_for("hello\n")
    hostel.restart()
    after = hostel.api.vm(name)
    same = ("id", "pid", "state", "boot_time_us", "started_at", "nics")
    assert {key: after[key] for key in same} == {key: before[key] for key in same}
    hostel.api.type(name, "again")
    Console(hostel.api, name).wait_for("hello\nagain")
    hostel.api.act(name, "pause")
    hostel.api.act(name, "resume")
    hostel.api.act(name, "kill")
    assert not is_running(before["pid"])
    hostel.delete(name)
    assert not has_tap(hostel.tap("adopt"))


def test_a_graceful_stop_leaves_guests_running(own_hostel: Hostel) -> None:
    name = own_hostel.run(QUIET)
    pid = own_hostel.api.vm(name)["pid"]
    assert own_hostel.daemon.stop() == 0
    assert is_running(pid)
    own_hostel.daemon.start()
    assert own_hostel.api.vm(name)["pid"] == pid
    own_hostel.delete(name)


def test_a_paused_guest_is_adopted_paused(own_hostel: Hostel) -> None:
    name = own_hostel.run(QUIET)
    own_hostel.api.act(name, "pause")
    own_hostel.restart()
    assert own_hostel.api.vm(name)["state"] == "paused"
    assert own_hostel.api.act(name, "resume")["state"] == "running"
    own_hostel.delete(name)


def test_a_death_while_hosteld_was_away_is_told(own_hostel: Hostel) -> None:
    name = own_hostel.run(QUIET)
    pid = own_hostel.api.vm(name)["pid"]
    own_hostel.daemon.kill()
    kill(pid)
    own_hostel.daemon.start()
    vm = own_hostel.api.wait_state(name, "crashed", limit_s=10)
    assert vm["reason"]["code"].startswith("worker_")
    own_hostel.api.act(name, "start")
    own_hostel.delete(name)


def test_a_poweroff_while_hosteld_was_away_is_told(own_hostel: Hostel) -> None:
    # It powers off when it is sent a byte: 1: in al, LSR; test al, 1; jz 1b
    wait = b"\x66\xba\xfd\x03\xec\xa8\x01\x74\xfb"
    off = tiny.out(tiny.SLEEP_CONTROL, tiny.SLEEP_S5)
    name = own_hostel.run(tiny.say("up") + wait + tiny.delay(300_000) + off + tiny.HALT)
    pid = own_hostel.api.vm(name)["pid"]
    own_hostel.api.type(name, "x")
    own_hostel.daemon.kill()
    deadline = time.monotonic() + 30
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    own_hostel.daemon.start()
    vm = own_hostel.api.wait_state(name, "stopped", limit_s=10)
    assert vm["reason"]["code"] == "guest_poweroff"
    own_hostel.delete(name)


def test_a_dead_zygote_is_replaced(own_hostel: Hostel) -> None:
    kill(zygote_of(own_hostel))
    name = own_hostel.create(QUIET)
    deadline = time.monotonic() + 30
    while own_hostel.api.request("POST", f"/v1/vms/{name}/start?wait=60").status != 200:
        assert time.monotonic() < deadline
    assert own_hostel.api.vm(name)["state"] == "running"
    own_hostel.delete(name)


def test_a_spare_worker_gets_the_next_vm(own_hostel: Hostel) -> None:
    spare = spare_of(own_hostel)
    name = own_hostel.run(QUIET)
    assert own_hostel.api.vm(name)["pid"] == spare
    assert spare_of(own_hostel) != spare
    own_hostel.delete(name)


def test_a_start_does_without_a_spare_that_was_killed(own_hostel: Hostel) -> None:
    for _ in range(5):
        kill(spare_of(own_hostel))
        name = own_hostel.run(QUIET)
        assert own_hostel.api.vm(name)["state"] == "running"
        own_hostel.delete(name)


def test_a_spare_worker_holds_nothing_of_any_vm(own_hostel: Hostel) -> None:
    own_hostel.run(QUIET)
    held = held_by(spare_of(own_hostel))
    # The socket that brings a VM is one of a pair: it has no name.
    mine = {"/dev/null", "memfd:hostel-heap", "own maps", "own pagemap", "own task"}
    assert set(held) == {*mine, "socket of without a name", str(own_hostel.daemon.log)}


def test_a_worker_holds_no_descriptors_but_its_own_vm_s(own_hostel: Hostel) -> None:
    hostel, names = own_hostel, []
    for index in range(2):
        path = hostel.directory / f"disk-{index}.raw"
        path.write_bytes(bytes(1 << 20))
        names.append(
            hostel.run(
                QUIET,
                disks=[{"id": "root", "path": str(path)}],
                nics=[{"id": "net0", "tap": hostel.tap(f"fds{index}"), "backend": "tap"}],
            )
        )
    for index, name in enumerate(names):
        vm = hostel.api.vm(name)
        state = hostel.daemon.state_dir / "vms" / vm["id"]
        runtime = hostel.daemon.runtime_dir / "vms" / vm["id"]
        (kernel,) = hostel.daemon.state_dir.glob("kernels/*/vmlinux")
        control = runtime / "control.sock"
        mine = {
            str(state / "worker.log"),
            str(state / "console.log"),
            str(runtime / "last_words"),
            str(kernel),
            str(hostel.directory / f"disk-{index}.raw"),
            f"tap {hostel.tap(f'fds{index}')}",
            f"socket listening on {control}",
            f"socket of {control}",
        }
        assert set(held_by(vm["pid"])) == mine | WORKER_KINDS
        hostel.delete(name)


def test_a_spare_ends_with_its_hosteld(own_hostel: Hostel) -> None:
    spare = spare_of(own_hostel)
    own_hostel.daemon.kill()
    deadline = time.monotonic() + 10
    while is_running(spare):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    own_hostel.daemon.start()


def kill_during(hostel: Hostel, act: Callable[[], object], after_s: float) -> None:
    """Start a request, kill hosteld some time into it, and start hosteld again."""
    thread = threading.Thread(target=_try, args=(act,))
    thread.start()
    time.sleep(after_s)
    hostel.daemon.kill()
    thread.join()
    hostel.daemon.start()


def timed(act: Callable[[], object]) -> float:
    """Return the seconds that something takes."""
    began = time.monotonic()
    act()
    return time.monotonic() - began


def _try(act: Callable[[], object]) -> None:
    try:
        act()
    except (ApiFailure, OSError, ValueError):
        return  # killed meanwhile: no answer, or one that is cut short


def settled(hostel: Hostel, name: str) -> Json | None:
    """Return a VM once hosteld has made up its mind about it; None when it is gone."""
    deadline = time.monotonic() + 30
    while True:
        reply = hostel.api.request("GET", f"/v1/vms/{name}")
        if reply.status == 404:
            return None
        vm = reply.json
        if vm["state"] not in {"creating", "starting", "stopping", "deleting"}:
            return vm
        assert time.monotonic() < deadline, vm
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_kill_at_any_point_of_create_and_delete_leaks_nothing(own_hostel: Hostel) -> None:
    hostel = own_hostel
    chance = random.Random(20)
    disk = hostel.directory / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    image = {"name": "image", "path": str(disk)}
    hostel.api.post("/v1/images?wait=60", image)
    body = {
        "name": "victim",
        "kernel": hostel.kernel(QUIET),
        "memory_mib": 16,
        "disks": [{"id": "root", "image": "image"}, {"id": "data", "path": str(disk)}],
        "nics": [{"id": "net0", "tap": hostel.tap("victim")}],
        "start": True,
    }
    create_s = timed(lambda: hostel.api.post("/v1/vms?wait=30", body))
    delete_s = timed(lambda: hostel.delete("victim"))
    for _ in range(ROUNDS):
        kill_during(
            hostel,
            lambda: hostel.api.post("/v1/vms?wait=30", body),
            chance.uniform(0, LATEST_KILL * create_s),
        )
        vm = settled(hostel, "victim")
        check_truth(hostel, vm)
        if vm is None:
            hostel.api.post("/v1/vms?wait=30", body)
        kill_during(
            hostel, lambda: hostel.delete("victim"), chance.uniform(0, LATEST_KILL * delete_s)
        )
        vm = settled(hostel, "victim")
        check_truth(hostel, vm)
        if vm is not None:
            hostel.delete("victim")
        check_gone(hostel, disk)


def check_truth(hostel: Hostel, vm: Json | None) -> None:
    """What the API says is what the processes are."""
    if vm is None or vm["state"] == "stopped":
        hostel.wait_workers()
    elif vm["state"] in {"running", "paused"}:
        hostel.wait_workers(vm["pid"])


def check_gone(hostel: Hostel, disk: Path) -> None:
    """Nothing of a deleted VM is left."""
    assert hostel.api.get("/v1/vms")["items"] == []
    hostel.wait_workers()
    assert not has_tap(hostel.tap("victim"))
    assert not is_locked(disk)
    for parent in (hostel.daemon.state_dir, hostel.daemon.runtime_dir):
        assert list((parent / "vms").iterdir()) == []
