# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Every error is a problem that says what to do."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest

from api.body import MAX_DRAIN_BYTES, MAX_JSON_BYTES
from tests.api.conftest import Api, MakeApi
from tests.api.fake_service import BusyService

GOOD = {"name": "web-1", "kernel": "debian"}


def refuse(api: Api, body: dict[str, Any]) -> dict[str, Any]:
    """Post a VM that is refused as invalid and return the problem."""
    reply = api.post("/v1/vms", json=body)
    assert reply.status_code == 422
    problem: dict[str, Any] = reply.json()
    return problem


@pytest.mark.parametrize(
    ("change", "field", "detail"),
    [
        ({"memory_mib": 12}, "memory_mib", "memory_mib=12: must be 16..1048576"),
        ({"vcpus": 0}, "vcpus", "vcpus=0: must be 1..16"),
        ({"vcpus": 10_000}, "vcpus", "vcpus=10000: must be 1..16"),
        ({"memory_mib": 10 << 20}, "memory_mib", "memory_mib=10485760: must be 16..1048576"),
        ({"vcpus": "2"}, "vcpus", 'vcpus="2": must be an integer, not a string'),
        ({"vcpus": 1.5}, "vcpus", "vcpus=1.5: must be an integer, not a number"),
        ({"vcpus": True}, "vcpus", "vcpus=true: must be an integer, not a boolean"),
        ({"vcpus": None}, "vcpus", "vcpus=null: must be an integer, not null"),
        ({"start": 1}, "start", "start=1: must be true or false, not an integer"),
        ({"disks": {}}, "disks", "disks={}: must be an array, not an object"),
        ({"vcpu": 2}, "vcpu", "vcpu: unknown field; did you mean `vcpus`?"),
        ({"on_panic": "die"}, "on_panic", "on_panic=\"die\": must be 'keep', 'reset' or 'stop'"),
        (
            {"disks": [{"id": "root", "pth": "/x"}]},
            "disks.0.pth",
            "disks.0.pth: unknown field; did you mean `path`?",
        ),
        (
            {"disks": [{"id": "root"}]},
            "disks.0",
            "disks.0: give exactly one of `image`, `path` and `nbd`",
        ),
        (
            {"nics": [{"id": "net0", "tap": "a" * 16}]},
            "nics.0.tap",
            'nics.0.tap="aaaaaaaaaaaaaaaa": must match ^[A-Za-z0-9_.-]{1,15}$ '
            "(Name of the tap to create, or of an existing persistent tap to use; "
            "left out, hosteld creates one and names it.)",
        ),
        (
            {"nics": [{"id": "net0"}] * 9},
            "nics",
            "nics: holds 9 items, at most 8 are allowed",
        ),
        (
            {"nics": [{"id": "net0"}, {"id": "net0"}]},
            None,
            "device id 'net0' is used twice",
        ),
        (
            {"nics": [{"id": "vsock0"}]},
            None,
            "device id 'vsock0' is that of a device of Hostel's own",
        ),
        (
            {"ports": [{"name": "a", "console": True}, {"name": "b", "console": True}]},
            None,
            "only one port is the console",
        ),
        (
            {
                "shares": [{"tag": f"t{n}", "path": "/srv"} for n in range(3)],
                "pmem": [{"id": f"p{n}", "path": "/p"} for n in range(2)],
            },
            None,
            "3 shares and 2 pmem: at most 4 together, a PCI slot for each",
        ),
        ({"ports": [{"name": "a"}, {"name": "a"}]}, None, "a port's name is used twice"),
        ({"vsock": {"cid": 2}}, "vsock.cid", "vsock.cid=2: must be 3..4294967294"),
        ({"nics": [{"id": "net0", "mtu": 1}]}, "nics.0.mtu", "nics.0.mtu=1: must be 68..65535"),
    ],
)
def test_wrong_value_is_named_with_its_limit(
    api: Api, change: dict[str, Any], field: str | None, detail: str
) -> None:
    problem = refuse(api, GOOD | change)
    assert problem.get("field") == field
    assert problem["detail"] == detail


def test_too_long_command_line_names_the_limit(api: Api) -> None:
    problem = refuse(api, GOOD | {"cmdline": "a" * 2048})
    assert problem["detail"].endswith("must be at most 2047 characters")
    assert len(problem["detail"]) < 150


def test_missing_fields_are_all_named(api: Api) -> None:
    problem = refuse(api, {})
    assert problem["detail"] == "name: required and missing"
    assert [error["field"] for error in problem["errors"]] == ["name", "kernel"]


def test_wrong_body_type_is_named(api: Api) -> None:
    reply = api.post("/v1/vms", json=[1])
    assert reply.json()["detail"] == "the body=[1]: must be an object, not an array"


