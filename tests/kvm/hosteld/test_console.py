# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The console of a guest that sends back what it is sent."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from websockets.sync.client import ClientConnection, unix_connect

from lab.rest import Console
from tests.support import tiny_kernel as tiny
from tests.support.hostel import Hostel

ECHO = tiny.say("hello\n") + tiny.echo()


@pytest.fixture(scope="module")
def echo(hostel: Hostel) -> Iterator[str]:
    name = hostel.run(ECHO)
    yield name
    hostel.delete(name)


@contextlib.contextmanager
def attach(hostel: Hostel, name: str) -> Iterator[ClientConnection]:
    uri = f"ws://localhost/v1/vms/{name}/console"
    with unix_connect(str(hostel.daemon.socket), uri) as connection:
        yield connection


def read_until(connection: ClientConnection, marker: bytes) -> bytes:
    data = b""
    while marker not in data:
        piece = connection.recv(timeout=30)
        data += piece if isinstance(piece, bytes) else piece.encode()
    return data


def test_what_is_typed_comes_back(hostel: Hostel, echo: str) -> None:
    console = Console(hostel.api, echo)
    hostel.api.type(echo, "abc")
    console.wait_for("hello\nabc")


def test_several_readers_see_the_same(hostel: Hostel, echo: str) -> None:
    with attach(hostel, echo) as first, attach(hostel, echo) as second:
        first.send(b"from the first;")
        assert b"from the first;" in read_until(second, b"first;")
        second.send("from the second;")
        assert b"from the second;" in read_until(first, b"second;")


def test_one_who_comes_late_is_shown_what_was_printed(hostel: Hostel, echo: str) -> None:
    with attach(hostel, echo) as late:
        assert read_until(late, b"hello\n").startswith(b"hello\n")


def test_a_half_closed_reader_harms_nobody(hostel: Hostel, echo: str) -> None:
    with attach(hostel, echo) as rude, attach(hostel, echo) as polite:
        rude.socket.shutdown(1)
        polite.send(b"still here;")
        assert b"still here;" in read_until(polite, b"here;")


def test_a_log_is_read_from_an_offset_and_from_its_end(hostel: Hostel, echo: str) -> None:
    path = f"/v1/vms/{echo}/console/log"
    reply = hostel.api.request("GET", f"{path}?offset=2&limit=3")
    assert reply.body == b"llo"
    assert reply.headers["console-offset"] == "2"
    assert reply.headers["console-next-offset"] == "5"
    end = int(reply.headers["console-end-offset"])
    tail = hostel.api.request("GET", f"{path}?offset=-2")
    assert len(tail.body) == 2
    assert int(tail.headers["console-offset"]) == end - 2


def test_a_log_outlives_a_reset_and_a_stop(hostel: Hostel) -> None:
    name = hostel.run(tiny.say("one.") + tiny.HALT)
    Console(hostel.api, name).wait_for("one.")
    hostel.api.act(name, "kill")
    hostel.api.act(name, "start")
    Console(hostel.api, name).wait_for("one.one.")
    hostel.api.act(name, "kill")
    assert hostel.console(name) == "one.one."
    hostel.delete(name)
