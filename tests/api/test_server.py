# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What clients of the real sockets see: credentials, slow and broken clients, the stop."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import select
import socket
from collections.abc import AsyncIterator

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect, unix_connect

import api.body
import api.server
import api.streams
from api.models.common import ObjectRef
from api.models.vms import VmCreate
from api.ports import Call, ConsoleChunk
from api.routes.console import retry_delays
from tests.api.conftest import TOKEN
from tests.api.live import LiveServer, read_all

VM = ObjectRef(kind="vm", id="1", name="web-1")


def unix_client(live: LiveServer) -> httpx.Client:
    return httpx.Client(
        transport=httpx.HTTPTransport(uds=live.path), base_url="http://localhost", timeout=20
    )


def make_vm(live: LiveServer) -> None:
    request = VmCreate(name="web-1", kernel="debian", start=True)
    live.run(live.service.create_vm(request, Call("test")))


def problem_of(reply: bytes) -> tuple[int, str]:
    """Return status and code of a raw reply."""
    head, _, body = reply.partition(b"\r\n\r\n")
    assert b"application/problem+json" in head
    return int(head.split()[1]), json.loads(body)["code"]


def test_unix_caller_is_known_by_its_uid(live: LiveServer) -> None:
    with unix_client(live) as client:
        made = client.post("/v1/vms", json={"name": "web-1", "kernel": "debian"})
    assert made.status_code == 201
    assert live.service.calls[-1].actor == f"unix:uid={os.getuid()}"


def test_tcp_caller_needs_the_token(live: LiveServer) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{live.port}") as client:
        assert client.get("/v1/vms").status_code == 401
        right = {"authorization": f"Bearer {TOKEN}"}
        assert client.get("/v1/vms", headers=right).status_code == 200


def test_silent_client_is_cut(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api.server, "HEAD_DEADLINE_S", 0.05)
    with live.connect() as raw:
        assert problem_of(read_all(raw)) == (408, "head_timeout")


def test_slow_head_is_cut_also_on_a_used_connection(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.server, "HEAD_DEADLINE_S", 0.2)
    with live.connect() as raw:
        raw.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert raw.recv(65536).startswith(b"HTTP/1.1 200")
        raw.sendall(b"GET /metrics HTTP/1.1\r\nHost: loc")
        assert b"head_timeout" in read_all(raw)


def test_endless_head_is_cut(live: LiveServer) -> None:
    with live.connect() as raw:
        raw.sendall(b"GET / HTTP/1.1\r\n" + b"X-Filler: aaaaaaaaaaaaaaaaaaaaaaaa\r\n" * 2000)
        assert problem_of(read_all(raw)) == (413, "head_too_large")


def test_slow_body_is_cut(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api.body, "BODY_IDLE_S", 0.05)
    head = b"POST /v1/vms HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with live.connect() as raw:
        raw.sendall(head + b'Content-Length: 100\r\n\r\n{"name":')
        assert problem_of(read_all(raw)) == (408, "body_timeout")


def test_garbage_is_answered_with_a_problem(live: LiveServer) -> None:
    with live.connect() as raw:
        raw.sendall(b"\x16\x03\x01 not http\r\n\r\n")
        assert problem_of(read_all(raw)) == (400, "malformed_http")


def test_endless_body_is_cut_with_an_answer(live: LiveServer) -> None:
    def endless() -> object:
        while True:
            yield b" " * 65536

    headers = {"content-type": "application/json"}
    with (
        unix_client(live) as client,
        client.stream(
            "POST",
            "/v1/vms",
            content=endless(),
            headers=headers,  # type: ignore[arg-type]
        ) as reply,
    ):
        assert reply.status_code == 413


def test_upload_cut_short_is_no_kernel(live: LiveServer) -> None:
    head = b"POST /v1/kernels/upload?name=k HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc"
    with live.connect() as raw:
        raw.sendall(head)
        live.wait_until(lambda: bool(live.service.calls))
    live.wait_until(lambda: live.service.broken_uploads == ["client_gone"])
    assert not live.service.kernels


