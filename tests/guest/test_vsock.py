# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""vsock streams between a Linux guest and programs of the host, over Unix sockets."""

from __future__ import annotations

import contextlib
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab.guests import Guest
from tests.support.hostel import Hostel
from tests.support.linux import LinuxGuest
from tests.support.vsock_stream import (
    LIMIT_S,
    checksum,
    connect,
    pattern,
    read_exactly,
    read_to_end,
)

CID = 77
STREAM_BYTES = 2 << 20
CONNECTIONS = 1000


@pytest.fixture(scope="module")
def linux(hostel: Hostel, guest: Guest) -> Iterator[LinuxGuest]:
    hostel.api.post(
        "/v1/vms?wait=60",
        {
            "name": "vsock",
            "kernel": "debian",
            "initrd": "initrd",
            "cmdline": f"{guest.cmdline} quiet",
            "disks": [{"id": "root", "image": "root"}],
            "vsock": {"cid": CID},
        },
    )
    linux = LinuxGuest(hostel, guest, "vsock")
    with linux.running():
        yield linux


@pytest.fixture(scope="module")
def path(linux: LinuxGuest) -> Path:
    return Path(linux.vm["vsock"]["path"])


def in_guest(linux: LinuxGuest, command: str, name: str) -> None:
    """Run a server of the guest in the background, and wait until it listens."""
    linux.ask(f"{command} > /tmp/{name} 2>&1 & until grep -q listening /tmp/{name}; do :; done")


@contextlib.contextmanager
def on_host(path: Path, port: int, serve: Callable[[socket.socket], None]) -> Iterator[None]:
    """Serve the guest's connections to a port, in a thread until the block ends."""
    with socket.socket(socket.AF_UNIX) as listener:
        own = path.with_name(f"{path.name}_{port}")
        listener.bind(str(own))
        listener.listen(1024)
        listener.settimeout(LIMIT_S)
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        try:
            yield
        finally:
            thread.join(LIMIT_S)
            own.unlink()
    assert not thread.is_alive()


def test_the_guest_has_its_address(linux: LinuxGuest) -> None:
    assert linux.vm["vsock"]["cid"] == CID
    assert (
        linux.ask("ls /sys/bus/virtio/drivers/vmw_vsock_virtio_transport | grep -c virtio") == "1"
    )


def test_a_program_of_the_host_talks_to_one_of_the_guest(linux: LinuxGuest, path: Path) -> None:
    in_guest(linux, "vsock echo 52", "echo")
    with connect(path, 52) as stream:
        stream.sendall(b"hello, guest")
        assert stream.recv(100) == b"hello, guest"
        # The guest reads its end of file, writes what it has, and ends as well.
        stream.sendall(b"last words")
        stream.shutdown(socket.SHUT_WR)
        assert read_to_end(stream) == b"last words"


def test_a_program_of_the_guest_talks_to_one_of_the_host(linux: LinuxGuest, path: Path) -> None:
    heard: list[bytes] = []

    def serve(listener: socket.socket) -> None:
        stream, _ = listener.accept()
        with stream:
            stream.settimeout(LIMIT_S)
            heard.append(read_to_end(stream))
            # Half closed: the other half goes on.
            stream.sendall(b"and you heard me")

    with on_host(path, 1234, serve):
        assert linux.ask("echo can you hear me | vsock talk 2 1234") == "and you heard me"
    assert heard == [b"can you hear me\n"]


def test_a_port_without_a_listener_refuses_both_ways(linux: LinuxGuest, path: Path) -> None:
    assert "reset" in linux.sh("vsock talk 2 999 < /dev/null").text
    with pytest.raises(ConnectionError):
        connect(path, 999)


def test_a_stream_to_the_guest_arrives_whole(linux: LinuxGuest, path: Path) -> None:
    in_guest(linux, "vsock sink 2000", "sink")
    data = pattern(STREAM_BYTES)
    with connect(path, 2000) as stream:
        stream.sendall(data)
        stream.shutdown(socket.SHUT_WR)
        assert read_to_end(stream).decode() == f"{len(data)} {checksum(data):016x}\n"


