# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Where a VM's vsock sockets are, who owns them, and how long they stay."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from api.errors import ApiError, HostFailure
from api.models.vms import Vm, VmAction
from daemon.supervisor import vsock
from daemon.supervisor.records import VsockRecord
from daemon.supervisor.service import Supervisor
from tests.support.supervisor import CALL, Harness


@pytest.fixture
def harness() -> Iterator[Harness]:
    """A directory with a path short enough for sockets that others connect to."""
    with tempfile.TemporaryDirectory(prefix="hv-") as directory:
        made = Harness(Path(directory))
        try:
            yield made
        finally:
            made.end()


def path_of(vm: Vm) -> Path:
    assert vm.vsock is not None
    assert vm.vsock.path is not None
    return Path(vm.vsock.path)


def test_the_directory_is_there_before_the_first_start(harness: Harness) -> None:
    async def scenario(_: Supervisor) -> None:
        path = path_of(await harness.create("a", vsock={}))
        assert path.parent.is_relative_to(harness.layout.runtime)
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert not path.exists()

    harness.run(scenario)


def test_the_socket_of_a_started_vm_takes_connections(harness: Harness) -> None:
    async def scenario(_: Supervisor) -> None:
        vm = await harness.start("a", vsock={"cid": 99})
        assert vm.vsock is not None
        assert (vm.vsock.cid, vm.vsock.backend) == (99, "unix")
        with socket.socket(socket.AF_UNIX) as program:
            program.connect(str(path_of(vm)))

    harness.run(scenario)


def test_what_the_operator_put_there_stays_until_the_vm_is_deleted(harness: Harness) -> None:
    async def scenario(supervisor: Supervisor) -> None:
        path = path_of(await harness.create("a", vsock={}))
        theirs = path.with_name("v.sock_52")
        with socket.socket(socket.AF_UNIX) as program:
            program.bind(str(theirs))
        for _ in range(2):
            await harness.act(VmAction.START)
            assert path.is_socket()
            await harness.act(VmAction.KILL)
            assert theirs.is_socket()
        await supervisor.delete_vm("a", False, CALL)
        assert not path.parent.exists()

    harness.run(scenario)


def test_a_socket_deeper_than_an_address_holds_is_bound(harness: Harness) -> None:
    async def scenario(_: Supervisor) -> None:
        path = path_of(await harness.start("a", vsock={}))
        assert len(str(path)) > 107
        assert path.is_socket()

    harness.layout = type(harness.layout)(harness.layout.state, harness.path / ("deep" * 20))
    harness.set(runtime_dir=str(harness.layout.runtime))
    harness.run(scenario)


def test_a_restarted_host_gets_its_directories_back_and_loses_strays(harness: Harness) -> None:
    made: list[Path] = []

    async def create(_: Supervisor) -> None:
        made.append(path_of(await harness.create("a", vsock={})))

    async def look(_: Supervisor) -> None:
        assert made[0].parent.is_dir()
        assert not stray.exists()

    harness.run(create)
    shutil.rmtree(harness.layout.runtime)
    stray = harness.layout.vm_vsock("0f0f0f0f-0000-4000-8000-000000000000")
    stray.mkdir(parents=True)
    harness.layout.runtime.chmod(0o700)
    harness.run(look)


def test_a_socket_that_cannot_be_bound_fails_the_start_and_says_why(harness: Harness) -> None:
    async def scenario(_: Supervisor) -> None:
        path = path_of(await harness.create("a", vsock={}))
        path.mkdir()
        with pytest.raises(HostFailure, match=f"{path}: Is a directory") as caught:
            await harness.act(VmAction.START)
        assert (caught.value.code, caught.value.field) == ("vsock_failed", "vsock")

    before = os.umask(0o077)
    harness.run(scenario)
    os.umask(before)


def test_a_vm_with_vhost_has_no_directory(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vsock, "_VHOST_DEVICE", "/dev/none")

    async def scenario(supervisor: Supervisor) -> None:
        vm = await harness.create("a", vsock={"backend": "vhost"})
        assert vm.vsock is not None
        assert vm.vsock.path is None
        assert not harness.layout.vm_vsock(vm.id).exists()
        with pytest.raises(HostFailure, match="modprobe vhost_vsock") as caught:
            await harness.act(VmAction.START)
        assert (caught.value.code, caught.value.field) == ("vhost_unavailable", "vsock.backend")
        await supervisor.delete_vm("a", False, CALL)

    harness.run(scenario)


@pytest.mark.parametrize(
    ("number", "code"), [(errno.EADDRINUSE, "cid_in_use"), (errno.ENOTTY, "vsock_failed")]
)
def test_what_vhost_refuses_is_told(
    monkeypatch: pytest.MonkeyPatch, number: int, code: str
) -> None:
    def refuse(*_: object) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(vsock, "_VHOST_DEVICE", os.devnull)
    monkeypatch.setattr("daemon.supervisor.vsock.fcntl.ioctl", refuse)
    with pytest.raises(ApiError) as caught:
        vsock.open_vsock(VsockRecord(7, "vhost", None))
    assert caught.value.code == code
