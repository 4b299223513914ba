# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What a user of the VM routes sees."""

from __future__ import annotations

from typing import Any

import pytest

from api.models.vms import VmAction
from tests.api.conftest import Api


def test_created_vm_is_answered_with_location_and_etag(api: Api) -> None:
    reply = api.post("/v1/vms", json={"name": "web-1", "kernel": "debian", "vcpus": 2})
    vm = reply.json()
    assert reply.status_code == 201
    assert reply.headers["location"] == f"/v1/vms/{vm['id']}"
    assert reply.headers["etag"] == f'"{vm["id"]}.1"'
    assert vm["vcpus"] == 2
    assert api.get(reply.headers["location"]).json() == vm


def test_vm_is_addressed_by_name_and_by_id(api: Api) -> None:
    vm = api.create("web-1")
    assert api.get("/v1/vms/web-1").json() == api.get(f"/v1/vms/{vm['id']}").json()


def test_slow_create_is_answered_with_an_operation(api: Api) -> None:
    api.service.is_slow = True
    reply = api.post("/v1/vms?wait=0", json={"name": "web-1", "kernel": "debian"})
    assert reply.status_code == 202
    assert reply.headers["location"] == f"/v1/operations/{reply.json()['id']}"
    assert api.service.calls[-1].wait_s == 0


def test_caller_and_patience_reach_the_daemon(api: Api) -> None:
    api.post("/v1/vms?wait=7.5", json={"name": "web-1", "kernel": "debian"}, uid=42)
    call = api.service.calls[-1]
    assert (call.actor, call.wait_s, call.if_match) == ("unix:uid=42", 7.5, None)


def test_list_pages_in_order_of_name(api: Api) -> None:
    for name in ("c", "a", "b"):
        api.create(name)
    first = api.get("/v1/vms?limit=2").json()
    assert [vm["name"] for vm in first["items"]] == ["a", "b"]
    rest = api.get(f"/v1/vms?limit=2&cursor={first['next_cursor']}").json()
    assert [vm["name"] for vm in rest["items"]] == ["c"]
    assert rest["next_cursor"] is None


def test_list_filters_by_state_and_label(api: Api) -> None:
    api.create("a", labels={"env": "prod"}, start=True)
    api.create("b", labels={"env": "test"})
    running = api.get("/v1/vms?state=running&label=env=prod").json()
    assert [vm["name"] for vm in running["items"]] == ["a"]


def test_patch_changes_what_it_names(api: Api) -> None:
    api.create("web-1", memory_mib=512)
    reply = api.patch("/v1/vms/web-1", json={"vcpus": 4})
    assert (reply.json()["vcpus"], reply.json()["memory_mib"]) == (4, 512)
    assert reply.headers["etag"].endswith('.2"')


def test_delete_answers_204_and_the_vm_is_gone(api: Api) -> None:
    api.create("web-1")
    assert api.delete("/v1/vms/web-1").status_code == 204
    assert api.get("/v1/vms/web-1").json()["code"] == "vm_not_found"


def test_delete_of_a_running_vm_needs_force(api: Api) -> None:
    api.create("web-1", start=True)
    refused = api.delete("/v1/vms/web-1")
    assert (refused.status_code, refused.json()["state"]) == (409, "running")
    assert api.delete("/v1/vms/web-1?force=true").status_code == 204


def test_slow_delete_is_answered_with_an_operation(api: Api) -> None:
    api.create("web-1")
    api.service.is_slow = True
    assert api.delete("/v1/vms/web-1?wait=0").status_code == 202


def test_every_action_has_its_path(api: Api) -> None:
    paths = {f"/v1/vms/{{vm}}/{action.value}" for action in VmAction}
    assert paths <= set(api.document["paths"])


def test_wrong_state_names_the_state_and_what_is_allowed(api: Api) -> None:
    api.create("web-1")
    problem = api.post("/v1/vms/web-1/pause").json()
    assert (problem["status"], problem["state"], problem["allowed"]) == (409, "stopped", ["start"])


def test_action_answers_the_vm_as_it_is_now(api: Api) -> None:
    api.create("web-1")
    assert api.post("/v1/vms/web-1/start").json()["state"] == "running"
    assert api.post("/v1/vms/web-1/pause").json()["state"] == "paused"


def test_slow_action_is_answered_with_an_operation(api: Api) -> None:
    api.create("web-1", start=True)
    api.service.is_slow = True
    assert api.post("/v1/vms/web-1/stop?wait=0").status_code == 202


def test_stop_takes_its_body_or_none(api: Api) -> None:
    api.create("web-1", start=True)
    api.post("/v1/vms/web-1/stop", json={"timeout_s": 5, "force": False})
    taken = api.service.stops[-1]
    assert taken is not None
    assert (taken.timeout_s, taken.force) == (5, False)
    api.post("/v1/vms/web-1/start")
    api.post("/v1/vms/web-1/stop")
    assert api.service.stops[-1] is None


