# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What a disk is asked to be, from the API to its engine and back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support import tiny_kernel as tiny
from tests.support.hostel import Hostel

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