def test_a_stream_from_the_guest_arrives_whole(linux: LinuxGuest, path: Path) -> None:
    got: list[bytes] = []

    def serve(listener: socket.socket) -> None:
        stream, _ = listener.accept()
        with stream:
            stream.settimeout(LIMIT_S)
            got.append(read_to_end(stream))

    with on_host(path, 2001, serve):
        said = linux.ask(f"vsock send 2 2001 {STREAM_BYTES}", LIMIT_S)
    assert got[0] == pattern(STREAM_BYTES)
    assert said == f"{STREAM_BYTES} {checksum(got[0]):016x}"


def test_a_slow_reader_of_the_host_gets_everything(linux: LinuxGuest, path: Path) -> None:
    in_guest(linux, "vsock source 2002 1000000", "source")
    with connect(path, 2002) as stream:
        # Far more than any buffer on the way holds, before the first read.
        linux.ask("sleep 2")
        assert read_to_end(stream) == pattern(1000000)


def test_a_thousand_connections_of_the_guest_at_once(linux: LinuxGuest, path: Path) -> None:
    def serve(listener: socket.socket) -> None:
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(listener.accept()[0]) for _ in range(CONNECTIONS)]
            for stream in streams:
                stream.settimeout(LIMIT_S)
                stream.sendall(read_exactly(stream, 8))
            for stream in streams:
                assert stream.recv(1) == b""

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with on_host(path, 3000, serve):
        said = linux.ask(f"vsock many 2 3000 {CONNECTIONS}", LIMIT_S)
    assert said == f"{CONNECTIONS} of {CONNECTIONS}"


def test_many_connections_of_the_host_at_once(linux: LinuxGuest, path: Path) -> None:
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(connect(path, 52)) for _ in range(100)]
        for index, stream in enumerate(streams):
            stream.sendall(b"%08d" % index)
        for index, stream in enumerate(streams):
            assert read_exactly(stream, 8) == b"%08d" % index


def test_streams_survive_a_pause(linux: LinuxGuest, path: Path) -> None:
    with connect(path, 52) as stream:
        stream.sendall(b"before")
        assert stream.recv(100) == b"before"
        linux.hostel.api.act("vsock", "pause")
        stream.sendall(b"meanwhile")
        linux.hostel.api.act("vsock", "resume")
        assert stream.recv(100) == b"meanwhile"


def test_streams_survive_hosteld_and_new_ones_come_without_it(
    linux: LinuxGuest, path: Path
) -> None:
    with connect(path, 52) as stream:
        linux.hostel.daemon.kill()
        try:
            stream.sendall(b"alone")
            assert stream.recv(100) == b"alone"
            with connect(path, 52) as other:
                other.sendall(b"new")
                assert other.recv(100) == b"new"
        finally:
            linux.hostel.daemon.start()
        linux.attach(linux.log_end())


def test_the_counters_tell_of_the_streams(linux: LinuxGuest) -> None:
    counters = linux.hostel.api.get("/v1/vms/vsock/stats")["vsock"]
    assert counters["guest_connections"] > CONNECTIONS
    assert counters["host_connections"] > 100
    assert min(counters["rx_bytes"], counters["tx_bytes"]) > STREAM_BYTES
    assert counters["violations"] == counters["tx_malformed"] == 0


def test_a_reboot_ends_the_streams_and_keeps_the_sockets(linux: LinuxGuest, path: Path) -> None:
    with connect(path, 52) as stream:
        offset = linux.log_end()
        linux.hostel.api.act("vsock", "reset")
        assert read_to_end(stream) == b""
        linux.attach(offset)
        linux.log_in()
    in_guest(linux, "vsock echo 52", "again")
    with connect(path, 52) as stream:
        stream.sendall(b"hello again")
        assert stream.recv(100) == b"hello again"
