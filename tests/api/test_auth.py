# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Who may call over TCP."""

from __future__ import annotations

import asyncio

import pytest

from api.app import create_app
from tests.api.conftest import TOKEN, Api
from tests.api.fake_service import FakeService

RIGHT = {"authorization": f"Bearer {TOKEN}"}


def test_right_token_is_let_in(api: Api) -> None:
    api.post("/v1/vms", json={"name": "a", "kernel": "k"}, uid=None, headers=RIGHT)
    assert api.service.calls[-1].actor == "token:api"


@pytest.mark.parametrize("path", ["/v1/vms", "/metrics", "/", "/openapi.json", "/nowhere"])
def test_every_path_needs_the_token(api: Api, path: str) -> None:
    reply = api.get(path, uid=None)
    assert (reply.status_code, reply.json()["code"]) == (401, "token_missing")
    assert reply.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize("value", ["Bearer wrong", "Bearer", f"Basic {TOKEN}", "Bearer \xe9"])
def test_wrong_credentials_are_refused(api: Api, value: str) -> None:
    headers = {"authorization": value.encode("latin-1")}
    assert api.get("/v1/vms", uid=None, headers=headers).status_code == 401


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "", "localhost:x", "::1"],
)
def test_foreign_host_header_is_refused_even_with_the_token(api: Api, host: str) -> None:
    reply = api.get("/v1/vms", uid=None, headers=RIGHT | {"host": host})
    assert (reply.status_code, reply.json()["code"]) == (403, "host_not_allowed")


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:80", "127.0.0.1:8080", "[::1]", "[::1]:1"]
)
def test_loopback_host_headers_are_taken(api: Api, host: str) -> None:
    assert api.get("/v1/vms", uid=None, headers=RIGHT | {"host": host}).status_code == 200


def test_tcp_is_shut_when_no_token_is_configured(runner: asyncio.Runner) -> None:
    shut = Api(FakeService(), runner)
    shut.app = create_app(shut.service, token=None, version="0.1.0")
    reply = shut.get("/v1/vms", uid=None, headers=RIGHT)
    assert reply.json()["code"] == "no_token_configured"


def test_unix_peer_needs_neither(api: Api) -> None:
    assert api.get("/v1/vms", headers={"host": "anything"}).status_code == 200
