# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Debian's own driver has a terminal and named ports, and programs of the host talk to both."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator

import pytest

from lab.guests import Guest
from tests.support.hostel import Hostel
from tests.support.linux import LinuxGuest

LIMIT_S = 90.0
STREAM_BYTES = 1 << 20
# What udev does on a full system: a link for each port that has a name.
LINK = (
    "mkdir -p /dev/virtio-ports; for p in /sys/class/virtio-ports/*; do"
    " ln -sf ../${p##*/} /dev/virtio-ports/$(cat $p/name); done"
)


@pytest.fixture(scope="module")
def linux(hostel: Hostel, guest: Guest) -> Iterator[LinuxGuest]:
    hostel.api.post(
        "/v1/vms?wait=60",
        {
            "name": "ports",
            "memory_mib": 256,
            "kernel": "debian",
            "initrd": "initrd",
            "cmdline": guest.cmdline,
            "disks": [{"id": "root", "image": "root"}],
            "ports": [{"name": "agent.0"}, {"name": "tty", "console": True}, {"name": "log"}],
        },
    )
    linux = LinuxGuest(hostel, guest, "ports")
    with linux.running():
        linux.ask(LINK)
        yield linux


def connect(linux: LinuxGuest, name: str) -> socket.socket:
    (path,) = (port["path"] for port in linux.vm["ports"] if port["name"] == name)
    program = socket.socket(socket.AF_UNIX)
    program.settimeout(LIMIT_S)
    program.connect(path)
    return program


def read_until(program: socket.socket, marker: bytes) -> bytes:
    found = b""
    while marker not in found:
        piece = program.recv(1 << 16)
        assert piece, found
        found += piece
    return found


def test_guest_finds_its_ports_by_their_names(linux: LinuxGuest) -> None:
    assert linux.ask("ls /dev/virtio-ports").split() == ["agent.0", "log", "tty"]
    assert linux.ask("cat /sys/class/tty/hvc0/dev") != ""


def test_shell_on_the_terminal_answers_the_host(linux: LinuxGuest) -> None:
    with connect(linux, "tty") as program:
        # Not the terminal's own session: the end of one hangs up on whoever writes there then.
        linux.ask("setsid sh -c 'sh -i < /dev/hvc0 > /dev/hvc0 2>&1; touch /tmp/left' &")
        program.sendall(b"echo $((6 * 7)) from $(tty)\n")
        assert b"42 from /dev/hvc0" in read_until(program, b"42 from")
        program.sendall(b"exit\n")
        linux.ask("while [ ! -e /tmp/left ]; do sleep 0.1; done")


def test_terminal_that_nobody_reads_does_not_hold_the_guest_up(linux: LinuxGuest) -> None:
    linux.ask("seq 3000 > /dev/hvc0 && echo the last line > /dev/hvc0")
    with connect(linux, "tty") as program:
        told = read_until(program, b"the last line")
    assert b"2999\r\n3000\r\n" in told


def test_stream_to_the_host_arrives_whole(linux: LinuxGuest) -> None:
    linux.ask(f"head -c {STREAM_BYTES} /dev/urandom > /tmp/random")
    with connect(linux, "log") as program:
        linux.type("cat /tmp/random > /dev/virtio-ports/log &")
        digest, left = hashlib.sha256(), STREAM_BYTES
        while left:
            piece = program.recv(1 << 16)
            assert piece
            digest.update(piece)
            left -= len(piece)
    assert linux.ask("sha256sum < /tmp/random").split()[0] == digest.hexdigest()


def test_stream_into_the_guest_arrives_whole(linux: LinuxGuest) -> None:
    data = os.urandom(STREAM_BYTES)
    linux.type(f"head -c {STREAM_BYTES} /dev/virtio-ports/agent.0 | sha256sum > /tmp/sum &")
    with connect(linux, "agent.0") as program:
        program.sendall(data)
        told = linux.ask("while [ ! -s /tmp/sum ]; do sleep 0.1; done; cat /tmp/sum")
    assert told.split()[0] == hashlib.sha256(data).hexdigest()


def test_writer_waits_for_a_reader_and_the_guest_goes_on(linux: LinuxGuest) -> None:
    # More than the guest's own queue takes, which is 64 writes of 32 KiB, and the socket besides.
    copies = 6
    many = f"for n in $(seq {copies}); do cat /tmp/random; done"
    linux.type(f"({many} > /dev/virtio-ports/agent.0; echo written > /tmp/done) &")
    with connect(linux, "agent.0") as program:
        assert linux.ask("sleep 2; ls /tmp/done 2> /dev/null || echo waits") == "waits"
        digest, left = hashlib.sha256(), copies * STREAM_BYTES
        while left:
            piece = program.recv(1 << 16)
            assert piece
            digest.update(piece)
            left -= len(piece)
        linux.ask("while [ ! -e /tmp/done ]; do sleep 0.1; done")
    assert linux.ask(f"({many}) | sha256sum").split()[0] == digest.hexdigest()


def test_ports_outlive_a_pause_and_a_reset_of_the_guest(linux: LinuxGuest) -> None:
    program = connect(linux, "log")
    linux.hostel.api.act("ports", "pause")
    linux.hostel.api.act("ports", "resume")
    linux.ask("echo resumed > /dev/virtio-ports/log")
    assert read_until(program, b"\n") == b"resumed\n"
    offset = linux.log_end()
    linux.hostel.api.act("ports", "reset")
    assert program.recv(1) == b""
    program.close()
    linux.attach(offset)
    linux.log_in()
    linux.ask(LINK)
    with connect(linux, "log") as again:
        linux.ask("echo booted again > /dev/virtio-ports/log")
        assert read_until(again, b"\n") == b"booted again\n"
