# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Kernels, images, operations, events, consoles and the host."""

from __future__ import annotations

import asyncio
import hashlib
import threading

import pytest

from api.models.common import ObjectRef
from api.models.resources import OperationState
from tests.api.conftest import Api

VM = ObjectRef(kind="vm", id="1", name="web-1")


@pytest.mark.parametrize("kind", ["kernels", "images"])
def test_import_by_path_is_answered_with_its_location(api: Api, kind: str) -> None:
    made = api.post(f"/v1/{kind}", json={"name": "debian", "path": "/boot/vmlinuz"})
    assert made.status_code == 201
    assert api.get(made.headers["location"]).json() == made.json()
    assert api.get(f"/v1/{kind}").json()["items"] == [made.json()]
    assert api.delete(f"/v1/{kind}/debian").status_code == 204
    assert api.get(f"/v1/{kind}/debian").status_code == 404


@pytest.mark.parametrize("kind", ["kernels", "images"])
def test_upload_streams_the_body_to_the_daemon(api: Api, kind: str) -> None:
    data = b"\x7fELF" * 100_000
    digest = hashlib.sha256(data).hexdigest()
    made = api.post(f"/v1/{kind}/upload?name=debian&sha256={digest}", content=data)
    assert (made.status_code, made.json()["sha256"]) == (201, digest)
    assert api.service.uploads == [len(data)]


def test_upload_with_another_digest_is_refused(api: Api) -> None:
    reply = api.post(f"/v1/kernels/upload?name=k&sha256={'0' * 64}", content=b"x")
    assert (reply.status_code, reply.json()["code"]) == (422, "digest_differs")


def test_upload_of_an_initrd_keeps_its_kind(api: Api) -> None:
    made = api.post("/v1/images/upload?name=i&kind=initrd", content=b"x")
    assert made.json()["kind"] == "initrd"


def test_upload_of_a_form_is_refused(api: Api) -> None:
    reply = api.post("/v1/kernels/upload?name=k", files={"file": b"x"})
    assert reply.status_code == 415


def test_upload_that_is_too_large_is_refused(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.routes.kernels.MAX_KERNEL_BYTES", 10)
    assert api.post("/v1/kernels/upload?name=k", content=b"x" * 11).status_code == 413


def test_upload_needs_a_name(api: Api) -> None:
    reply = api.post("/v1/kernels/upload", content=b"x")
    assert reply.json()["detail"] == "name: required and missing"


def test_relative_path_is_refused(api: Api) -> None:
    reply = api.post("/v1/kernels", json={"name": "k", "path": "vmlinuz"})
    assert reply.json()["field"] == "path"


def test_operation_is_waited_for(api: Api) -> None:
    operation = api.service.operation("vm.stop", VM)

    async def wait_and_end() -> int:
        async with api.client() as client:
            path = f"/v1/operations/{operation.id}?wait=20"
            waiting = asyncio.create_task(client.get(path))
            await api.service.finish(operation.id, OperationState.SUCCEEDED)
            state: str = (await waiting).json()["state"]
            assert state == "succeeded"
            return 1

    assert api.run(wait_and_end()) == 1


def test_operation_is_shown_as_it_is_without_waiting(api: Api) -> None:
    operation = api.service.operation("vm.stop", VM)
    assert api.get(f"/v1/operations/{operation.id}").json()["state"] == "running"
    assert api.get("/v1/operations?limit=1").json()["items"][0]["id"] == operation.id


def test_operation_is_cancelled_once(api: Api) -> None:
    operation = api.service.operation("image.import", VM)
    path = f"/v1/operations/{operation.id}"
    assert api.delete(path).json()["state"] == "cancelled"
    assert api.delete(path).status_code == 409


def test_events_are_read_from_a_cursor(api: Api) -> None:
    for name in ("a", "b", "c"):
        api.create(name)
    first = api.get("/v1/events?limit=2").json()
    assert [event["id"] for event in first["items"]] == [1, 2]
    rest = api.get(f"/v1/events?after={first['next_cursor']}").json()
    assert [event["id"] for event in rest["items"]] == [3]
    assert rest["next_cursor"] is None


def test_unreadable_last_event_id_is_refused(api: Api) -> None:
    reply = api.get("/v1/events/stream", headers={"last-event-id": "x"})
    assert (reply.status_code, reply.json()["code"]) == (400, "malformed_last_event_id")


def test_console_log_is_read_in_pieces(api: Api) -> None:
    api.create("web-1")
    api.run(api.service.say("web-1", b"0123456789"))
    reply = api.get("/v1/vms/web-1/console/log?offset=2&limit=3")
    assert reply.content == b"234"
    shown = [reply.headers[f"console-{name}"] for name in ("offset", "next-offset", "end-offset")]
    assert shown == ["2", "5", "10"]


def test_console_log_counts_from_its_end(api: Api) -> None:
    api.create("web-1")
    api.run(api.service.say("web-1", b"0123456789"))
    assert api.get("/v1/vms/web-1/console/log?offset=-4").content == b"6789"


def test_console_input_says_how_much_was_taken(api: Api) -> None:
    api.create("web-1", start=True)
    api.service.typed_per_call = 3
    reply = api.post("/v1/vms/web-1/console/input", content=b"root\n")
    assert reply.json() == {"accepted_bytes": 3}
    assert api.post("/v1/vms/web-1/console/input").json() == {"accepted_bytes": 0}


def test_console_input_is_bounded(api: Api) -> None:
    api.create("web-1", start=True)
    reply = api.post("/v1/vms/web-1/console/input", content=b"x" * 65537)
    assert reply.status_code == 413


@pytest.mark.parametrize("path", ["/v1/vms/web-1/console", "/v1/events/ws"])
def test_plain_get_of_a_websocket_says_so(api: Api, path: str) -> None:
    reply = api.get(path)
    assert (reply.status_code, reply.json()["code"]) == (426, "websocket_only")


def test_host_is_described(api: Api) -> None:
    assert api.get("/v1/host").json()["checks"][1]["remedy"] == "modprobe tun"


@pytest.mark.parametrize("path", ["/", "/v1"])
def test_root_links_to_every_collection(api: Api, path: str) -> None:
    links = api.get(path).json()["links"]
    statuses = {api.get(link).status_code for link in links.values()}
    assert statuses == {200}


def test_metrics_are_text(api: Api) -> None:
    reply = api.get("/metrics")
    assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert b"hostel_vms 0" in reply.content


def test_no_call_needs_a_thread(api: Api) -> None:
    before = threading.active_count()
    api.create("web-1")
    api.get("/v1/vms/web-1")
    assert threading.active_count() == before


@pytest.mark.parametrize("path", ["/v1/events", "/v1/events/stream"])
def test_cursor_above_the_newest_event_is_refused(api: Api, path: str) -> None:
    api.create()
    newest = api.service.events[-1].id
    reply = api.get(f"{path}?after={newest + 1}")
    assert (reply.status_code, reply.json()["code"]) == (422, "cursor_unknown")
    assert reply.json()["field"] == "after"


def test_cursor_at_the_newest_event_has_nothing_after_it(api: Api) -> None:
    api.create()
    reply = api.get(f"/v1/events?after={api.service.events[-1].id}")
    assert (reply.status_code, reply.json()["items"]) == (200, [])
