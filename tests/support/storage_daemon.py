# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Disk images in formats, and a qemu-storage-daemon that serves one, for the tests."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from pathlib import Path

# Whatever becomes of the tests, it ends with them.
PROGRAM = ("setpriv", "--pdeathsig", "KILL", "qemu-storage-daemon")
DEADLINE_S = 60.0


def run_qmp(*commands: tuple[str, dict[str, object]]) -> None:
    """Run QMP commands in a storage daemon of their own; a job is waited for."""
    argv = [*PROGRAM, "--chardev", "stdio,id=qmp", "--monitor", "chardev=qmp"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as tool:
        try:
            for name, arguments in [("qmp_capabilities", {}), *commands]:
                _run_one(tool, name, arguments)
        finally:
            tool.kill()


def _run_one(tool: subprocess.Popen[str], name: str, arguments: dict[str, object]) -> None:
    assert tool.stdin is not None
    assert tool.stdout is not None
    tool.stdin.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
    tool.stdin.flush()
    awaited = "concluded" if "job-id" in arguments else None
    while True:
        told = json.loads(tool.stdout.readline())
        assert "error" not in told, told
        if awaited is None and "return" in told:
            return
        if told.get("data", {}).get("status") == awaited:
            return


def make_image(path: Path, size_bytes: int, kind: str = "qcow2") -> Path:
    """Create an image of a format; its content reads as zeros."""
    path.touch()
    options: dict[str, object] = {"driver": kind, "file": "file", "size": size_bytes}
    run_qmp(
        ("blockdev-add", {"driver": "file", "node-name": "file", "filename": str(path)}),
        ("blockdev-create", {"job-id": "create", "options": options}),
    )
    return path


class StorageDaemon:
    """Serves one image over vhost-user until it is killed.

    Args:
        image: of format ``kind``.
        socket_path: where it listens.
        kind: a block driver of QEMU.
        slow_writes: let one write a second through, so that the others are in flight.
        nbd: serve it as the NBD export "disk" instead.
    """

    def __init__(
        self,
        image: Path,
        socket_path: Path,
        kind: str = "qcow2",
        *,
        slow_writes: bool = False,
        nbd: bool = False,
    ) -> None:
        self.socket_path = socket_path
        socket_path.unlink(missing_ok=True)
        slow = [
            *("--object", "throttle-group,id=slow,x-iops-write=1,x-iops-size=512"),
            *("--blockdev", "driver=throttle,node-name=throttled,file=disk,throttle-group=slow"),
        ]
        over_nbd = [
            *("--nbd-server", f"addr.type=unix,addr.path={socket_path}"),
            *("--export", "type=nbd,id=export,node-name=disk,name=disk,writable=on"),
        ]
        over_vhost_user = [
            "--export",
            "type=vhost-user-blk,id=export,writable=on,writethrough=on"
            f",node-name={'throttled' if slow_writes else 'disk'}"
            f",addr.type=unix,addr.path={socket_path}",
        ]
        self.process = subprocess.Popen(
            [
                *PROGRAM,
                *("--blockdev", f"driver=file,node-name=file,filename={image}"),
                *("--blockdev", f"driver={kind},node-name=disk,file=file,discard=unmap"),
                *(slow if slow_writes else []),
                *(over_nbd if nbd else over_vhost_user),
            ],
        )

    def connect(self) -> socket.socket:
        """Return a connection to it, once it listens; it is killed where it never does."""
        try:
            return self._connect()
        except BaseException:
            self.kill()
            raise

    def _connect(self) -> socket.socket:
        due = time.monotonic() + DEADLINE_S
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.connect(str(self.socket_path))
            except OSError:
                sock.close()
                assert time.monotonic() < due, "the storage daemon does not listen"
                assert self.process.poll() is None, "the storage daemon has ended"
                time.sleep(0.01)
            else:
                return sock

    def kill(self) -> None:
        """Kill it with SIGKILL, in the middle of whatever it does."""
        self.process.kill()
        self.process.wait()
