# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A guest that starts its watchdog and forgets it: each action, its event, and what survives."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.hosteld import is_running
from lab.rest import ApiFailure, Json
from tests.support import tiny_kernel as tiny
from tests.support.disk_kernel import DiskGuest, disk_kernel
from tests.support.frozen import frozen_disk
from tests.support.hostel import Hostel

CONTROL, COUNTDOWN, LEFT = 0x5E0, 0x5E4, 0x5E8
# The shortest that there is: a second.
FORGETFUL = tiny.out32(COUNTDOWN, 1) + tiny.out32(CONTROL, 1) + tiny.say("started ") + tiny.HALT
CAREFUL = (
    tiny.out32(COUNTDOWN, 1)
    + tiny.out32(CONTROL, 1)
    + tiny.forever(tiny.out32(LEFT, 1) + tiny.delay(1000))
)
LIMIT_S = 30.0


def told(hostel: Hostel, name: str) -> list[Json]:
    """Return what events told of a VM's watchdog."""
    items: list[Json] = hostel.api.get("/v1/events?limit=1000")["items"]
    return [
        item["data"]
        for item in items
        if item["type"] == "vm.watchdog" and item["object"]["name"] == name
    ]


def wait(check: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not check():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def run(hostel: Hostel, action: str, code: bytes = FORGETFUL) -> str:
    return hostel.run(code, watchdog={"action": action})


def test_poweroff_stops_the_vm_and_says_why(hostel: Hostel) -> None:
    name = run(hostel, "poweroff")
    vm = hostel.api.wait_state(name, "stopped", limit_s=LIMIT_S)
    assert vm["reason"]["code"] == "watchdog"
    assert told(hostel, name) == [{"action": "poweroff", "count": 1}]
    hostel.delete(name)


def test_reset_boots_the_guest_again(hostel: Hostel) -> None:
    name = run(hostel, "reset")
    vm = hostel.api.wait_vm(name, lambda vm: vm["reason"] is not None, "reset", limit_s=LIMIT_S)
    assert (vm["state"], vm["reason"]["code"]) == ("running", "watchdog")
    wait(lambda: hostel.console(name).count("started") >= 2, "no second boot")
    assert told(hostel, name)[0] == {"action": "reset", "count": 1}
    hostel.delete(name)


def test_pause_keeps_the_guest_for_a_look_and_it_can_go_on(hostel: Hostel) -> None:
    name = run(hostel, "pause")
    vm = hostel.api.wait_state(name, "paused", limit_s=LIMIT_S)
    assert vm["reason"]["code"] == "watchdog"
    assert hostel.api.act(name, "resume")["state"] == "running"
    assert told(hostel, name) == [{"action": "pause", "count": 1}]
    hostel.delete(name)


def test_a_pause_that_fails_is_told_and_the_guest_runs_on(
    own_hostel: Hostel, directory: Path
) -> None:
    with frozen_disk(directory) as disk:
        start = tiny.out32(COUNTDOWN, 1) + tiny.out32(CONTROL, 1)
        code = disk_kernel(first=start, idle=tiny.out32(LEFT, 1))
        watchdog = {"watchdog": {"action": "pause"}}
        guest = DiskGuest(own_hostel, disk.path, code=code, vm=watchdog, cache="none")
        disk.freeze()
        own_hostel.api.type(guest.name, "A")  # and waits for the disk from here on
        wait(lambda: told(own_hostel, guest.name), "no event")
        [event] = told(own_hostel, guest.name)
        assert (event["action"], event["count"]) == ("pause", 1)
        assert "cannot be paused: engine still busy" in event["error"]
        vm = own_hostel.api.vm(guest.name)
        assert (vm["state"], vm["reason"]["code"]) == ("running", "watchdog")
        assert event["error"] in vm["reason"]["message"]
        begin = len(guest.console.text)
        disk.thaw()
        guest.console.wait_for(".", after=begin)
        assert guest.ask("a") == ["0w1"]
        guest.delete()


def test_a_guest_cannot_flood_the_events(hostel: Hostel) -> None:
    name = run(hostel, "reset")
    wait(lambda: hostel.console(name).count("started") >= 4, "it does not boot again")
    assert told(hostel, name) == [{"action": "reset", "count": 1}]
    hostel.delete(name)


def test_none_tells_and_the_guest_goes_on(hostel: Hostel) -> None:
    name = run(hostel, "none")
    wait(lambda: told(hostel, name), "no event")
    assert hostel.api.vm(name)["state"] == "running"
    assert hostel.api.vm(name)["reason"] is None
    hostel.delete(name)


def test_guest_that_resets_it_in_time_is_left_alone_and_a_pause_does_not_count(
    hostel: Hostel,
) -> None:
    name = run(hostel, "poweroff", CAREFUL)
    hostel.api.act(name, "pause")
    other = run(hostel, "none")  # started later, and yet the first one to expire
    wait(lambda: told(hostel, other), "no event")
    assert hostel.api.act(name, "resume")["state"] == "running"
    assert told(hostel, name) == []
    hostel.delete(name)
    hostel.delete(other)


def test_expiry_while_hosteld_is_away_is_told_by_the_next_one(own_hostel: Hostel) -> None:
    name = run(own_hostel, "poweroff")
    pid = own_hostel.api.vm(name)["pid"]
    own_hostel.daemon.kill()
    wait(lambda: not is_running(pid), "it runs on")
    own_hostel.daemon.start()
    assert own_hostel.api.vm(name)["state"] == "stopped"
    assert told(own_hostel, name) == [{"action": "poweroff", "count": 1}]


def test_without_one_its_registers_are_not_there(hostel: Hostel) -> None:
    name = hostel.run(FORGETFUL)
    assert hostel.api.vm(name)["watchdog"] is None
    other = run(hostel, "none")
    wait(lambda: told(hostel, other), "no event")
    assert told(hostel, name) == []
    hostel.delete(name)
    hostel.delete(other)


def test_action_that_is_none_is_refused(hostel: Hostel) -> None:
    with pytest.raises(ApiFailure, match=r"watchdog\.action"):
        run(hostel, "explode")
