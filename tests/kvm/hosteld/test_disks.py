# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What a disk is asked to be, from the API to its engine and back."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from lab.rest import ApiFailure
from tests.support import tiny_kernel as tiny
from tests.support.disk_kernel import DiskGuest
from tests.support.hostel import Hostel, is_locked, kill

QUIET = tiny.boot_timer() + tiny.HALT


def disk_file(hostel: Hostel, name: str) -> Path:
    path = hostel.directory / name
    path.write_bytes(bytes(1 << 20))
    return path


def test_a_disk_tells_what_it_was_asked_to_be(hostel: Hostel) -> None:
    path = disk_file(hostel, "asked.raw")
    limit = {"ops_per_s": 1000, "bytes_per_s": 1 << 30}
    disk = {"id": "root", "path": str(path), "io_engine": "threads", "rate_limit": limit}
    name = hostel.run(QUIET, disks=[disk], vcpus=2)
    [shown] = hostel.api.vm(name)["disks"]
    assert (shown["cache"], shown["io_engine"]) == ("writeback", "threads")
    assert shown["rate_limit"] == limit | {"bytes_burst": None, "ops_burst": None}
    details = hostel.api.get(f"/v1/vms/{name}/stats")["disk_details"]["root"]
    # This guest has no driver, so nothing has started the disk.
    assert details["io_engine"] == "auto"
    assert details["queues"] == details["latency"] == []
    assert len(details["latency_limits_ns"]) > 10
    assert (
        "hostel_vm_disk_latency_seconds_bucket"
        in hostel.api.request("GET", "/metrics").body.decode()
    )
    hostel.delete(name)


def test_a_limit_is_changed_on_a_running_disk_and_outlives_a_reset(hostel: Hostel) -> None:
    path = disk_file(hostel, "limited.raw")
    name = hostel.run(QUIET, disks=[{"id": "root", "path": str(path)}])
    limit = {"rate_limit": {"ops_per_s": 50}}
    changed = hostel.api.call("PATCH", f"/v1/vms/{name}/disks/root", limit)
    assert changed["disks"][0]["rate_limit"]["ops_per_s"] == 50
    hostel.api.act(name, "reset")
    assert hostel.api.vm(name)["disks"][0]["rate_limit"]["ops_per_s"] == 50
    freed = hostel.api.call("PATCH", f"/v1/vms/{name}/disks/root", {"rate_limit": None})
    assert freed["disks"][0]["rate_limit"] is None
    hostel.delete(name)


def test_a_rate_group_limits_a_running_guest_and_outlives_reset_and_restart(
    own_hostel: Hostel,
) -> None:
    root, data = disk_file(own_hostel, "grouped.raw"), disk_file(own_hostel, "later.raw")
    guest = DiskGuest(own_hostel, root, vm={"rate_groups": [{"id": "all"}]}, rate_group="all")
    assert [answer[0] for answer in guest.ask("abcd")] == ["0"] * 4
    group = f"/v1/vms/{guest.name}/rate-groups/all"
    limit = {"rate_limit": {"ops_per_s": 1, "ops_burst": 1}}
    own_hostel.api.call("PATCH", group, limit)
    for actions in ((), ("reset",), ("kill", "start")):
        if actions:
            guest.act(*actions)
        began = time.monotonic()
        assert [answer[0] for answer in guest.ask("abc")] == ["0"] * 3
        # One was left, and one comes each second.
        assert time.monotonic() - began >= 2
    assert own_hostel.api.get(f"/v1/vms/{guest.name}/stats")["disks"]["root"]["throttled"] > 0
    # Of two requests one waits more than an hour, and goes by the new limit.
    own_hostel.api.call("PATCH", group, {"rate_limit": {"bytes_per_s": 1, "bytes_burst": 4096}})
    begin = len(guest.console.text)
    own_hostel.api.type(guest.name, "ab")
    began = guest.console.wait_for(".", after=begin)
    own_hostel.api.call("PATCH", group, {"rate_limit": None})
    guest.console.wait_for(".", after=began)
    own_hostel.api.call("PATCH", group, limit)
    own_hostel.restart()
    [shown] = own_hostel.api.vm(guest.name)["rate_groups"]
    assert shown["rate_limit"]["ops_per_s"] == 1
    own_hostel.api.call("PATCH", group, {"rate_limit": None})
    attached = {"id": "data", "path": str(data), "rate_group": "all"}
    vm = own_hostel.api.post(f"/v1/vms/{guest.name}/disks?wait=60", attached)
    assert [disk["rate_group"] for disk in vm["disks"]] == ["all", "all"]
    own_hostel.api.call("DELETE", f"/v1/vms/{guest.name}/disks/data?wait=60&force=true")
    with pytest.raises(ApiFailure, match="no rate group none; it has: all") as refused:
        own_hostel.api.post(f"/v1/vms/{guest.name}/disks", {**attached, "rate_group": "none"})
    assert (refused.value.status, refused.value.code) == (422, "rate_group_unknown")
    guest.delete()