def test_too_many_connections_are_refused(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.server, "MAX_CONNECTIONS", 1)
    with live.connect() as first:
        first.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        assert first.recv(65536).startswith(b"HTTP/1.1 200")
        with live.connect() as second:
            assert problem_of(read_all(second)) == (503, "too_many_connections")


def test_tcp_connections_do_not_shut_the_unix_socket_out(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.server, "MAX_CONNECTIONS", 1)
    monkeypatch.setattr(api.server, "MAX_TCP_CONNECTIONS", 1)
    with socket.create_connection(("127.0.0.1", live.port), 20) as first:
        first.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert first.recv(65536).startswith(b"HTTP/1.1 401")
        with socket.create_connection(("127.0.0.1", live.port), 20) as second:
            assert problem_of(read_all(second)) == (503, "too_many_connections")
        with unix_client(live) as client:
            assert client.get("/metrics").status_code == 200


def test_client_that_sends_no_more_gets_its_answers(live: LiveServer) -> None:
    with live.connect() as raw:
        raw.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\nGET /v1 HTTP/1.1\r\nHost: x\r\n\r\n")
        raw.shutdown(socket.SHUT_WR)
        assert read_all(raw).count(b"HTTP/1.1 200 OK") == 2


def test_client_that_sends_no_more_may_wait_for_its_answer(live: LiveServer) -> None:
    live.service.create_gate = asyncio.Event()
    body = b'{"name": "web-1", "kernel": "debian"}'
    head = b"POST /v1/vms HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with live.connect() as raw:
        raw.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        raw.shutdown(socket.SHUT_WR)
        live.wait_until(lambda: live.service.creates == 1)
        live.run(open_gate(live.service.create_gate))
        assert read_all(raw).startswith(b"HTTP/1.1 201 Created")


async def open_gate(gate: asyncio.Event) -> None:
    gate.set()


def test_follower_that_sends_no_more_is_not_kept(live: LiveServer) -> None:
    make_vm(live)
    with live.connect() as raw:
        raw.sendall(b"GET /v1/vms/web-1/console/log?follow=true HTTP/1.1\r\nHost: x\r\n\r\n")
        raw.shutdown(socket.SHUT_WR)
        read_all(raw)
    live.wait_until(lambda: live.app.state.followers.count == 0)


