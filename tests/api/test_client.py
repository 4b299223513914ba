# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The client library, against the real server."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from api.client import HostelClient, OperationFailed, Unreachable
from api.endpoint import Endpoint, find_endpoint
from api.errors import Conflict, Internal, Invalid, NotFound, Unauthorized
from api.models.common import ObjectRef
from api.models.resources import ImageImport, KernelImport, OperationState
from api.models.vms import (
    DiskCreate,
    DiskPatch,
    StopRequest,
    Vm,
    VmAction,
    VmCreate,
    VmPatch,
    VmState,
)
from api.terminal import open_console
from tests.api.conftest import TOKEN
from tests.api.live import LiveServer

VM = ObjectRef(kind="vm", id="1", name="web-1")


@pytest.fixture
def hostel(live: LiveServer) -> Iterator[HostelClient]:
    with HostelClient(Endpoint(socket=live.path)) as client:
        yield client


def make(hostel: HostelClient, name: str = "web-1", *, start: bool = False) -> Vm:
    disks = [DiskCreate(id="root", image="debian")]
    wanted = VmCreate(name=name, kernel="debian", disks=disks, start=start)
    return hostel.settle(hostel.create_vm(wanted), Vm)


def test_vm_lives_its_life(hostel: HostelClient) -> None:
    vm = make(hostel)
    assert hostel.get_vm("web-1") == vm
    assert hostel.patch_vm(vm.id, VmPatch(vcpus=2)).vcpus == 2
    assert hostel.patch_disk(vm.id, "root", DiskPatch(size_mib=8)).disks[0].size_bytes == 8 << 20
    assert hostel.patch_disk(vm.id, "root", DiskPatch(path="/srv/b")).disks[0].path == "/srv/b"
    started = hostel.settle(hostel.act_on_vm("web-1", VmAction.START), Vm)
    assert started.state is VmState.RUNNING
    assert hostel.vm_stats("web-1").vcpu_exits == {"pio": 1}
    hostel.act_on_vm("web-1", VmAction.STOP, StopRequest(timeout_s=1))
    assert hostel.delete_vm("web-1") is None
    assert hostel.list_vms() == []


