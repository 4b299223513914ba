# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The OpenAPI document: complete, sound, and true of the app that serves it."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import jsonschema_rs
import schemathesis
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, Phase, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from api.app import create_app
from api.auth import Peer
from api.models.resources import Event
from api.ports import ConsoleChunk
from tests.api.conformance import validate
from tests.api.conftest import TOKEN, Api, UnixPeer, document
from tests.api.fake_service import FakeService

DOCUMENT = document()
WEBSOCKETS = r"/(ws|console)$"
# Beyond what schemathesis takes for granted: what is well formed may name another version.
EXPECTED = ["2xx", "3xx", "401", "403", "404", "409", "412", "5xx"]
# Rules that JSON Schema does not tell: a device id is used once, a digest is the body's, an
# integer is written without a point (to JSON Schema 4.0 is one), and a cursor is an event's id.
MORE_THAN_SCHEMA = {
    "create_vm",
    "patch_vm",
    "patch_disk",
    "attach_disk",
    "attach_nic",
    "patch_nic",
    "patch_rate_group",
    "upload_kernel",
    "upload_image",
    "list_events",
    "stream_events",
}


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in DOCUMENT["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def test_every_route_is_documented(api: Api) -> None:
    routes = {
        (route.path, method.lower())
        for route in api.app.routes
        if isinstance(route, APIRoute) and route.include_in_schema
        for method in route.methods or ()
    }
    assert routes == {(path, method) for path, method, _ in operations()}


def test_operation_ids_are_unique_and_plain() -> None:
    ids = [operation["operationId"] for _, _, operation in operations()]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-z_]+", each) for each in ids)


def test_every_operation_says_what_it_does() -> None:
    silent = [
        operation["operationId"]
        for _, _, operation in operations()
        if not operation.get("summary", "").endswith(".") or not operation.get("description")
    ]
    assert not silent


def test_every_error_is_documented_as_a_problem() -> None:
    wrong = [
        (operation["operationId"], status)
        for _, _, operation in operations()
        for status, reply in operation["responses"].items()
        if status >= "400"
        if list(reply["content"]) != ["application/problem+json"]
    ]
    assert not wrong


def test_every_reference_leads_somewhere() -> None:
    def references(part: object) -> Iterator[str]:
        if isinstance(part, dict):
            if isinstance(part.get("$ref"), str):
                yield part["$ref"]
            for each in part.values():
                yield from references(each)
        elif isinstance(part, list):
            for each in part:
                yield from references(each)

    for reference in set(references(DOCUMENT)):
        found: Any = DOCUMENT
        for step in reference.removeprefix("#/").split("/"):
            found = found[step]
        assert found


def test_body_examples_fit_their_schemas() -> None:
    for _, _, operation in operations():
        for media in operation.get("requestBody", {}).get("content", {}).values():
            for example in media.get("examples", {}).values():
                validate(DOCUMENT, media["schema"], example["value"])


def test_every_schema_is_sound() -> None:
    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema_rs.meta.validate({**schema, "components": DOCUMENT["components"]})


def test_document_is_served(api: Api) -> None:
    assert api.get("/openapi.json").json() == DOCUMENT


class BriefService(FakeService):
    """One in which whatever is followed ends at once."""

    async def follow_console(self, ref: str, offset: int) -> AsyncIterator[ConsoleChunk]:
        yield await self.read_console(ref, offset, 1)

    async def follow_events(self, after: int | None) -> AsyncIterator[Event]:
        for event in self.events[:1]:
            yield event


SERVICE = BriefService()


def served() -> schemathesis.BaseSchema:
    """Return the document bound to an app."""
    checks = {"positive_data_acceptance": {"expected-statuses": EXPECTED}}
    config = schemathesis.Config.from_dict({"checks": checks})
    schema = schemathesis.openapi.from_dict(DOCUMENT, config=config)
    app = create_app(SERVICE, token=TOKEN, version="0.1.0")
    schema.app = UnixPeer(app, Peer(pid=1, uid=0, gid=0))
    return schema


SCHEMA = served().exclude(path_regex=WEBSOCKETS)


@SCHEMA.parametrize()
@settings(
    max_examples=8,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_app_keeps_what_the_document_says(case: schemathesis.Case) -> None:
    SERVICE.keys.clear()  # a reused key is refused, as it should be
    is_more = case.operation.definition.raw["operationId"] in MORE_THAN_SCHEMA
    case.call_and_validate(excluded_checks=[positive_data_acceptance] if is_more else [])
