# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Requests, replies and notices over a real socket."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from daemon import protocol
from daemon.errors import WorkerError, WorkerGone, WorkerTimeout
from daemon.supervisor.channel import MAX_IN_FLIGHT, Channel, Handlers, clean

Scenario = Callable[[Channel, socket.socket, list[str]], Awaitable[None]]


def converse(scenario: Scenario) -> list[str]:
    """Run a scenario between a channel and the peer's end of its socket; return what was heard."""
    heard: list[str] = []

    async def run() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        handlers = Handlers(
            on_reply=lambda op, _: heard.append(f"reply {op}"),
            on_notice=lambda notice, data: heard.append(f"{notice} {data}"),
            on_close=lambda: heard.append("closed"),
        )
        channel = Channel(ours, "the peer", handlers)
        with theirs:
            theirs.setblocking(False)
            await scenario(channel, theirs, heard)
            channel.close()

    asyncio.run(run())
    return heard


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def receive(sock: socket.socket) -> protocol.Message:
    while True:
        try:
            message = protocol.receive(sock)
        except BlockingIOError:
            await asyncio.sleep(0)
            continue
        assert message is not None
        return message


def ask(channel: Channel, op: str, **options: Any) -> asyncio.Task[protocol.Message]:  # noqa: ANN401
    return asyncio.create_task(
        channel.request(op, timeout_s=options.pop("timeout_s", 10), **options)
    )


def test_a_reply_reaches_its_request() -> None:
    async def scenario(channel: Channel, peer: socket.socket, _: list[str]) -> None:
        first, second = ask(channel, "pause"), ask(channel, "stats")
        ids = [(await receive(peer)).body["id"] for _ in range(2)]
        protocol.send(peer, {"id": ids[1], "ok": {"n": 2}})
        protocol.send(peer, {"id": ids[0], "ok": {"n": 1}})
        assert (await first).body["ok"] == {"n": 1}
        assert (await second).body["ok"] == {"n": 2}

    assert converse(scenario) == ["reply stats", "reply pause"]


def test_an_error_reply_is_raised_with_its_code() -> None:
    async def scenario(channel: Channel, peer: socket.socket, _: list[str]) -> None:
        request = ask(channel, "pause")
        body = (await receive(peer)).body
        protocol.send(peer, {"id": body["id"], "error": {"code": "wrong_state", "message": "no"}})
        with pytest.raises(WorkerError, match="no") as caught:
            await request
        assert caught.value.code == "wrong_state"

    converse(scenario)


def test_a_reply_that_is_neither_ok_nor_error_is_an_error() -> None:
    async def scenario(channel: Channel, peer: socket.socket, _: list[str]) -> None:
        request = ask(channel, "pause")
        protocol.send(peer, {"id": (await receive(peer)).body["id"]})
        with pytest.raises(WorkerError, match="neither ok nor error"):
            await request

    converse(scenario)


def test_no_answer_in_time_is_told_and_a_late_one_is_dropped_with_its_descriptors() -> None:
    async def scenario(channel: Channel, peer: socket.socket, _: list[str]) -> None:
        with pytest.raises(WorkerTimeout, match="no answer to pause"):
            await channel.request("pause", timeout_s=0.01)
        late_id = (await receive(peer)).body["id"]
        before = open_fds()
        read_end, write_end = os.pipe()
        protocol.send(peer, {"id": late_id, "ok": {}}, (read_end,))
        os.close(read_end)
        os.close(write_end)
        request = ask(channel, "status")
        protocol.send(peer, {"id": (await receive(peer)).body["id"], "ok": {}})
        await request
        assert open_fds() == before

    assert converse(scenario) == ["reply status"]


def test_notices_and_replies_are_heard_in_the_order_of_the_socket() -> None:
    async def scenario(channel: Channel, peer: socket.socket, _: list[str]) -> None:
        request = ask(channel, "pause")
        request_id = (await receive(peer)).body["id"]
        protocol.send(peer, {"notice": "state", "data": {"n": 1}})
        protocol.send(peer, {"id": request_id, "ok": {}})
        protocol.send(peer, {"notice": "state", "data": {"n": 2}})
        await request
        peer.close()
        channel.drain()

    heard = converse(scenario)
    assert heard == ["state {'n': 1}", "reply pause", "state {'n': 2}", "closed"]


def test_a_peer_that_goes_away_fails_what_is_asked_and_what_comes() -> None:
    async def scenario(channel: Channel, peer: socket.socket, _: list[str]) -> None:
        request = ask(channel, "pause")
        await receive(peer)
        peer.close()
        with pytest.raises(WorkerGone, match="went away"):
            await request
        with pytest.raises(WorkerGone, match="is gone"):
            await channel.request("resume", timeout_s=10)

    assert converse(scenario) == ["closed"]


