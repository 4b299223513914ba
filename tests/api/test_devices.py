# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Disks and network interfaces that come and go, as HTTP sees them."""

from __future__ import annotations

import pytest

from tests.api.conftest import Api

DISK = {"id": "data", "path": "/srv/data.raw"}


def ids(vm: dict[str, list[dict[str, str]]], kind: str) -> list[str]:
    return [device["id"] for device in vm[kind]]


def test_a_disk_is_attached_and_detached(api: Api) -> None:
    api.create("web-1")
    reply = api.post("/v1/vms/web-1/disks", json=DISK)
    assert reply.status_code == 200
    assert ids(reply.json(), "disks") == ["data"]
    assert reply.headers["etag"] == api.get("/v1/vms/web-1").headers["etag"]
    assert ids(api.delete("/v1/vms/web-1/disks/data").json(), "disks") == []
    gone = api.delete("/v1/vms/web-1/disks/data")
    assert (gone.status_code, gone.json()["code"]) == (404, "disk_not_found")


def test_a_nic_is_attached_and_detached(api: Api) -> None:
    api.create("web-1")
    assert ids(api.post("/v1/vms/web-1/nics", json={"id": "net1"}).json(), "nics") == ["net1"]
    assert ids(api.delete("/v1/vms/web-1/nics/net1").json(), "nics") == []


@pytest.mark.parametrize(
    ("body", "field"),
    [({"id": "data"}, None), ({"id": "data", "path": "x"}, "path"), ({"id": "D"}, "id")],
)
def test_a_disk_that_cannot_be_is_refused(
    api: Api, body: dict[str, str], field: str | None
) -> None:
    api.create("web-1")
    reply = api.post("/v1/vms/web-1/disks", json=body)
    assert (reply.status_code, reply.json().get("field")) == (422, field)


def test_an_id_is_used_once(api: Api) -> None:
    api.create("web-1", disks=[DISK])
    reply = api.post("/v1/vms/web-1/nics", json={"id": "data"})
    assert (reply.status_code, reply.json()["code"]) == (409, "device_taken")


def test_a_change_of_devices_may_be_conditional(api: Api) -> None:
    api.create("web-1")
    stale = {"if-match": api.get("/v1/vms/web-1").headers["etag"]}
    assert api.post("/v1/vms/web-1/disks", json=DISK, headers=stale).status_code == 200
    assert api.delete("/v1/vms/web-1/disks/data", headers=stale).status_code == 412


def test_an_attach_that_is_sent_again_is_done_once(api: Api) -> None:
    api.create("web-1")
    key = {"idempotency-key": "7"}
    first = api.post("/v1/vms/web-1/disks", json=DISK, headers=key)
    again = api.post("/v1/vms/web-1/disks", json=DISK, headers=key)
    assert (first.status_code, again.status_code) == (200, 200)
    assert again.headers["idempotency-replayed"] == "true"


def test_a_guest_that_keeps_its_disk_is_told_of(api: Api) -> None:
    api.create("web-1", disks=[DISK], start=True)
    api.service.kept_devices.add("data")
    kept = api.delete("/v1/vms/web-1/disks/data?timeout_s=0")
    assert (kept.status_code, kept.json()["code"]) == (409, "guest_keeps_device")
    assert api.delete("/v1/vms/web-1/disks/data?force=true").status_code == 200
    assert api.delete("/v1/vms/web-1/disks/data?timeout_s=601").status_code == 422
