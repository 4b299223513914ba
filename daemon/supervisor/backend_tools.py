# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The programs that serve devices over vhost-user: where they are, and how they are called.

Both get what they serve as descriptors or as one directory, no capability that they do not need,
and no way to gain any. A disk's format is always named: a guest writes the first bytes of a raw
disk, and a guess would let it choose what its host opens.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

from api.errors import HostFailure, Invalid

from .records import DiskRecord, ShareRecord

STORAGE_DAEMON: Final = "qemu-storage-daemon"
# The one that is written in Rust, of Debian 13 and others; then the one that came with QEMU.
_VIRTIOFSD: Final = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd")
_PACKAGES: Final = {
    STORAGE_DAEMON: "apt install qemu-system-common (Debian 12), or qemu-utils",
    "virtiofsd": "apt install qemu-system-common (Debian 12), or virtiofsd",
}
NBD_PORT: Final = 10809

# The header of a qcow2 file up to incompatible_features: QEMU docs/interop/qcow2.txt.
_QCOW2_HEADER: Final = struct.Struct(">4sI8x56xQ")
_QCOW2_MAGIC: Final = b"QFI\xfb"
_QCOW2_EXTERNAL_DATA: Final = 1 << 2


@dataclass(frozen=True, slots=True)
class Command:
    """A program to run.

    Attributes:
        argv: with its path.
        fds: descriptors that it inherits under the same numbers.
    """

    argv: tuple[str, ...]
    fds: tuple[int, ...]


def find_tool(name: str, field: str | None = None) -> str:
    """Return a program's path.

    Raises:
        HostFailure: it is not installed; says which package has it.
    """
    places = _VIRTIOFSD if name == "virtiofsd" else ()
    found = next((path for path in places if os.access(path, os.X_OK)), None) or shutil.which(name)
    if found is None:
        raise HostFailure(
            "tool_missing", f"{name} is not installed: {_PACKAGES[name]}", field=field
        )
    return found


def is_libvhost(virtiofsd: str) -> bool:
    """Whether a virtiofsd is the one of QEMU, which is built on libvhost-user."""
    return virtiofsd == _VIRTIOFSD[1]


def storage_daemon(
    disk: DiskRecord, disk_fd: int | None, qmp_fd: int, listen_fd: int | None
) -> Command:
    """Return how a disk is opened, and served when there is a socket to serve it on.

    Args:
        disk: in a format other than raw.
        disk_fd: its file, open; None for NBD.
        qmp_fd: a connected socket, for questions.
        listen_fd: a listening socket.

    Raises:
        HostFailure: the program is not installed.
    """
    argv = [
        *_confined(disk_fd),
        find_tool(STORAGE_DAEMON),
        *("--chardev", f"socket,id=qmp,fd={qmp_fd}"),
        *("--monitor", "chardev=qmp"),
    ]
    for node in _nodes(disk, disk_fd):
        argv += ["--blockdev", json.dumps({**node, "read-only": disk.read_only})]
    fds = [qmp_fd]
    if disk_fd is not None:
        fds.append(disk_fd)
    if listen_fd is not None:
        fds.append(listen_fd)
        # Write-through: see devices/virtio/vhost_user/device.py, VhostUserBlk.
        writable = "off" if disk.read_only else "on,writethrough=on"
        argv += [
            "--export",
            f"type=vhost-user-blk,id=export,node-name=disk,writable={writable}"
            f",addr.type=fd,addr.str={listen_fd}",
        ]
    return Command(tuple(argv), tuple(fds))


def _nodes(disk: DiskRecord, disk_fd: int | None) -> list[dict[str, Any]]:
    """Return QEMU's block nodes from the lowest up; the last is called disk."""
    if disk_fd is None:
        return [{"driver": "nbd", "node-name": "disk", **parse_nbd(disk.path)}]
    is_block = stat.S_ISBLK(os.fstat(disk_fd).st_mode)
    file = {
        "driver": "host_device" if is_block else "file",
        "node-name": "file",
        # hosteld holds the lock, through this very descriptor and the worker's.
        "filename": f"/proc/self/fd/{disk_fd}",
        "locking": "off",
        "cache": {"direct": disk.cache == "none"},
    }
    top: dict[str, Any] = {"driver": disk.format, "node-name": "disk", "file": "file"}
    if disk.format in ("qcow2", "vmdk"):
        top["backing"] = None
    if not disk.read_only:
        for node in (file, top):
            node["discard"] = "unmap"
    return [file, top]