@pytest.mark.parametrize("garbage", [b"not json", b"[1]", b"\xff\xfe"])
def test_a_peer_that_breaks_the_protocol_is_hung_up_on(garbage: bytes) -> None:
    async def scenario(channel: Channel, peer: socket.socket, _: list[str]) -> None:
        request = ask(channel, "pause")
        await receive(peer)
        peer.send(garbage)
        with pytest.raises(WorkerGone):
            await request

    assert converse(scenario) == ["closed"]


def test_replies_to_nobody_are_ignored() -> None:
    async def scenario(channel: Channel, peer: socket.socket, _: list[str]) -> None:
        bodies: list[dict[str, Any]] = [{"id": 99, "ok": {}}, {"id": "x", "ok": {}}, {"ok": {}}, {}]
        for body in bodies:
            protocol.send(peer, body)
        request = ask(channel, "status")
        protocol.send(peer, {"id": (await receive(peer)).body["id"], "ok": {}})
        await request

    assert converse(scenario) == ["reply status"]


def test_requests_beyond_the_socket_buffer_wait_their_turn() -> None:
    async def scenario(channel: Channel, peer: socket.socket, _: list[str]) -> None:
        args = {"data": "x" * 50_000}
        requests = [ask(channel, "console_write", args=args) for _ in range(20)]
        for number in range(20):
            body = (await receive(peer)).body
            assert body["id"] == number + 1
            protocol.send(peer, {"id": body["id"], "ok": {}})
        await asyncio.gather(*requests)

    converse(scenario)


def test_a_request_that_was_given_up_is_not_sent_later() -> None:
    async def scenario(channel: Channel, peer: socket.socket, _: list[str]) -> None:
        args = {"data": "x" * 50_000}
        requests = [ask(channel, "console_write", args=args, timeout_s=0.05) for _ in range(20)]
        results = await asyncio.gather(*requests, return_exceptions=True)
        assert all(isinstance(result, WorkerTimeout) for result in results)
        count = 0
        while True:
            try:
                protocol.receive(peer)
            except BlockingIOError:
                break
            count += 1
        assert count < 20
        last = ask(channel, "status")
        body = (await receive(peer)).body
        assert body["op"] == "status"
        protocol.send(peer, {"id": body["id"], "ok": {}})
        await last

    converse(scenario)


def test_requests_beyond_the_limit_wait_for_their_turn() -> None:
    async def scenario(channel: Channel, peer: socket.socket, _: list[str]) -> None:
        asked = [ask(channel, "stats") for _ in range(MAX_IN_FLIGHT + 1)]
        first = [(await receive(peer)).body["id"] for _ in range(MAX_IN_FLIGHT)]
        with pytest.raises(BlockingIOError):
            protocol.receive(peer)
        protocol.send(peer, {"id": first[0], "ok": {}})
        first.append((await receive(peer)).body["id"])
        for request_id in first[1:]:
            protocol.send(peer, {"id": request_id, "ok": {}})
        await asyncio.gather(*asked)

    assert converse(scenario) == ["reply stats"] * (MAX_IN_FLIGHT + 1)


def test_those_who_wait_for_their_turn_learn_that_the_peer_has_gone() -> None:
    async def scenario(channel: Channel, peer: socket.socket, _: list[str]) -> None:
        asked = [ask(channel, "stats") for _ in range(3 * MAX_IN_FLIGHT)]
        await receive(peer)
        peer.close()
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert {type(answer) for answer in answers} == {WorkerGone}

    assert converse(scenario) == ["closed"]


def test_waiting_for_a_turn_has_the_same_deadline() -> None:
    async def scenario(channel: Channel, peer: socket.socket, _: list[str]) -> None:
        asked = [ask(channel, "stats") for _ in range(MAX_IN_FLIGHT)]
        with pytest.raises(WorkerTimeout):
            await ask(channel, "pause", timeout_s=0.01)
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)

    converse(scenario)


def test_a_reply_that_comes_too_late_is_handed_over_with_its_descriptors() -> None:
    async def run() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        late: asyncio.Future[protocol.Message] = asyncio.get_running_loop().create_future()
        handlers = Handlers(lambda *_: None, lambda *_: None, lambda: None, late.set_result)
        channel = Channel(ours, "the peer", handlers)
        with theirs:
            protocol.send(theirs, {"id": 7, "ok": {}}, (0,))
            message = await late
        assert len(message.fds) == 1
        protocol.close_all(message.fds)
        channel.close()

    asyncio.run(run())


@pytest.mark.parametrize("told", ["\ud800", "a\udfffb", 7, None, "x" * 5000])
def test_what_a_peer_says_becomes_text_that_can_be_encoded(told: object) -> None:
    assert len(clean(told).encode()) <= 2000
