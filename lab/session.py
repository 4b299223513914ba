# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""One emulated host: started, found again by a later command, and taken down."""

import contextlib
import ctypes
import fcntl
import json
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from lab import images, kernel, qemu, tools, tree
from lab.client import Endpoint
from lab.errors import LabError
from lab.layout import Layout

START_LIMIT_S: Final = 180.0
STOP_LIMIT_S: Final = 15.0
POLL_S: Final = 0.02
SCRATCH_MIB: Final = 16384  # sparse
PR_SET_PDEATHSIG: Final = 1
LIBC: Final = ctypes.CDLL(None)  # loaded here, not between fork and exec
HERE: Final = Path(__file__).parent
TREE_FILE: Final = "tree.json"


@dataclass(frozen=True)
class Options:
    """What the person may choose about a lab."""

    memory_mib: int = 3072
    cpus: int = 2
    icount: bool = False
    out: Path | None = None
    forwards: tuple[qemu.Forward, ...] = ()
    idle_minutes: float = 0  # 0: no limit
    disk: Path | None = None  # a raw file: the disk with the serial number "disk"


@dataclass(frozen=True)
class Running:
    """A lab that is up. `start_ticks` tells its process from a later one of the same id."""

    pid: int
    start_ticks: int
    port: int
    token: str = field(repr=False)
    boot_s: float
    options: dict[str, object]

    @property
    def endpoint(self) -> Endpoint:
        """Where its agent listens."""
        return Endpoint(self.port, self.token)


def start_ticks(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot, or None if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name, in parentheses, may hold spaces; field 22 is the 20th after it. Z is dead.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] == "Z" else int(fields[19])