def parse_nbd(uri: str) -> dict[str, Any]:
    """Return QEMU's options for nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH.

    Raises:
        ValueError: it is neither.
    """
    parts = urlsplit(uri)
    export = unquote(parts.path.removeprefix("/"))
    options: dict[str, Any] = {"export": export} if export else {}
    if parts.scheme == "nbd" and parts.hostname and not parts.query:
        port = str(parts.port or NBD_PORT)
        options["server"] = {"type": "inet", "host": parts.hostname, "port": port}
    elif parts.scheme == "nbd+unix" and not parts.netloc:
        query = parse_qs(parts.query, strict_parsing=True)
        sockets = query.pop("socket", [])
        if query or len(sockets) != 1 or not sockets[0].startswith("/"):
            raise ValueError(f"{uri}: give it one ?socket= with an absolute path")
        options["server"] = {"type": "unix", "path": sockets[0]}
    else:
        raise ValueError(
            f"{uri}: must be nbd://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=/PATH"
        )
    return options


def check_header(disk: DiskRecord, disk_fd: int, field: str) -> None:
    """Refuse a qcow2 file whose data lie in another file, before anything opens that.

    Raises:
        Invalid: they do, or it is no qcow2 file.
    """
    if disk.format != "qcow2":
        return
    # Opened once more, since the descriptor may be one for whole blocks only.
    with Path(f"/proc/self/fd/{disk_fd}").open("rb") as file:
        data = file.read(_QCOW2_HEADER.size).ljust(_QCOW2_HEADER.size, b"\0")
    magic, version, incompatible = _QCOW2_HEADER.unpack(data)
    if magic != _QCOW2_MAGIC:
        raise Invalid("disk_format", f"{disk.path}: is no qcow2 file", field=field)
    if version >= 3 and incompatible & _QCOW2_EXTERNAL_DATA:
        raise Invalid(
            "disk_external", f"{disk.path}: its data lie in another file; convert it", field=field
        )


def check_image(disk: DiskRecord, image: dict[str, Any], field: str) -> int:
    """Return an open image's virtual size in bytes.

    Args:
        disk: what it is of.
        image: ImageInfo of QMP's query-named-block-nodes.
        field: of the request, for the error.

    Raises:
        Invalid: it reads other files than its own.
    """
    if "backing-filename" in image:
        raise Invalid(
            "disk_backing",
            f"{disk.path}: is an overlay on {image['backing-filename']}, which is not opened;"
            " convert it into one image: qemu-img convert",
            field=field,
        )
    return int(image["virtual-size"])


def virtiofsd(program: str, share: ShareRecord, listen_fd: int) -> Command:
    """Return how a directory is served by one of the virtiofsds.

    Raises:
        HostFailure: hosteld is not root.
    """
    if os.geteuid() != 0:
        raise HostFailure(
            "share_needs_root",
            f"share {share.tag}: virtiofsd needs root to keep files' owners; run hosteld as root",
        )
    if is_libvhost(program):
        argv = [program, f"--fd={listen_fd}", "-o", f"source={share.path}"]
        argv += ["-o", "log_level=warn"]
    else:
        argv = [program, f"--fd={listen_fd}", f"--shared-dir={share.path}", "--log-level=warn"]
    if share.read_only:
        # In a mount namespace of its own, so that it holds whatever the program does.
        script = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && shift && exec "$@"'
        unshare = ("unshare", "--mount", "--propagation", "private")
        argv = [*unshare, "sh", "-c", script, "sh", share.path, *argv]
    # It sandboxes itself: namespaces, seccomp, and few capabilities, which the bounding set has.
    return Command(("setpriv", "--no-new-privs", *argv), (listen_fd,))


def _confined(disk_fd: int | None) -> list[str]:
    """Return the prefix that takes a program's privileges away."""
    prefix = ["setpriv", "--no-new-privs"]
    if os.geteuid() != 0:
        return prefix  # it has none
    keep = ""
    if disk_fd is not None and os.fstat(disk_fd).st_uid != 0:
        # The descriptor is opened once more by its name in /proc: root may, by this alone.
        keep = ",+dac_override"
    return [
        *prefix,
        "--inh-caps=-all",
        "--ambient-caps=-all",
        f"--bounding-set=-all{keep}",
        "--",
    ]


def check_share(path: str, field: str) -> None:
    """Refuse what cannot be shared.

    Raises:
        Invalid: it is no directory.
    """
    if "," in path:
        raise Invalid("share_path", f"{path}: virtiofsd takes no comma in a path", field=field)
    if not Path(path).is_dir():
        raise Invalid("share_missing", f"{path}: no such directory", field=field)