@pytest.mark.parametrize("size", [4 << 20, 400 << 10])
def test_client_that_does_not_read_its_reply_is_cut(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(api.server, "REPLY_STALL_S", 0.1)
    make_vm(live)
    live.run(live.service.say("web-1", b"x" * size))
    with live.connect() as raw:
        path = b"/v1/vms/web-1/console/log?limit=4194304"
        raw.sendall(b"GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % path)
        poll = select.poll()
        poll.register(raw, 0)
        assert poll.poll(20_000) == [(raw.fileno(), select.POLLHUP)]
        assert len(read_all(raw)) < size


def test_client_that_reads_slowly_gets_all_of_its_reply(live: LiveServer) -> None:
    size = 4 << 20
    make_vm(live)
    live.run(live.service.say("web-1", b"x" * size))
    with live.connect() as raw, unix_client(live) as other:
        path = b"/v1/vms/web-1/console/log?limit=4194304"
        raw.sendall(b"GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % path)
        reply = b""
        while piece := raw.recv(1) + raw.recv(60_000):
            reply += piece
            if len(reply) % 16 == 0:
                assert other.get("/v1/vms").status_code == 200
    assert reply.endswith(b"\r\n\r\n" + b"x" * size)


def test_follower_that_reads_slowly_is_kept_and_costs_no_more_than_a_buffer(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, bound = 8 << 20, 1 << 20  # the kernel's buffers on both sides, and a piece or two
    handed_out = 0
    follow = live.service.follow_console

    async def counted(ref: str, offset: int) -> AsyncIterator[ConsoleChunk]:
        nonlocal handed_out
        async for chunk in follow(ref, offset):
            handed_out += len(chunk.data)
            yield chunk

    monkeypatch.setattr(live.service, "follow_console", counted)
    make_vm(live)
    live.run(live.service.say("web-1", b"x" * size))
    with live.connect() as raw:
        path = b"/v1/vms/web-1/console/log?follow=true&offset=0"
        raw.sendall(b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % path)
        taken = 0
        while taken < size:
            for length in (1, 60_000):
                taken += len(raw.recv(length))
            assert handed_out <= taken + bound


def test_log_is_followed_and_ends_with_the_vm(live: LiveServer) -> None:
    make_vm(live)
    live.run(live.service.say("web-1", b"one "))
    with (
        unix_client(live) as client,
        client.stream("GET", "/v1/vms/web-1/console/log?follow=true") as reply,
    ):
        pieces = reply.iter_raw()
        assert next(pieces) == b"one "
        live.run(live.service.say("web-1", b"two"))
        assert next(pieces) == b"two"
        live.run(live.service.delete_vm("web-1", True, Call("test")))
        live.run(live.service.happen("vm.deleted", VM))
        assert list(pieces) == []


def test_follower_that_leaves_is_forgotten(live: LiveServer) -> None:
    make_vm(live)
    with live.connect() as raw:
        raw.sendall(b"GET /v1/vms/web-1/console/log?follow=true HTTP/1.1\r\nHost: x\r\n\r\n")
        live.wait_until(lambda: live.service.followers == 1)
    live.wait_until(lambda: live.service.followers == 0)


def test_stalled_log_follower_is_cut(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api.streams, "SEND_STALL_S", 0.1)
    monkeypatch.setattr(api.server, "LINGER_S", 0.1)
    make_vm(live)
    with live.connect() as raw:
        raw.sendall(b"GET /v1/vms/web-1/console/log?follow=true HTTP/1.1\r\nHost: x\r\n\r\n")
        live.wait_until(lambda: live.service.followers == 1)
        live.run(live.service.say("web-1", b"x" * (8 << 20)))
        live.wait_until(lambda: live.service.followers == 0)


def test_stalled_event_follower_is_told_why(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.streams, "SEND_STALL_S", 0.2)
    with live.connect() as raw:
        raw.sendall(b"GET /v1/events/stream?after=0 HTTP/1.1\r\nHost: x\r\n\r\n")
        live.wait_until(lambda: live.service.followers == 1)
        for _ in range(4000):
            live.run(live.service.happen("vm.started", VM))
        live.wait_until(lambda: live.service.followers == 0)
        assert b"too slow" in read_all(raw)[-200:]


def test_events_resume_where_they_broke_off(live: LiveServer) -> None:
    for kind in ("a", "b", "c"):
        live.run(live.service.happen(kind, VM))
    with (
        unix_client(live) as client,
        client.stream("GET", "/v1/events/stream?after=0", headers={"last-event-id": "2"}) as reply,
    ):
        lines = reply.iter_lines()
        assert [next(lines) for _ in range(4)] == ["retry: 2000", "", "id: 3", "event: c"]


def test_silent_event_stream_shows_that_it_lives(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.routes.events.HEARTBEAT_S", 0.05)
    with unix_client(live) as client, client.stream("GET", "/v1/events/stream") as reply:
        lines = reply.iter_lines()
        assert [next(lines) for _ in range(3)] == ["retry: 2000", "", ": alive"]


def test_websocket_replays_events_and_goes_on(live: LiveServer) -> None:
    live.run(live.service.happen("a", VM))
    with unix_connect(live.path, "ws://localhost/v1/events/ws?after=0") as socket:
        assert json.loads(socket.recv(20))["type"] == "a"
        live.run(live.service.happen("b", VM))
        assert json.loads(socket.recv(20))["id"] == 2


def test_late_joiner_sees_the_last_16_kib(live: LiveServer) -> None:
    make_vm(live)
    live.run(live.service.say("web-1", b"old" * 10_000 + b"login: "))
    with unix_connect(live.path, "ws://localhost/v1/vms/web-1/console") as late:
        seen = late.recv(20)
    assert isinstance(seen, bytes)
    assert len(seen) == 16 * 1024
    assert seen.endswith(b"login: ")


def test_console_offset_chooses_where_to_begin(live: LiveServer) -> None:
    make_vm(live)
    live.run(live.service.say("web-1", b"0123456789"))
    with unix_connect(live.path, "ws://localhost/v1/vms/web-1/console?offset=7") as socket:
        assert socket.recv(20) == b"789"


def test_all_attached_terminals_see_the_output_and_may_type(live: LiveServer) -> None:
    make_vm(live)
    live.service.typed_per_call = 2
    address = "ws://localhost/v1/vms/web-1/console"
    with unix_connect(live.path, address) as one, unix_connect(live.path, address) as two:
        one.send(b"root\n")
        live.wait_until(lambda: bytes(*live.service.typed.values()) == b"root\n")
        two.send("ls\n")
        live.wait_until(lambda: bytes(*live.service.typed.values()) == b"root\nls\n")
        live.run(live.service.say("web-1", b"bin\n"))
        assert (one.recv(20), two.recv(20)) == (b"bin\n", b"bin\n")


def test_half_closed_console_is_let_go(live: LiveServer) -> None:
    make_vm(live)
    with unix_connect(live.path, "ws://localhost/v1/vms/web-1/console") as socket:
        live.wait_until(lambda: live.service.followers == 1)
        socket.socket.shutdown(1)  # SHUT_WR: no more from us, still reading
        live.wait_until(lambda: live.service.followers == 0)
    with unix_client(live) as client:
        assert client.get("/v1/vms/web-1").status_code == 200


def test_client_that_leaves_a_guest_that_does_not_read_is_let_go(live: LiveServer) -> None:
    make_vm(live)
    live.service.typed_per_call = 0
    with unix_connect(live.path, "ws://localhost/v1/vms/web-1/console") as socket:
        socket.send(b"x" * 60_000)
        live.wait_until(lambda: live.service.writes > 0)
        assert live.app.state.followers.count == 1
        socket.socket.shutdown(2)  # SHUT_RDWR, without a closing handshake
        live.wait_until(lambda: live.app.state.followers.count == 0)
    assert live.service.followers == 0


def test_what_was_typed_before_the_client_went_reaches_the_guest(live: LiveServer) -> None:
    make_vm(live)
    live.service.typed_per_call = 2
    with unix_connect(live.path, "ws://localhost/v1/vms/web-1/console") as socket:
        socket.send(b"poweroff\n")
    live.wait_until(lambda: bytes(*live.service.typed.values()) == b"poweroff\n")


def test_guest_that_does_not_read_is_asked_less_and_less_often() -> None:
    delays = list(itertools.islice(retry_delays(), 20))
    assert delays == sorted(delays)
    assert delays[0] >= 0.02
    assert delays[6:] == [1.0] * 14


def test_console_takes_only_so_much_ahead_of_the_guest(live: LiveServer) -> None:
    make_vm(live)
    live.service.typed_per_call = 0
    with unix_connect(live.path, "ws://localhost/v1/vms/web-1/console") as socket:
        for _ in range(5):
            socket.send(b"x" * 60_000)
        with pytest.raises(ConnectionClosed) as caught:
            socket.recv(20)
    assert caught.value.rcvd is not None
    assert caught.value.rcvd.code == 1009
    assert "does not read" in caught.value.rcvd.reason


def test_console_says_why_typing_failed(live: LiveServer) -> None:
    make_vm(live)
    with unix_client(live) as client:
        client.post("/v1/vms/web-1/kill")
    with unix_connect(live.path, "ws://localhost/v1/vms/web-1/console") as socket:
        socket.send(b"x")
        with pytest.raises(ConnectionClosed) as caught:
            socket.recv(20)
    assert caught.value.rcvd is not None
    assert (caught.value.rcvd.code, caught.value.rcvd.reason) == (4409, "VM web-1 is stopped")


def test_stalled_console_is_cut(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api.streams, "SEND_STALL_S", 0.1)
    monkeypatch.setattr(api.server, "LINGER_S", 0.1)
    make_vm(live)
    live.run(live.service.say("web-1", b"x" * (16 << 20)))
    with live.connect() as raw:
        raw.sendall(
            b"GET /v1/vms/web-1/console?offset=0 HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        live.wait_until(lambda: live.service.followers == 1)
        live.wait_until(lambda: live.service.followers == 0)


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/v1/vms/none/console", 404, "vm_not_found"),
        ("/v1/vms/a%20b/console", 422, "invalid_value"),
        ("/v1/vms/none/console?offset=x", 422, "invalid_value"),
        ("/v1/events/ws?after=-1", 422, "invalid_value"),
        ("/v1/events/ws?after=1", 422, "cursor_unknown"),
    ],
)
def test_refused_websocket_gets_a_problem(
    live: LiveServer, path: str, status: int, code: str
) -> None:
    with pytest.raises(InvalidStatus) as caught, unix_connect(live.path, f"ws://localhost{path}"):
        pass
    reply = caught.value.response
    assert reply.status_code == status
    assert reply.body is not None
    assert json.loads(reply.body)["code"] == code


def test_websocket_over_tcp_needs_the_token(live: LiveServer) -> None:
    address = f"ws://127.0.0.1:{live.port}/v1/events/ws?after=0"
    with pytest.raises(InvalidStatus) as caught, connect(address):
        pass
    assert caught.value.response.status_code == 401
    live.run(live.service.happen("a", VM))
    with connect(address, additional_headers={"Authorization": f"Bearer {TOKEN}"}) as socket:
        assert json.loads(socket.recv(20))["type"] == "a"


def test_stop_ends_followers_with_a_word(live: LiveServer) -> None:
    with unix_client(live) as client, client.stream("GET", "/v1/events/stream") as reply:
        lines = reply.iter_lines()
        assert next(lines) == "retry: 2000"
        with unix_connect(live.path, "ws://localhost/v1/events/ws") as socket:
            live.begin_stop()
            with pytest.raises(ConnectionClosed) as caught:
                socket.recv(20)
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1012
        assert ": the daemon is stopping, connect again" in list(lines)


def test_stop_tells_who_still_waits(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    live.service.create_gate = asyncio.Event()
    body = b'{"name": "web-1", "kernel": "debian"}'
    head = b"POST /v1/vms HTTP/1.1\r\nHost: x\r\nIdempotency-Key: 1\r\n"
    head += b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    with live.connect() as raw:
        raw.sendall(head + body)
        live.wait_until(lambda: live.service.creates == 1)
        live.begin_stop()
        assert problem_of(read_all(raw)) == (503, "stopping")
    assert live.service.keys == {}


def test_reading_again_under_another_limit_is_bounded(live: LiveServer) -> None:
    make_vm(live)
    with unix_client(live) as client:
        path = "/v1/vms/web-1/console/input"
        reply = client.post(path, content=b"x" * 65537, headers={"idempotency-key": "1"})
        assert (reply.status_code, reply.json()["code"]) == (413, "body_too_large")
        assert client.post(path, content=b"a", headers={"idempotency-key": "2"}).status_code == 200
        other = client.post(path, content=b"b", headers={"idempotency-key": "2"})
        assert other.json()["code"] == "idempotency_key_reused"