@pytest.mark.parametrize(
    ("body", "place"),
    [
        (b'{"name": "a",\n "kernel" "b"}', "line 2 column 11"),
        (b"", "empty"),
        (b"\xff", "line 1 column 1"),
        (b'{"name": "\\ud800"}', "line 1 column"),
        (b"[" * 10_000, "recursion limit"),
    ],
)
def test_malformed_json_is_named_with_its_place(api: Api, body: bytes, place: str) -> None:
    reply = api.post("/v1/vms", content=body, headers={"content-type": "application/json"})
    assert (reply.status_code, reply.json()["code"]) == (400, "malformed_json")
    assert place in reply.json()["detail"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_other_content_types_are_refused_with_the_right_one(api: Api, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    reply = api.post("/v1/vms", content=b"{}", headers=headers)
    assert reply.status_code == 415
    assert "application/json" in reply.json()["detail"]


def test_unknown_path_is_a_problem(api: Api) -> None:
    reply = api.get("/v1/vmms")
    assert (reply.status_code, reply.json()["code"]) == (404, "path_not_found")


def test_wrong_method_names_all_that_are_right(api: Api) -> None:
    reply = api.call("PUT", "/v1/vms")
    assert (reply.status_code, reply.headers["allow"]) == (405, "GET, POST")


@pytest.mark.parametrize(
    ("path", "detail"),
    [
        ("/v1/vms?limit=0", 'limit="0": must be at least 1'),
        ("/v1/vms?limit=x", 'limit="x": must be an integer'),
        ("/v1/vms?limitt=1", "limitt: unknown query parameter; did you mean `limit`?"),
        ("/v1/vms?limit=1&limit=2", "limit: give it once"),
        ("/v1/operations/x?wait=61", 'wait="61": must be at most 60'),
        ("/v1/operations/x?wait=nan", 'wait="nan": must be a finite number'),
    ],
)
def test_wrong_query_is_named(api: Api, path: str, detail: str) -> None:
    reply = api.get(path)
    assert (reply.status_code, reply.json()["detail"]) == (422, detail)


def test_wrong_reference_is_named(api: Api) -> None:
    reply = api.get("/v1/vms/a%20b")
    assert (reply.status_code, reply.json()["field"]) == (422, "vm")


def test_body_too_large_is_refused_by_its_length(api: Api) -> None:
    reply = api.post("/v1/vms", content=b" " * (1 << 20) + b"{}")
    assert (reply.status_code, reply.headers["connection"]) == (413, "close")


def test_body_too_large_is_refused_while_it_comes_in(api: Api) -> None:
    sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 1
            yield b" " * 65536

    reply = api.post("/v1/vms", content=chunks(), headers={"content-type": "application/json"})
    assert reply.status_code == 413
    assert sent * 65536 <= MAX_JSON_BYTES + MAX_DRAIN_BYTES + 4 * 65536


def test_defect_is_told_without_internals(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    api.service.defect = RuntimeError("secret of the daemon")
    with caplog.at_level(logging.ERROR):
        reply = api.get("/v1/host", headers={"x-request-id": "abc"})
    assert (reply.status_code, reply.json()["code"]) == (500, "internal_error")
    assert "secret" not in reply.text
    assert "abc" in reply.json()["detail"]
    assert "secret of the daemon" in caplog.text


def test_busy_says_when_to_try_again(make_api: MakeApi) -> None:
    reply = make_api(BusyService()).get("/v1/vms")
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")


def test_request_id_of_the_client_comes_back(api: Api) -> None:
    reply = api.get("/v1/vms/none", headers={"x-request-id": "my-id.1"})
    assert reply.headers["x-request-id"] == "my-id.1"
    assert reply.json()["instance"] == "urn:hostel:request:my-id.1"


def test_unfit_request_id_is_replaced(api: Api) -> None:
    reply = api.get("/v1", headers={"x-request-id": "a b\tc"})
    assert reply.headers["x-request-id"] != "a b\tc"


@pytest.mark.parametrize("path", ["/v1/vms", "/v1/kernels", "/v1/images"])
def test_name_in_the_form_of_an_id_is_refused(api: Api, path: str) -> None:
    name = "6f9619ff-8b86-4011-b42d-00c04fc964ff"
    body = {"name": name, "kernel": "debian"} if path == "/v1/vms" else {"name": name, "path": "/k"}
    reply = api.post(path, json=body)
    assert (reply.status_code, reply.json()["field"]) == (422, "name")
    assert reply.json()["detail"].startswith(f"name: {name!r} has the form of an id")


@pytest.mark.parametrize("kind", ["kernels", "images"])
def test_upload_under_the_form_of_an_id_is_refused(api: Api, kind: str) -> None:
    name = "6f9619ff-8b86-4011-b42d-00c04fc964ff"
    reply = api.post(f"/v1/{kind}/upload?name={name}", content=b"x")
    assert (reply.status_code, reply.json()["field"]) == (422, "name")
    assert "has the form of an id" in reply.json()["detail"]


def test_rename_to_the_form_of_an_id_is_refused(api: Api) -> None:
    api.create("web-1")
    reply = api.patch("/v1/vms/web-1", json={"name": "6f9619ff-8b86-4011-b42d-00c04fc964ff"})
    assert (reply.status_code, reply.json()["field"]) == (422, "name")


def test_name_that_is_nearly_an_id_is_taken(api: Api) -> None:
    assert api.create("6f9619ff-8b86-4011-b42d-00c04fc964f")["state"] == "stopped"
