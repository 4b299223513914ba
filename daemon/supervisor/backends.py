# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Back ends of VMs' devices: what hosteld runs beside each worker.

They live as long as their VM's worker, whatever becomes of hosteld: one that comes later finds
them again. What they serve is told to the worker as one connected socket for each device.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import struct
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from api.errors import HostFailure

from . import qmp
from .backend_processes import BackendProcess, Owner, find_all, spawn
from .backend_tools import (
    Command,
    check_header,
    check_image,
    find_tool,
    is_libvhost,
    storage_daemon,
    virtiofsd,
)
from .dirs import Layout
from .records import DiskRecord, ShareRecord
from .worker_files import short_path

log = logging.getLogger(__name__)

# It opens an image and answers in some 20 ms; an emulated host takes a hundred times that.
START_TIMEOUT_S: Final = 20.0
END_TIMEOUT_S: Final = 10.0
# A program that fails has said why, and ends within this.
LAST_LINES_S: Final = 1.0
LOG_TAIL_BYTES: Final = 2048
LOG_TAIL_LINES: Final = 3

# GET_FEATURES of vhost-user as a message, and its answer's header: QEMU
# docs/interop/vhost-user.rst.
_HEADER: Final = struct.Struct("<III")
_GET_FEATURES: Final = _HEADER.pack(1, 1, 0)
_FEATURES: Final = _HEADER.pack(1, 5, 8)


@dataclass(frozen=True, slots=True)
class Served:
    """A device that is being served.

    Attributes:
        sock: connected to the back end; the caller's.
        is_libvhost: the back end is built on libvhost-user.
    """

    sock: socket.socket
    is_libvhost: bool