def test_a_disk_past_the_page_cache_starts(hostel: Hostel) -> None:
    path = disk_file(hostel, "direct.raw")
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError as err:
        pytest.skip(f"O_DIRECT in {path.parent}: {err.strerror}")
    disk = {"id": "root", "path": str(path), "cache": "none"}
    name = hostel.create(QUIET, disks=[disk])
    assert hostel.api.vm(name)["disks"][0]["cache"] == "none"
    assert hostel.api.act(name, "start")["state"] == "running"
    hostel.delete(name)


def test_a_lock_keeps_other_vms_away_also_while_and_after_hosteld_is_down(
    own_hostel: Hostel,
) -> None:
    path = disk_file(own_hostel, "wanted.raw")
    disks = [{"id": "root", "path": str(path)}]
    owner = own_hostel.run(QUIET, disks=disks)
    other = own_hostel.create(QUIET, disks=disks)
    reader = own_hostel.create(QUIET, disks=[{**disks[0], "read_only": True}])
    for _ in range(2):
        for name in (other, reader):
            with pytest.raises(ApiFailure, match="another VM or program uses it") as refused:
                own_hostel.api.act(name, "start")
            assert (refused.value.status, refused.value.code) == (409, "disk_in_use")
        own_hostel.daemon.kill()
        assert is_locked(path)
        own_hostel.daemon.start()
        assert own_hostel.api.vm(owner)["state"] == "running"
    # A reset keeps it too; with the worker it goes, whoever saw that.
    own_hostel.api.act(owner, "reset")
    with pytest.raises(ApiFailure, match="another VM or program uses it"):
        own_hostel.api.act(other, "start")
    pid = own_hostel.api.vm(owner)["pid"]
    own_hostel.daemon.kill()
    kill(pid)
    own_hostel.daemon.start()
    assert own_hostel.api.act(other, "start")["state"] == "running"
    with pytest.raises(ApiFailure, match="another VM or program uses it"):
        own_hostel.api.act(owner, "start")


def test_readers_share_a_disk_and_keep_a_writer_away(own_hostel: Hostel) -> None:
    path = disk_file(own_hostel, "shared.raw")
    disk = {"id": "root", "path": str(path)}
    readers = [own_hostel.run(QUIET, disks=[{**disk, "read_only": True}]) for _ in range(2)]
    own_hostel.restart()
    writer = own_hostel.create(QUIET, disks=[disk])
    for name in readers:
        with pytest.raises(ApiFailure, match="cannot be locked to write"):
            own_hostel.api.act(writer, "start")
        own_hostel.delete(name)
    assert own_hostel.api.act(writer, "start")["state"] == "running"


def test_a_guest_in_the_midst_of_io_is_killed_and_started_again_and_again(
    own_hostel: Hostel,
) -> None:
    guest = DiskGuest(own_hostel, disk_file(own_hostel, "busy.raw"))
    for _ in range(5):
        assert [answer[0] for answer in guest.ask("ABab")] == ["0"] * 4
        own_hostel.api.type(guest.name, "ABCDEFGHabcdefgh")
        guest.act("kill", "start")
    guest.delete()
