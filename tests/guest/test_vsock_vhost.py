# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""vsock streams that the kernel carries: AF_VSOCK in the guest and on the host."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Iterator

import pytest

from daemon.supervisor.records import VsockRecord
from daemon.supervisor.vsock import open_vsock
from lab.guests import Guest
from lab.rest import ApiFailure
from lab.where import in_lab
from tests.support.hostel import Hostel
from tests.support.linux import LinuxGuest
from tests.support.vsock_stream import (
    LIMIT_S,
    checksum,
    connect_by_vhost,
    pattern,
    read_exactly,
    read_to_end,
)

CID = 4321
OTHER_CID = 4322
HOST_CID = 2
STREAM_BYTES = 2 << 20

pytestmark = pytest.mark.skipif(
    not in_lab() and not os.access("/dev/vhost-vsock", os.R_OK | os.W_OK),
    reason="no /dev/vhost-vsock to use: make test-guest runs this in the lab",
)


@pytest.fixture(scope="module")
def linux(hostel: Hostel, guest: Guest) -> Iterator[LinuxGuest]:
    hostel.api.post(
        "/v1/vms?wait=60",
        {
            "name": "vhost",
            "kernel": "debian",
            "initrd": "initrd",
            "cmdline": f"{guest.cmdline} quiet",
            "disks": [{"id": "root", "image": "root"}],
            "vsock": {"cid": CID, "backend": "vhost"},
        },
    )
    linux = LinuxGuest(hostel, guest, "vhost")
    with linux.running():
        yield linux


def in_guest(linux: LinuxGuest, command: str, name: str) -> None:
    """Run a server of the guest in the background, and wait until it listens."""
    linux.ask(f"{command} > /tmp/{name} 2>&1 & until grep -q listening /tmp/{name}; do :; done")


def test_the_vm_tells_its_address_and_no_path(linux: LinuxGuest) -> None:
    assert linux.vm["vsock"] == {"cid": CID, "backend": "vhost", "path": None}
    assert linux.hostel.api.get("/v1/vms/vhost/stats")["vsock"] == {}
    checks = {
        check["name"]: check["status"] for check in linux.hostel.api.get("/v1/host")["checks"]
    }
    assert checks["vhost-vsock"] == "ok"


def test_a_program_of_the_host_talks_to_one_of_the_guest(linux: LinuxGuest) -> None:
    in_guest(linux, "vsock echo 52", "echo")
    with connect_by_vhost(CID, 52) as stream:
        stream.sendall(b"hello, guest")
        assert read_exactly(stream, 12) == b"hello, guest"
        stream.sendall(b"last words")
        stream.shutdown(socket.SHUT_WR)
        assert read_to_end(stream) == b"last words"


def test_a_program_of_the_guest_talks_to_one_of_the_host(linux: LinuxGuest) -> None:
    heard: list[bytes] = []
    callers: list[int] = []
    with socket.socket(socket.AF_VSOCK) as listener:
        listener.bind((socket.VMADDR_CID_ANY, 1234))
        listener.listen()
        listener.settimeout(LIMIT_S)

        def answer() -> None:
            stream, (cid, _) = listener.accept()
            with stream:
                callers.append(cid)
                stream.settimeout(LIMIT_S)
                heard.append(read_to_end(stream))
                stream.sendall(b"and you heard me")

        thread = threading.Thread(target=answer)
        thread.start()
        said = linux.ask(f"echo can you hear me | vsock talk {HOST_CID} 1234")
        thread.join(LIMIT_S)
    assert (callers, heard, said) == ([CID], [b"can you hear me\n"], "and you heard me")


def test_a_port_without_a_listener_refuses_both_ways(linux: LinuxGuest) -> None:
    assert "reset" in linux.sh(f"vsock talk {HOST_CID} 999 < /dev/null").text
    with pytest.raises(ConnectionError):
        connect_by_vhost(CID, 999)