class Backends:
    """Starts back ends and ends them.

    Threads: the event loop's.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._processes: list[BackendProcess] = []

    # --- start

    async def serve_disk(
        self, vm_id: str, disk: DiskRecord, field: str, disk_fd: int | None
    ) -> Served:
        """Have a disk in a format served.

        Args:
            vm_id: of the VM, which has no other back end for this disk.
            disk: in a format other than raw.
            field: of the request, for errors.
            disk_fd: its file, open and locked; the caller's. None for NBD.

        Raises:
            ApiError: the image or the program is not usable.
            OSError: no descriptor, no process left.
        """
        owner = self._owner(vm_id, disk.id)
        owner.runtime.mkdir(mode=0o700, exist_ok=True)
        with self._listening() as (listener, sock):
            await self._open_disk(owner, disk, field, disk_fd, listener)
        return Served(sock, is_libvhost=True)

    async def measure(self, vm_id: str, disk: DiskRecord, field: str, disk_fd: int | None) -> int:
        """Return the virtual size, in bytes, of a disk in a format; nobody is served.

        Raises:
            ApiError, OSError: as serve_disk().
        """
        owner = self._owner(vm_id, f"{disk.id}:measure")
        try:
            return await self._open_disk(owner, disk, field, disk_fd, None)
        finally:
            self.end(vm_id, owner.device_id)
            await self.gone(vm_id, owner.device_id)

    async def serve_share(self, vm_id: str, share: ShareRecord, field: str) -> Served:
        """Have a directory served; as serve_disk()."""
        owner = self._owner(vm_id, share.device_id)
        owner.runtime.mkdir(mode=0o700, exist_ok=True)
        with self._listening() as (listener, sock), self._log(owner) as log_fd:
            program = find_tool("virtiofsd")
            command = virtiofsd(program, share, listener.fileno())
            with self._spawned(owner, command, log_fd) as process:
                listener.close()
                try:
                    async with asyncio.timeout(START_TIMEOUT_S):
                        await _ask_features(sock)
                except (TimeoutError, OSError) as err:
                    await _fail(process, log_fd, f"share {share.tag}: virtiofsd", err, field)
        return Served(sock, is_libvhost(program))

    async def _open_disk(
        self,
        owner: Owner,
        disk: DiskRecord,
        field: str,
        disk_fd: int | None,
        listener: socket.socket | None,
    ) -> int:
        if disk_fd is not None:
            check_header(disk, disk_fd, field)
        ours, theirs = socket.socketpair()
        with ours, theirs, self._log(owner) as log_fd:
            listen_fd = None if listener is None else listener.fileno()
            command = storage_daemon(disk, disk_fd, theirs.fileno(), listen_fd)
            with self._spawned(owner, command, log_fd) as process:
                theirs.close()
                try:
                    async with asyncio.timeout(START_TIMEOUT_S):
                        nodes = await qmp.ask(ours, "query-named-block-nodes")
                    return check_image(disk, _image_of(nodes), field)
                except (TimeoutError, qmp.QmpError, KeyError, TypeError, ValueError) as err:
                    what = f"disk {disk.id}: {disk.path} as {disk.format}"
                    await _fail(process, log_fd, what, err, field)

    def _owner(self, vm_id: str, device_id: str) -> Owner:
        return Owner(self._layout.vm_runtime(vm_id), device_id)

    @contextlib.contextmanager
    def _spawned(self, owner: Owner, command: Command, log_fd: int) -> Iterator[BackendProcess]:
        """Yield a new process; it ends if what is done with it fails."""
        process = spawn(owner, command, log_fd)
        self._keep(process)
        log.info("back end started mark=%s pid=%d", owner.mark, process.pid)
        try:
            yield process
        except BaseException:
            process.end()
            raise

    def _keep(self, process: BackendProcess) -> None:
        self._processes.append(process)
        process.ended.add_done_callback(lambda _: self._processes.remove(process))

    @contextlib.contextmanager
    def _log(self, owner: Owner) -> Iterator[int]:
        """Yield a file for what a program says; it stays as long as the VM has a worker."""
        path = self._log_path(owner.runtime.name, owner.device_id)
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            log_fd = os.open(path, flags, 0o600)
        except FileNotFoundError:  # the VM is only being planned
            log_fd = os.memfd_create("backend-log", os.MFD_CLOEXEC)
        try:
            yield log_fd
        finally:
            os.close(log_fd)

    @contextlib.contextmanager
    def _listening(self) -> Iterator[tuple[socket.socket, socket.socket]]:
        """Yield a listening socket and the one connection that there will ever be to it.

        Its path is gone before anybody else could use it. The listener is closed at the end, the
        connection is the caller's.
        """
        name = f"backend-{uuid.uuid4()}.sock"
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with (
                socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener,
                short_path(self._layout.runtime, name) as path,
            ):
                try:
                    listener.bind(path)
                    listener.listen(1)
                    sock.connect(path)
                finally:
                    (self._layout.runtime / name).unlink(missing_ok=True)
                yield listener, sock
        except BaseException:
            sock.close()
            raise

    # --- end

    def describe_end(self, vm_id: str, device_id: str) -> str:
        """Return the last lines of a back end that is lost; empty when it said nothing."""
        try:
            with self._log_path(vm_id, device_id).open("rb") as file:
                return _tail(file.fileno())
        except FileNotFoundError:
            return ""

    def _log_path(self, vm_id: str, device_id: str) -> Path:
        return self._layout.vm_runtime(vm_id) / f"backend-{device_id.replace(':', '-')}.log"

    def end(self, vm_id: str, device_id: str | None = None) -> None:
        """Have the back ends of a VM end, or those of one of its devices."""
        for process in self._of(vm_id, device_id):
            process.end()

    async def gone(self, vm_id: str, device_id: str | None = None) -> None:
        """Wait until those that end have gone, and with them their locks."""
        if waiting := {process.ended for process in self._of(vm_id, device_id)}:
            _, late = await asyncio.wait(waiting, timeout=END_TIMEOUT_S)
            if late:
                log.error("back ends do not end vm=%s count=%d", vm_id, len(late))

    def _of(self, vm_id: str, device_id: str | None) -> list[BackendProcess]:
        runtime = self._layout.vm_runtime(vm_id)
        return [
            process
            for process in self._processes
            if process.owner.runtime == runtime and device_id in (None, process.owner.device_id)
        ]

    # --- across lives of hosteld

    def find(self) -> None:
        """Take over what an earlier hosteld started."""
        for process in find_all(self._layout.runtime):
            log.info("back end found mark=%s pid=%d", process.owner.mark, process.pid)
            self._keep(process)

    async def end_all_but(self, vm_ids: set[str]) -> None:
        """End the back ends of VMs that have no worker."""
        keep = {self._layout.vm_runtime(vm_id) for vm_id in vm_ids}
        strays = [process for process in self._processes if process.owner.runtime not in keep]
        for process in strays:
            log.warning("back end without VM is ended mark=%s", process.owner.mark)
            process.end()
        if strays:
            await asyncio.wait({process.ended for process in strays}, timeout=END_TIMEOUT_S)

    def release(self) -> None:
        """Let all live on without this hosteld."""
        for process in self._processes:
            process.release()


async def _fail(
    process: BackendProcess, log_fd: int, what: str, err: Exception, field: str
) -> NoReturn:
    """Say what a program said that did not come up.

    Raises:
        HostFailure: always.
    """
    await asyncio.wait({process.ended}, timeout=LAST_LINES_S)
    said = _tail(log_fd)
    if not said and isinstance(err, TimeoutError):
        said = f"did not come up within {START_TIMEOUT_S:g} s"
    raise HostFailure("backend_failed", f"{what}: {said or err}", field=field) from err


def _image_of(nodes: list[dict[str, Any]]) -> dict[str, Any]:
    image: dict[str, Any] = {node["node-name"]: node["image"] for node in nodes}["disk"]
    return image


async def _ask_features(sock: socket.socket) -> None:
    """See that a vhost-user back end answers; what it answers is the worker's to check.

    Raises:
        OSError: it hung up, or is no such thing.
    """
    loop = asyncio.get_running_loop()
    sock.setblocking(False)
    await loop.sock_sendall(sock, _GET_FEATURES)
    answer = b""
    while len(answer) < _HEADER.size + 8:
        piece = await loop.sock_recv(sock, _HEADER.size + 8 - len(answer))
        if not piece:
            raise OSError(errno.ECONNRESET, "it hung up")
        answer += piece
    if not answer.startswith(_FEATURES):
        raise OSError(errno.EPROTO, "it does not speak vhost-user")


async def connect_switch(path: str, what: str, field: str) -> socket.socket:
    """Connect to a vhost-user socket of somebody else's.

    Raises:
        HostFailure: nobody listens there, or what does is no vhost-user back end.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    with contextlib.ExitStack() as undo:
        undo.callback(sock.close)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await asyncio.get_running_loop().sock_connect(sock, path)
                await _ask_features(sock)
        except (OSError, TimeoutError) as err:
            text = getattr(err, "strerror", None) or f"no answer within {START_TIMEOUT_S:g} s"
            raise HostFailure("backend_failed", f"{what}: {path}: {text}", field=field) from err
        undo.pop_all()
    return sock


def _tail(log_fd: int) -> str:
    size = os.fstat(log_fd).st_size
    text = os.pread(log_fd, LOG_TAIL_BYTES, max(0, size - LOG_TAIL_BYTES)).decode(errors="replace")
    return "; ".join(line[:300] for line in text.splitlines()[-LOG_TAIL_LINES:])