class Session:
    """The run directory of a lab. At most one lab runs on it: QEMU holds its lock file."""

    def __init__(self, layout: Layout, directory: Path) -> None:
        self.layout = layout
        self.directory = directory

    def find(self) -> Running | None:
        """Return the lab that runs here, if one does; forget one that died."""
        state = self.directory / "state.json"
        try:
            running = Running(**json.loads(state.read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None
        if start_ticks(running.pid) == running.start_ticks:
            return running
        state.unlink(missing_ok=True)
        return None

    def start(self, options: Options, *, linger: bool) -> Running:
        """Boot a lab here and wait until it runs commands.

        Args:
            options: Its shape.
            linger: Whether it stays when this process ends.

        Raises:
            LabError: it did not come up, or another one runs here.
        """
        tools.need("qemu-system-x86_64", "busybox", "mksquashfs", "depmod", "mke2fs")
        boot = kernel.prepare(self.layout.cache)
        packed, manifest = images.pack_all(self.layout)
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._lock() as lock:
            began = time.monotonic()
            token = secrets.token_hex(16)
            self._write_control(token, [boot.modules, *packed], options)
            (self.directory / TREE_FILE).write_text(json.dumps(manifest))
            machine = self._machine(boot, [boot.modules, *packed], options)
            process = self._launch(machine, lock, linger)
            try:
                self._await_ready(process, machine)
                ticks = start_ticks(process.pid)
                if ticks is None:
                    raise LabError("QEMU ended just after the lab was ready")
                running = Running(
                    pid=process.pid,
                    start_ticks=ticks,
                    port=machine.agent_port,
                    token=token,
                    boot_s=round(time.monotonic() - began, 2),
                    options=json.loads(json.dumps(asdict(options), default=str)),
                )
                _write_private(self.directory / "state.json", json.dumps(asdict(running)))
            except BaseException:
                process.kill()
                process.wait()
                raise
        return running

    def stop(self) -> bool:
        """Take the lab down, politely first; return whether there was one."""
        running = self.find()
        if running is None:
            return False
        # The descriptor names the process even if its id is used again meanwhile.
        with contextlib.suppress(ProcessLookupError):
            handle = os.pidfd_open(running.pid)
            try:
                if self.find() is not None:
                    _end(handle, running.endpoint)
            finally:
                os.close(handle)
        (self.directory / "state.json").unlink(missing_ok=True)
        (self.directory / "scratch.img").unlink(missing_ok=True)
        return True

    def console_tail(self, lines: int = 5) -> str:
        """Return the last lines of the lab's console."""
        with contextlib.suppress(FileNotFoundError):
            text = (self.directory / "console.log").read_text(errors="replace")
            return "\n".join(text.splitlines()[-lines:])
        return ""

    @contextlib.contextmanager
    def _lock(self) -> Iterator[int]:
        fd = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as err:
                raise LabError("another lab of this checkout is running or starting") from err
            yield fd
        finally:
            # QEMU inherited the same lock, and holds it until its own end.
            os.close(fd)

    def _write_control(self, token: str, disks: list[images.Image], options: Options) -> None:
        control = self.directory / "control"
        shutil.rmtree(control, ignore_errors=True)
        control.mkdir(mode=0o700)
        for name in ("main.sh", "agent.py"):
            shutil.copyfile(HERE / name, control / name)
        lines = [f"image {image.name} {image.target}" for image in disks]
        stdlib = self.layout.stdlib
        under = [stdlib / "site-packages", stdlib / "dist-packages", self.layout.checkout / ".git"]
        lines += [f"bind - {path}" for path in under if path.is_dir()]
        (control / "mounts").write_text("\n".join(lines) + "\n")
        config = {
            "interpreter": str(self.layout.interpreter),
            "token": token,
            "idle_s": options.idle_minutes * 60,
            "forwards": [f.guest_port for f in options.forwards],
        }
        _write_private(control / "config.json", json.dumps(config, indent=1))

    def _machine(
        self, boot: kernel.LabKernel, disks: list[images.Image], options: Options
    ) -> qemu.Machine:
        out = options.out or self.directory / "out"
        out.mkdir(parents=True, exist_ok=True)
        scratch = self.directory / "scratch.img"
        scratch.unlink(missing_ok=True)
        with scratch.open("wb") as file:
            file.truncate(SCRATCH_MIB << 20)
        tools.run(
            ["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", scratch], what="scratch disk"
        )
        extra = () if options.disk is None else (qemu.Disk("disk", options.disk, writable=True),)
        return qemu.Machine(
            kernel=boot.image,
            initrd=boot.initrd,
            control=self.directory / "control",
            out=out,
            console=self.directory / "console.log",
            agent_port=_free_port(),
            disks=(
                *(qemu.Disk(image.name, image.file) for image in disks),
                qemu.Disk("scratch", scratch, writable=True),
                *extra,
            ),
            forwards=options.forwards,
            memory_mib=options.memory_mib,
            cpus=options.cpus,
            icount=options.icount,
        )

    def _launch(self, machine: qemu.Machine, lock: int, linger: bool) -> "subprocess.Popen[bytes]":
        machine.console.write_bytes(b"")
        with (self.directory / "qemu.log").open("wb") as log:
            return subprocess.Popen(
                machine.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[lock],
                # A Ctrl-C on our terminal is for us alone: we decide what becomes of the lab.
                start_new_session=True,
                preexec_fn=None if linger else _die_with_parent,
            )

    def _await_ready(self, process: "subprocess.Popen[bytes]", machine: qemu.Machine) -> None:
        deadline = time.monotonic() + START_LIMIT_S * (4 if machine.icount else 1)
        while True:
            # Looked at first: what it printed before its end is there once it has ended.
            ended = process.poll() is not None
            console = machine.console.read_text(errors="replace")
            if any(line.strip() == qemu.READY_LINE for line in console.splitlines()):
                return
            if ended:
                log = (self.directory / "qemu.log").read_text(errors="replace")
                raise qemu.explain_death(log, console, machine.forwards)
            if time.monotonic() > deadline:
                tail = " | ".join(console.splitlines()[-3:]) or "nothing"
                raise LabError(f"the lab was not ready in time; its console said: {tail}")
            time.sleep(POLL_S)


def sweep(runs: Path) -> None:
    """Remove what one-shot labs left in `runs` when they were killed."""
    for directory in runs.glob("once-*"):
        try:
            fd = os.open(directory / "lock", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # not that far yet, or just gone
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
        except BlockingIOError:
            continue
        finally:
            os.close(fd)


def _end(process: int, endpoint: Endpoint) -> None:
    """End the process that a pidfd names: by the agent, then by SIGTERM, then by SIGKILL."""
    endpoint.call("stop")
    for number in (None, signal.SIGTERM, signal.SIGKILL):
        if number is not None:
            signal.pidfd_send_signal(process, number)
        if select.select([process], [], [], STOP_LIMIT_S)[0]:
            return


def _die_with_parent() -> None:
    # Runs between fork and exec. Even SIGKILL of this program must leave no QEMU behind.
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _free_port() -> int:
    """Return a loopback port that is free now; if it is taken by then, QEMU says so."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _write_private(path: Path, text: str) -> None:
    """Replace a file at once by one that only its owner can read."""
    part = path.with_suffix(".part")
    part.unlink(missing_ok=True)
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    part.rename(path)


def load_tree(path: Path) -> tree.Manifest:
    """Read a manifest that `Session.start` or a later sync has saved."""
    return {name: tree.Entry(*entry) for name, entry in json.loads(path.read_text()).items()}
