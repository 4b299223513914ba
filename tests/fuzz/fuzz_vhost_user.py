# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""libFuzzer on what a vhost-user back end sends, with and without descriptors, in any pieces.

Whatever it is, it ends in an answer or in BackendError, and no descriptor stays behind.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import sys

import atheris

with atheris.instrument_imports(include=["devices.virtio.vhost_user"]):
    from devices.virtio.vhost_user import wire
    from devices.virtio.vhost_user.link import Link
    from devices.virtio.vhost_user.wire import BackendRequests, Conversation, split_requests

from devices.errors import BackendError

CONFIG_BYTES = 60
NOTHING = os.open(os.devnull, os.O_RDWR)


def send(sock: socket.socket, pieces: bytes) -> None:
    """Pieces of a length, of which some bring descriptors."""
    while pieces:
        # Lengths of up to 63 bytes, so that messages come whole and torn; up to 3 descriptors.
        size, count, data = pieces[0] & 0x3F, pieces[0] >> 6, pieces[1:]
        rights = array.array("i", [NOTHING] * count)
        if data[:size]:
            cmsg = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if count else []
            sock.sendmsg([data[:size]], cmsg)
        pieces = data[size:]


def split(data: bytes) -> None:
    """The same requests come out however their bytes were torn."""
    if not data:
        return
    at, data = data[0], data[1:]
    try:
        whole, rest = split_requests(data)
    except ValueError:
        return
    first, unread = split_requests(data[:at])
    second, left = split_requests(unread + data[at:])
    assert (first + second, left) == (whole, rest)
    assert len(rest) < wire.HEADER.size + wire.MAX_REPLY_BYTES


def request_channel(data: bytes) -> None:
    """What comes on the back end's own channel."""
    requests = BackendRequests("d0")
    try:
        send(requests.theirs, data)
        # The other end is open here as well, so it runs dry and does not hang up.
        for _ in range(4):
            requests.receive()
    finally:
        requests.close()


def shake_hands(data: bytes) -> None:
    """A whole beginning of a connection, with our end told nothing but garbage."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        send(theirs, data[1:])
        theirs.shutdown(socket.SHUT_WR)
        link = Link("d0", ours, config_bytes=CONFIG_BYTES, is_libvhost=bool(data[:1] > b"\x7f"))
        assert len(link.config) == CONFIG_BYTES
        link.close()


def converse(data: bytes) -> None:
    """Each form of a question, one after the other."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    talk = Conversation(ours, "d0")
    with theirs, contextlib.closing(talk):
        send(theirs, data[1:])
        theirs.shutdown(socket.SHUT_WR)
        talk.has_reply_ack = True
        for turn in range(8):
            if data[0] >> turn & 1:
                size = wire.INFLIGHT.size
                answer, fd = talk.ask_for_fd(wire.GET_INFLIGHT_FD, sizes=(size, size + 4))
                os.close(fd)
                assert size <= len(answer) <= size + 4
            else:
                talk.tell(wire.SET_OWNER)
            assert 0 <= talk.ask_u64(wire.GET_FEATURES) < 1 << 64


def attack(data: bytes) -> None:
    """Back-end-controlled: everything."""
    if len(data) < 2:
        return
    lowest = os.dup(NOTHING)
    os.close(lowest)
    with contextlib.suppress(BackendError):
        (split, request_channel, shake_hands, converse)[data[0] % 4](data[1:])
    after = os.dup(NOTHING)
    os.close(after)
    assert after == lowest, "a descriptor stays behind"


if __name__ == "__main__":
    atheris.Setup(sys.argv, attack)
    atheris.Fuzz()