def test_unknown_action_is_not_found(api: Api) -> None:
    api.create("web-1")
    assert api.post("/v1/vms/web-1/explode").json()["code"] == "path_not_found"


def test_disk_grows(api: Api) -> None:
    api.create("web-1", disks=[{"id": "root", "image": "debian"}])
    reply = api.patch("/v1/vms/web-1/disks/root", json={"size_mib": 64})
    assert reply.json()["disks"][0]["size_bytes"] == 64 << 20
    assert api.patch("/v1/vms/web-1/disks/data", json={"size_mib": 64}).status_code == 404


def test_a_disk_s_limits_are_changed_and_taken_away(api: Api) -> None:
    api.create("web-1", disks=[{"id": "root", "image": "debian"}])
    path = "/v1/vms/web-1/disks/root"
    changed = api.patch(path, json={"rate_limit": {"ops_per_s": 50}}).json()["disks"][0]
    none = {"bytes_per_s": None, "bytes_burst": None, "ops_burst": None}
    assert changed["rate_limit"] == {"ops_per_s": 50, **none}
    freed = api.patch(path, json={"rate_limit": None}).json()["disks"][0]
    assert freed["rate_limit"] is None
    for body in ({}, {"rate_limit": {"ops_burst": 5}}, {"rate_limit": {"ops_per_s": 0}}):
        assert api.patch(path, json=body).status_code == 422


def test_disks_share_the_limits_of_a_rate_group(api: Api) -> None:
    groups = [{"id": "tenant", "rate_limit": {"ops_per_s": 100}}, {"id": "free"}]
    disk = {"id": "root", "image": "debian", "rate_group": "tenant"}
    vm = api.create("web-1", disks=[disk], rate_groups=groups)
    assert vm["disks"][0]["rate_group"] == "tenant"
    assert [group["id"] for group in vm["rate_groups"]] == ["tenant", "free"]
    path = "/v1/vms/web-1/rate-groups/tenant"
    changed = api.patch(path, json={"rate_limit": {"bytes_per_s": 4096}}).json()
    assert changed["rate_groups"][0]["rate_limit"]["bytes_per_s"] == 4096
    assert changed["rate_groups"][0]["rate_limit"]["ops_per_s"] is None
    freed = api.patch(path, json={"rate_limit": None}).json()
    assert freed["rate_groups"][0] == {"id": "tenant", "rate_limit": None}
    for body in ({}, {"rate_limit": {"ops_burst": 5}}, {"ops_per_s": 5}):
        assert api.patch(path, json=body).status_code == 422
    missing = api.patch("/v1/vms/web-1/rate-groups/none", json={"rate_limit": None})
    assert (missing.status_code, missing.json()["code"]) == (404, "rate_group_not_found")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rate_groups": [{"id": "a"}, {"id": "a"}]}, "used twice"),
        ({"rate_groups": [{"id": "A"}]}, "rate_groups.0.id"),
        ({"rate_groups": [{"id": "a", "rate_limit": {"ops_per_s": 0}}]}, "ops_per_s"),
        ({"disks": [{"id": "d", "nbd": "nbd://h/x", "rate_group": "a"}]}, "go with raw disks only"),
    ],
)
def test_a_rate_group_that_cannot_be_is_refused(
    api: Api, fields: dict[str, Any], said: str
) -> None:
    reply = api.post("/v1/vms", json={"name": "web-1", "kernel": "debian", **fields})
    assert reply.status_code == 422
    assert said in reply.text


def test_cable_is_pulled(api: Api) -> None:
    api.create("web-1", nics=[{"id": "net0"}])
    reply = api.patch("/v1/vms/web-1/nics/net0", json={"link": "down"})
    assert reply.json()["nics"][0]["link"] == "down"
    assert api.patch("/v1/vms/web-1/nics/net1", json={"link": "down"}).status_code == 404
    for body in ({"link": "loose"}, {}, {"rx_limit": {"ops_burst": 1}}):
        assert api.patch("/v1/vms/web-1/nics/net0", json=body).status_code == 422


def test_a_limit_does_not_go_with_vhost(api: Api) -> None:
    nic = {"id": "net0", "backend": "vhost", "tx_limit": {"bytes_per_s": 1000}}
    refused = api.post("/v1/vms", json={"name": "web-1", "kernel": "debian", "nics": [nic]})
    assert refused.status_code == 422
    assert "take auto" in refused.json()["detail"]


def test_stats_are_counters(api: Api) -> None:
    api.create("web-1", disks=[{"id": "root", "image": "debian"}])
    assert api.get("/v1/vms/web-1/stats").json()["disks"] == {"root": {"read_bytes": 512}}


@pytest.mark.parametrize("path", ["/v1/vms/web-1", "/v1/vms/web-1/stats"])
def test_missing_vm_is_not_found(api: Api, path: str) -> None:
    assert api.get(path).status_code == 404