def test_lists_are_read_page_by_page(hostel: HostelClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.client.PAGE_LIMIT", 1)
    for name in ("b", "a", "c"):
        make(hostel, name)
    assert [vm.name for vm in hostel.list_vms()] == ["a", "b", "c"]


def test_refusal_is_raised_as_what_it_is(hostel: HostelClient) -> None:
    with pytest.raises(NotFound, match="vm none is not there"):
        hostel.get_vm("none")
    make(hostel)
    with pytest.raises(Conflict) as caught:
        hostel.act_on_vm("web-1", VmAction.PAUSE)
    assert (caught.value.state, caught.value.allowed) == ("stopped", ["start"])
    with pytest.raises(Invalid) as invalid:
        hostel.upload_kernel("A", [b"x"])
    assert invalid.value.field == "name"


def test_operation_is_waited_for(live: LiveServer, hostel: HostelClient) -> None:
    operation = live.service.operation("image.import", VM)
    live.run(live.service.finish(operation.id, OperationState.SUCCEEDED))
    assert hostel.finish(operation).state is OperationState.SUCCEEDED
    assert hostel.list_operations()[0].id == operation.id


def test_cancelled_operation_is_an_error(live: LiveServer, hostel: HostelClient) -> None:
    operation = live.service.operation("image.import", VM)
    hostel.cancel_operation(operation.id)
    with pytest.raises(OperationFailed, match=r"image\.import was cancelled"):
        hostel.finish(operation)


def test_kernels_and_images_are_imported_and_uploaded(hostel: HostelClient) -> None:
    hostel.import_kernel(KernelImport(name="debian", path="/boot/vmlinuz"))
    hostel.upload_kernel("tiny", iter([b"\x7fELF", b"rest"]))
    assert [kernel.size_bytes for kernel in hostel.list_kernels()] == [1, 8]
    hostel.delete_kernel("tiny")
    hostel.import_image(ImageImport(name="debian", path="/srv/debian.raw"))
    hostel.upload_image("initrd", [b"x"], kind="initrd")
    assert [image.kind for image in hostel.list_images()] == ["disk", "initrd"]
    assert hostel.get_image("debian").name == "debian"
    hostel.delete_image("debian")
    assert hostel.get_kernel("debian").format == "elf"


def test_log_is_followed(live: LiveServer, hostel: HostelClient) -> None:
    make(hostel, start=True)
    live.run(live.service.say("web-1", b"login: "))
    pieces = hostel.follow_log("web-1")
    assert next(pieces) == b"login: "
    live.run(live.service.say("web-1", b"root"))
    assert next(pieces) == b"root"
    assert hostel.read_log("web-1", offset=-4) == (7, b"root", 11)
    assert hostel.type_into("web-1", b"ls\n") == 3


def test_events_are_followed_from_a_cursor(live: LiveServer, hostel: HostelClient) -> None:
    for kind in ("a", "b"):
        live.run(live.service.happen(kind, VM))
    events = hostel.follow_events(after=1)
    assert next(events).type == "b"
    live.run(live.service.happen("c", VM))
    assert next(events).id == 3
    assert [event.id for event in hostel.list_events(after=2)] == [3]


def test_host_is_described(hostel: HostelClient) -> None:
    assert hostel.host().tier == "direct"


def test_token_is_sent_over_tcp(live: LiveServer) -> None:
    url = f"http://127.0.0.1:{live.port}"
    with HostelClient(Endpoint(url=url, token=TOKEN)) as client:
        assert client.list_vms() == []
    with HostelClient(Endpoint(url=url)) as client, pytest.raises(Unauthorized):
        client.list_vms()


def test_no_daemon_is_told_with_its_place(tmp_path: Path) -> None:
    path = str(tmp_path / "none.sock")
    with HostelClient(Endpoint(socket=path)) as client, pytest.raises(Unreachable, match=path):
        client.list_vms()


def test_daemon_that_stops_ends_the_events(live: LiveServer, hostel: HostelClient) -> None:
    events = hostel.follow_events(after=0)
    live.run(live.service.happen("a", VM))
    assert next(events).id == 1
    live.begin_stop()
    assert list(events) == []


OTHERS = [
    (b"404 Not Found\r\nContent-Length: 4\r\n\r\nnope", "HTTP 404, not from hosteld: nope"),
    (b"200 OK\r\nContent-Length: 2\r\n\r\n{}", "/v1/vms: the reply is no Page"),
]


@pytest.mark.parametrize(("answered", "told"), OTHERS)
def test_answers_of_something_else_are_told(tmp_path: Path, answered: bytes, told: str) -> None:
    path = str(tmp_path / "other.sock")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        other.listen()

        def answer() -> None:
            with other.accept()[0] as peer:
                peer.recv(65536)
                peer.sendall(b"HTTP/1.1 " + answered)

        thread = threading.Thread(target=answer)
        thread.start()
        with (
            HostelClient(Endpoint(socket=path)) as client,
            pytest.raises(Internal, match=re.escape(told)),
        ):
            client.list_vms()
        thread.join()


@pytest.mark.parametrize(
    ("environ", "uid", "expected"),
    [
        ({}, 0, Endpoint(socket="/run/hostel/hostel.sock")),
        (
            {"XDG_RUNTIME_DIR": "/run/user/7"},
            7,
            Endpoint(socket="/run/user/7/hostel/hostel.sock"),
        ),
        ({}, 7, Endpoint(socket="/tmp/hostel-7/hostel.sock")),
        ({"XDG_RUNTIME_DIR": "relative"}, 7, Endpoint(socket="/tmp/hostel-7/hostel.sock")),
        ({"HOSTEL_SOCKET": "/a", "HOSTEL_URL": ""}, 0, Endpoint(socket="/a")),
        (
            {"HOSTEL_URL": "http://localhost:1/", "HOSTEL_SOCKET": "/a", "HOSTEL_TOKEN": "t"},
            0,
            Endpoint(url="http://localhost:1/", token="t"),
        ),
    ],
)
def test_environment_says_where_the_daemon_is(
    environ: dict[str, str], uid: int, expected: Endpoint
) -> None:
    nowhere = Path("/run/hostel/hostel.sock")
    assert find_endpoint(environ, uid, system_socket=nowhere) == expected


def test_user_without_a_daemon_uses_the_systems(live: LiveServer) -> None:
    found = find_endpoint({"XDG_RUNTIME_DIR": "/nowhere"}, 7, system_socket=Path(live.path))
    assert found == Endpoint(socket=live.path)


def test_options_go_before_the_environment() -> None:
    environ = {"HOSTEL_URL": "http://localhost:1", "HOSTEL_TOKEN": "t"}
    assert find_endpoint(environ, 0, socket="/a") == Endpoint(socket="/a")
    assert find_endpoint(environ, 0, url="http://[::1]:2").base_url == "http://[::1]:2"


@pytest.mark.parametrize("ref", ["web?", "web#", "web%", "web?force=true", "web 1"])
def test_name_that_cannot_be_never_reaches_another_vm(hostel: HostelClient, ref: str) -> None:
    make(hostel, "web")
    with pytest.raises(Invalid):
        hostel.delete_vm(ref)
    with pytest.raises(Invalid), open_console(hostel.endpoint, ref):
        pass
    assert [vm.name for vm in hostel.list_vms()] == ["web"]


@pytest.mark.parametrize("ref", ["", ".", "..", "web/stats", "../vms/web"])
def test_name_that_would_change_the_path_is_refused(hostel: HostelClient, ref: str) -> None:
    make(hostel, "web")
    for call in (hostel.get_vm, hostel.delete_vm, hostel.get_kernel, hostel.get_operation):
        with pytest.raises(Invalid, match="is no name and no id"):
            call(ref)
    with (
        pytest.raises(Invalid, match="is no name and no id"),
        open_console(hostel.endpoint, ref),
    ):
        pass
    assert [vm.name for vm in hostel.list_vms()] == ["web"]
