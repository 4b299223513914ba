# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""ETags and Idempotency-Key: no change is lost, none is made twice."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from tests.api.conftest import Api

BODY = {"name": "web-1", "kernel": "debian"}
KEY = {"idempotency-key": "3f1c"}


def test_get_with_the_known_tag_is_not_modified(api: Api) -> None:
    api.create("web-1")
    tag = api.get("/v1/vms/web-1").headers["etag"]
    again = api.get("/v1/vms/web-1", headers={"if-none-match": f'"other", W/{tag}'})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    api.post("/v1/vms/web-1/start")
    assert api.get("/v1/vms/web-1", headers={"if-none-match": tag}).status_code == 200


@pytest.mark.parametrize("path", ["/v1", "/v1/host"])
def test_objects_without_a_version_have_a_tag_of_their_content(api: Api, path: str) -> None:
    tag = api.get(path).headers["etag"]
    assert api.get(path, headers={"if-none-match": tag}).status_code == 304


def test_change_of_the_seen_version_is_made(api: Api) -> None:
    api.create("web-1")
    tag = api.get("/v1/vms/web-1").headers["etag"]
    reply = api.patch("/v1/vms/web-1", json={"vcpus": 2}, headers={"if-match": tag})
    assert reply.status_code == 200
    assert api.service.calls[-1].if_match == 1


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PATCH", "/v1/vms/web-1"),
        ("DELETE", "/v1/vms/web-1"),
        ("POST", "/v1/vms/web-1/start"),
        ("PATCH", "/v1/vms/web-1/disks/root"),
    ],
)
def test_change_of_another_version_is_refused(api: Api, method: str, path: str) -> None:
    api.create("web-1", disks=[{"id": "root", "image": "debian"}])
    tag = api.get("/v1/vms/web-1").headers["etag"]
    api.patch("/v1/vms/web-1", json={"labels": {"a": "b"}})
    body = {"size_mib": 5} if "disks" in path else {}
    reply = api.call(method, path, headers={"if-match": tag}, json=body)
    assert (reply.status_code, reply.json()["code"]) == (412, "version_changed")


def test_change_of_a_namesake_is_refused(api: Api) -> None:
    api.create("web-1")
    tag = api.get("/v1/vms/web-1").headers["etag"]
    api.delete("/v1/vms/web-1")
    api.create("web-1")
    reply = api.delete("/v1/vms/web-1", headers={"if-match": tag})
    assert reply.status_code == 412


def test_any_version_will_do_with_a_star(api: Api) -> None:
    api.create("web-1")
    assert api.delete("/v1/vms/web-1", headers={"if-match": "*"}).status_code == 204


@pytest.mark.parametrize("header", ["1", "", 'W/"{}"'])
def test_what_is_not_a_strong_tag_matches_nothing(api: Api, header: str) -> None:
    vm = api.create("web-1")
    header = header.format(f"{vm['id']}.1")
    assert api.delete("/v1/vms/web-1", headers={"if-match": header}).status_code == 412


@pytest.mark.parametrize("kind", ["kernels", "images"])
def test_kernels_and_images_are_deleted_in_the_seen_version(api: Api, kind: str) -> None:
    made = api.post(f"/v1/{kind}", json={"name": "debian", "path": "/boot/x"})
    wrong = api.delete(f"/v1/{kind}/debian", headers={"if-match": '"x.1"'})
    assert wrong.status_code == 412
    right = api.delete(f"/v1/{kind}/debian", headers={"if-match": made.headers["etag"]})
    assert right.status_code == 204


def test_same_key_gets_the_same_reply_and_does_nothing_again(api: Api) -> None:
    first = api.post("/v1/vms", json=BODY, headers=KEY)
    again = api.post("/v1/vms", json=BODY, headers=KEY)
    assert again.headers["idempotency-replayed"] == "true"
    assert (again.status_code, again.content) == (201, first.content)
    assert again.headers["location"] == first.headers["location"]
    assert again.headers["etag"] == first.headers["etag"]
    assert again.headers["x-request-id"] != first.headers["x-request-id"]
    assert api.service.creates == 1


def test_same_key_for_another_request_is_refused(api: Api) -> None:
    api.post("/v1/vms", json=BODY, headers=KEY)
    other = api.post("/v1/vms", json=BODY | {"name": "web-2"}, headers=KEY)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    assert " of unix:" not in other.json()["detail"]


def test_key_belongs_to_its_caller(api: Api) -> None:
    api.post("/v1/vms", json=BODY, headers=KEY)
    other = api.post("/v1/vms", json=BODY | {"name": "web-2"}, headers=KEY, uid=7)
    assert other.status_code == 201


def test_failed_request_gives_its_key_back(api: Api) -> None:
    api.create("web-1", start=True)
    assert api.post("/v1/vms/web-1/start", headers=KEY).status_code == 409
    api.post("/v1/vms/web-1/kill")
    assert api.post("/v1/vms/web-1/start", headers=KEY).status_code == 200


def test_invalid_request_gives_its_key_back(api: Api) -> None:
    assert api.post("/v1/vms", json={}, headers=KEY).status_code == 422
    assert api.service.keys == {}


def test_request_that_is_given_up_gives_its_key_back(api: Api) -> None:
    async def give_up() -> None:
        api.service.create_gate = asyncio.Event()
        async with api.client() as client:
            request = asyncio.create_task(client.post("/v1/vms", json=BODY, headers=KEY))
            while not api.service.creates:  # noqa: ASYNC110 - the fake has no event for it
                await asyncio.sleep(0)
            request.cancel()
            await asyncio.wait({request})

    api.run(give_up())
    assert api.service.keys == {}


def test_two_at_once_with_one_key_make_one_vm(api: Api) -> None:
    async def race() -> list[httpx.Response]:
        api.service.create_gate = asyncio.Event()
        async with api.client() as client:
            first = asyncio.create_task(client.post("/v1/vms", json=BODY, headers=KEY))
            while not api.service.creates:  # noqa: ASYNC110 - the fake has no event for it
                await asyncio.sleep(0)
            second = await client.post("/v1/vms", json=BODY, headers=KEY)
            api.service.create_gate.set()
            return [await first, second]

    first, second = api.run(race())
    assert first.status_code == 201
    assert (second.status_code, second.json()["code"]) == (409, "idempotency_key_in_use")
    assert api.service.creates == 1


def test_malformed_key_is_refused(api: Api) -> None:
    reply = api.post("/v1/vms", json=BODY, headers={"idempotency-key": "a b"})
    assert (reply.status_code, reply.json()["code"]) == (400, "malformed_idempotency_key")


def test_upload_is_not_read_again_under_its_key(api: Api) -> None:
    first = api.post("/v1/kernels/upload?name=k", content=b"kernel", headers=KEY)
    again = api.post("/v1/kernels/upload?name=k", content=b"other bytes", headers=KEY)
    assert again.headers["idempotency-replayed"] == "true"
    assert again.json() == first.json()
    assert api.service.uploads == [6]
