# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What a back end may send, and what becomes of everything else."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.errors import BackendError
from devices.virtio.vhost_user import wire
from devices.virtio.vhost_user.link import Link
from devices.virtio.vhost_user.wire import BackendRequests, Conversation, split_requests

VERSION_1 = 1 << 32
REPLY = 1 | 1 << 2


def answer(request: int, value: int, flags: int = REPLY) -> bytes:
    return struct.pack("<III", request, flags, 8) + struct.pack("<Q", value)


@pytest.fixture
def pair() -> Iterator[tuple[Conversation, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    talk = Conversation(ours, "d0", timeout_s=0.05)
    yield talk, theirs
    talk.close()
    theirs.close()


def test_answer_in_pieces_is_put_together(pair: tuple[Conversation, socket.socket]) -> None:
    talk, theirs = pair
    whole = answer(wire.GET_FEATURES, 0x1234)
    theirs.send(whole[:5])
    theirs.send(whole[5:])
    assert talk.ask_u64(wire.GET_FEATURES) == 0x1234


def test_request_is_as_the_protocol_has_it(pair: tuple[Conversation, socket.socket]) -> None:
    talk, theirs = pair
    talk.tell(wire.SET_VRING_NUM, wire.VRING_STATE.pack(1, 256))
    assert theirs.recv(100) == struct.pack("<IIIII", 8, 1, 8, 1, 256)


@pytest.mark.parametrize(
    "reply",
    [
        answer(wire.SET_OWNER, 0),  # of another request
        answer(wire.GET_FEATURES, 0, flags=1),  # no reply
        answer(wire.GET_FEATURES, 0, flags=2 | 1 << 2),  # of another version
        struct.pack("<III", wire.GET_FEATURES, REPLY, 0xFFFFFFFF),
        struct.pack("<IIII", wire.GET_FEATURES, REPLY, 4, 0),
    ],
)
def test_answer_of_another_form_is_refused(
    pair: tuple[Conversation, socket.socket], reply: bytes
) -> None:
    talk, theirs = pair
    theirs.send(reply)
    with pytest.raises(BackendError, match="answered 1 with"):
        talk.ask_u64(wire.GET_FEATURES)


def test_silent_back_end_is_given_up_on(pair: tuple[Conversation, socket.socket]) -> None:
    talk, _ = pair
    with pytest.raises(BackendError, match=r"did not take or answer message 1 in 0\.05 s"):
        talk.ask_u64(wire.GET_FEATURES)


def test_back_end_that_does_not_read_is_given_up_on(
    pair: tuple[Conversation, socket.socket],
) -> None:
    talk, _ = pair
    with pytest.raises(BackendError, match="did not take"):
        talk.tell(wire.SET_MEM_TABLE, bytes(1 << 24))


def test_back_end_that_refuses_is_named(pair: tuple[Conversation, socket.socket]) -> None:
    talk, theirs = pair
    talk.has_reply_ack = True
    theirs.send(answer(wire.SET_MEM_TABLE, 1))
    with pytest.raises(BackendError, match="refused message 5 with 0x1"):
        talk.tell(wire.SET_MEM_TABLE)


@pytest.mark.parametrize("count", [1, 2, 20])
def test_descriptors_that_nobody_asked_for_are_closed(
    pair: tuple[Conversation, socket.socket], count: int
) -> None:
    talk, theirs = pair
    reading, writing = os.pipe()
    rights = array.array("i", [writing] * count)
    theirs.sendmsg([answer(wire.GET_FEATURES, 0)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    os.close(writing)
    with pytest.raises(BackendError, match="descriptor"):
        talk.ask_u64(wire.GET_FEATURES)
    assert os.read(reading, 1) == b"", "somebody still holds the other end"
    os.close(reading)


# Half of them begin like an honest answer, so that the later steps see garbage too.
_MESSAGE = st.builds(
    lambda request, flags, body: struct.pack("<III", request, flags, len(body)) + body,
    st.sampled_from([1, 15, 17, 24, 31, 3, 16]),
    st.sampled_from([REPLY, 1, 0xFFFFFFFF]),
    st.one_of(
        st.binary(max_size=80),
        st.sampled_from([2**64 - 1, VERSION_1 | 1 << 30, VERSION_1]).map(
            lambda value: struct.pack("<Q", value)
        ),
    ),
)
_GARBAGE = st.lists(st.one_of(_MESSAGE, st.binary(max_size=40)), max_size=8).map(b"".join)


@given(_GARBAGE, st.booleans())
def test_garbage_ends_a_connection_and_nothing_else(garbage: bytes, is_libvhost: bool) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    honest = answer(1, VERSION_1 | 1 << 30)
    with theirs, contextlib.suppress(BackendError):
        theirs.sendall(honest + garbage)
        theirs.shutdown(socket.SHUT_WR)
        link = Link("d0", ours, config_bytes=60, is_libvhost=is_libvhost)
        assert len(link.config) == 60
        link.close()
    assert ours.fileno() < 0


@given(st.binary(max_size=300), st.integers(min_value=0, max_value=300))
def test_back_end_s_requests_are_split_the_same_however_they_come(data: bytes, at: int) -> None:
    try:
        whole, rest = split_requests(data)
    except ValueError:
        return
    first, unread = split_requests(data[:at])
    second, left = split_requests(unread + data[at:])
    assert first + second == whole
    assert left == rest


def test_config_change_is_answered_and_told_and_other_requests_are_refused() -> None:
    requests = BackendRequests("d0")
    need_reply = 1 | 1 << 3
    requests.theirs.send(struct.pack("<III", 3, need_reply, 0))
    assert not requests.receive()
    assert requests.theirs.recv(100) == answer(3, 1)
    requests.theirs.send(struct.pack("<III", 2, need_reply, 0))
    assert requests.receive()
    assert requests.theirs.recv(100) == answer(2, 0)
    requests.close()