def test_streams_arrive_whole_both_ways(linux: LinuxGuest) -> None:
    in_guest(linux, "vsock sink 2000", "sink")
    data = pattern(STREAM_BYTES)
    with connect_by_vhost(CID, 2000) as stream:
        stream.sendall(data)
        stream.shutdown(socket.SHUT_WR)
        assert read_to_end(stream).decode() == f"{len(data)} {checksum(data):016x}\n"
    in_guest(linux, f"vsock source 2001 {STREAM_BYTES}", "source")
    with connect_by_vhost(CID, 2001) as stream:
        assert read_to_end(stream) == data


def test_streams_survive_a_pause(linux: LinuxGuest) -> None:
    with connect_by_vhost(CID, 52) as stream:
        linux.hostel.api.act("vhost", "pause")
        stream.sendall(b"meanwhile")
        linux.hostel.api.act("vhost", "resume")
        assert read_exactly(stream, 9) == b"meanwhile"


def test_streams_survive_hosteld_and_new_ones_come_without_it(linux: LinuxGuest) -> None:
    with connect_by_vhost(CID, 52) as stream:
        linux.hostel.daemon.kill()
        try:
            stream.sendall(b"alone")
            assert read_exactly(stream, 5) == b"alone"
            with connect_by_vhost(CID, 52) as other:
                other.sendall(b"new")
                assert read_exactly(other, 3) == b"new"
        finally:
            linux.hostel.daemon.start()
        linux.attach(linux.log_end())


def test_a_driver_that_comes_again_is_served_again(linux: LinuxGuest) -> None:
    device = linux.ask("basename /sys/bus/virtio/drivers/vmw_vsock_virtio_transport/virtio*")
    linux.ask(
        "cd /sys/bus/virtio/drivers/vmw_vsock_virtio_transport;"
        f" echo {device} > unbind && echo {device} > bind; cd /"
    )
    with connect_by_vhost(CID, 52) as stream:
        stream.sendall(b"hello again")
        assert read_exactly(stream, 11) == b"hello again"


def test_after_a_reset_old_streams_end_when_written_to_and_new_ones_come(
    linux: LinuxGuest,
) -> None:
    with connect_by_vhost(CID, 52) as stream:
        stream.sendall(b"before")
        assert read_exactly(stream, 6) == b"before"
        offset = linux.log_end()
        linux.hostel.api.act("vhost", "reset")
        linux.attach(offset)
        linux.log_in()
        stream.sendall(b"whom?")
        assert read_to_end(stream) == b""
    in_guest(linux, "vsock echo 52", "echo")
    with connect_by_vhost(CID, 52) as stream:
        stream.sendall(b"hello again")
        assert read_exactly(stream, 11) == b"hello again"


def test_a_killed_vm_ends_its_streams_and_gives_its_cid_back_at_once(linux: LinuxGuest) -> None:
    with connect_by_vhost(CID, 52) as stream:
        linux.hostel.api.act("vhost", "kill")
        with pytest.raises(OSError) as caught:  # noqa: PT011 - its errno is looked at
            read_to_end(stream)
        assert caught.value.errno in (errno.ECONNRESET, errno.ENOTCONN)
    linux.start()


def test_a_cid_that_another_program_has_is_a_conflict_at_start(
    linux: LinuxGuest, hostel: Hostel, guest: Guest
) -> None:
    vm = {
        "name": "second",
        "kernel": "debian",
        "initrd": "initrd",
        "cmdline": guest.cmdline,
        "vsock": {"cid": OTHER_CID, "backend": "vhost"},
    }
    hostel.api.post("/v1/vms?wait=60", vm)
    (theirs,) = open_vsock(VsockRecord(OTHER_CID, "vhost", None))
    try:
        with pytest.raises(ApiFailure, match="in use by another program"):
            hostel.api.act("second", "start")
    finally:
        os.close(theirs)
    hostel.api.act("second", "start")
    hostel.delete("second")
    assert linux.vm["state"] == "running"
