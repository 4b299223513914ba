# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Debian's own driver finds the watchdog, and a guest that stops petting it is reset."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from lab.guests import Guest
from lab.rest import Json
from tests.support.hostel import Hostel
from tests.support.linux import BOOT_LIMIT_S, LinuxGuest

TIMEOUT_S = 10
CARD_RESET = 0x20  # WDIOF_CARDRESET of <linux/watchdog.h>
SYSFS = "/sys/class/watchdog/watchdog0"


@pytest.fixture(scope="module")
def dog(hostel: Hostel, guest: Guest) -> Iterator[LinuxGuest]:
    hostel.api.post(
        "/v1/vms?wait=60",
        {
            "name": "dog",
            "memory_mib": 256,
            "kernel": "debian",
            "initrd": "initrd",
            "cmdline": guest.cmdline,
            "disks": [{"id": "root", "image": "root"}],
            "watchdog": {},
        },
    )
    dog = LinuxGuest(hostel, guest, "dog")
    with dog.running():
        yield dog


def told(dog: LinuxGuest) -> list[Json]:
    items: list[Json] = dog.hostel.api.get("/v1/events?limit=1000")["items"]
    return [item["data"] for item in items if item["type"] == "vm.watchdog"]


def test_linux_finds_it_and_it_does_not_run(dog: LinuxGuest) -> None:
    assert dog.ask(f"cat {SYSFS}/identity {SYSFS}/state") == "wdat_wdt\ninactive"
    assert dog.ask(f"cat {SYSFS}/bootstatus") == "0"
    assert dog.ask(f"cat {SYSFS}/min_timeout {SYSFS}/max_timeout") == "1\n3600"


def test_guest_that_pets_it_is_left_alone(dog: LinuxGuest) -> None:
    dog.ask(f"watchdog -T {TIMEOUT_S} -t 1 /dev/watchdog")
    assert dog.ask(f"cat {SYSFS}/timeout {SYSFS}/state") == f"{TIMEOUT_S}\nactive"
    dog.ask(f"sleep {TIMEOUT_S + 5}")
    assert 0 < int(dog.ask(f"cat {SYSFS}/timeleft")) <= TIMEOUT_S
    assert told(dog) == []


def test_pause_longer_than_its_time_does_not_expire_it(dog: LinuxGuest) -> None:
    dog.hostel.api.act("dog", "pause")
    time.sleep(TIMEOUT_S + 2)
    dog.hostel.api.act("dog", "resume")
    assert dog.ask("uname") == "Linux"
    assert told(dog) == []


def test_guest_that_stops_petting_is_reset_and_knows_why(dog: LinuxGuest) -> None:
    offset = dog.log_end()
    dog.ask("kill -STOP $(pidof watchdog)")
    dog.hostel.api.wait_vm("dog", lambda vm: vm["reason"] is not None, "reset", BOOT_LIMIT_S)
    assert told(dog) == [{"action": "reset", "count": 1}]
    dog.attach(offset)
    dog.log_in()
    assert dog.ask(f"cat {SYSFS}/bootstatus {SYSFS}/state") == f"{CARD_RESET}\ninactive"
    assert dog.vm["reason"]["code"] == "watchdog"
