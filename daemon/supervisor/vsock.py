# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The host's side of a VM's vsock device: a directory of Unix sockets, or vhost-vsock.

    <directory>/v.sock      hosteld binds it at each start; programs of the host connect to it
    <directory>/v.sock_52   a program of the host binds it; guests that connect to port 52 reach it

The directory lives as long as the VM, not as its worker, so that a program may listen before the
VM starts and goes on listening when it is started again.

The worker gets the listening socket and the directory, and connects by itself: a guest can reach
the host's programs while hosteld is away. The directory's descriptor lets it name sockets in there
without a path of the host or a /proc; a jail will hand it over as a mount of its own (open_tree(2)
with OPEN_TREE_CLONE), in which ".." leads nowhere.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import struct
from pathlib import Path
from typing import Final

from api.errors import Conflict, HostFailure

from .records import VmRecord, VsockRecord
from .worker_files import short_path

SOCKET_NAME: Final = "v.sock"
# Programs that connect while the guest's driver is not there yet wait in it.
BACKLOG: Final = 1024
_VHOST_DEVICE: Final = "/dev/vhost-vsock"
# Linux include/uapi/linux/vhost.h: VHOST_VSOCK_SET_GUEST_CID is _IOW(0xaf, 0x60, __u64).
_SET_GUEST_CID: Final = (1 << 30) | (8 << 16) | (0xAF << 8) | 0x60


def make_directory(record: VmRecord) -> None:
    """Make the directory of a VM's sockets; others have none.

    Raises:
        HostFailure: it cannot be made.
    """
    if record.vsock is None or record.vsock.path is None:
        return
    directory = Path(record.vsock.path).parent
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as err:
        raise HostFailure("vsock_failed", f"{directory}: {err.strerror}", field="vsock") from err


def remove_directory(record: VmRecord) -> None:
    """Remove the directory of a VM's sockets with what is in it."""
    if record.vsock is not None and record.vsock.path is not None:
        shutil.rmtree(Path(record.vsock.path).parent, ignore_errors=True)


def open_vsock(vsock: VsockRecord) -> list[int]:
    """Open what a vsock device needs: a listening socket and the directory, or vhost-vsock.

    Raises:
        HostFailure: the socket cannot be bound, or the host has no vhost-vsock.
        Conflict: another program of the host has the CID.

    Threads: any; may block while the kernel loads the module.
    """
    if vsock.path is None:
        return [_open_vhost(vsock.cid)]
    try:
        return _open_unix(vsock.path)
    except OSError as err:
        raise HostFailure("vsock_failed", f"{vsock.path}: {err.strerror}", field="vsock") from err


def _open_unix(path: str) -> list[int]:
    directory = Path(path).parent
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)  # noqa: PTH108 - of the worker before, which has ended
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
        with short_path(directory, SOCKET_NAME) as name:
            sock.bind(name)
        sock.listen(BACKLOG)
        flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        directory_fd = os.open(directory, flags)
        return [sock.detach(), directory_fd]


def _open_vhost(cid: int) -> int:
    try:
        fd = os.open(_VHOST_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as err:
        raise HostFailure(
            "vhost_unavailable",
            f"{_VHOST_DEVICE}: {err.strerror}; load it with: modprobe vhost_vsock, check its"
            " permissions, or make the VM with backend unix",
            field="vsock.backend",
        ) from err
    try:
        fcntl.ioctl(fd, _SET_GUEST_CID, struct.pack("=Q", cid))
    except OSError as err:
        os.close(fd)
        if err.errno == errno.EADDRINUSE:
            raise Conflict(
                "cid_in_use",
                f"cid {cid} is in use by another program of this host; end that one, or make the"
                " VM with another cid",
                field="vsock.cid",
            ) from err
        raise HostFailure(
            "vsock_failed", f"{_VHOST_DEVICE}: {err.strerror}", field="vsock"
        ) from err
    return fd
