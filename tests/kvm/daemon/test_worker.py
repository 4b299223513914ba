# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A zygote and its workers, without hosteld: what survives, what is told, what is left behind."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from daemon import protocol
from daemon.protocol import DiskSpec, MachineSpec
from tests.support import tiny_kernel
from tests.support.descriptors import WORKER_KINDS, held_by
from tests.support.disk_kernel import disk_kernel

ROOT = Path(__file__).parents[3]
DEADLINE_S = 20.0
Json = dict[str, Any]


def receive(sock: socket.socket) -> Json | None:
    """Receive one message within the deadline; its descriptors are closed."""
    ready, _, _ = select.select([sock], [], [], DEADLINE_S)
    assert ready, f"nothing came within {DEADLINE_S} s"
    message = protocol.receive(sock)
    if message is None:
        return None
    protocol.close_all(message.fds)
    return message.body


class Worker:
    """A forked worker and the connection to it."""

    def __init__(self, zygote_sock: socket.socket, directory: Path) -> None:
        self.directory = directory
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(directory / "control.sock"))
        listener.listen()
        append = os.O_CREAT | os.O_RDWR | os.O_APPEND
        files = [os.open(directory / name, append, 0o600) for name in ("console.log", "log")]
        last_words = os.open(directory / "last_words", os.O_CREAT | os.O_RDWR, 0o600)
        fds = (listener.fileno(), *files, last_words)
        protocol.send(zygote_sock, {"id": 1, "op": "fork", "args": {"vm": "test"}}, fds)
        listener.close()
        protocol.close_all(fds[1:])
        body = receive(zygote_sock)
        assert body is not None
        self.pid: int = body["ok"]["pid"]
        self.notices: list[Json] = []
        self.connect()

    def connect(self) -> None:
        """Connect as a hosteld that comes anew does."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.connect(str(self.directory / "control.sock"))

    def ask(self, op: str, args: Json | None = None, fds: tuple[int, ...] = ()) -> Json:
        """Send a request and return the answer, or the error, to it."""
        protocol.send(self.sock, {"id": op, "op": op, "args": args or {}}, fds)
        while (body := receive(self.sock)) is not None:
            if "notice" in body:
                self.notices.append(body["data"])
            else:
                answer: Json = body.get("ok", body.get("error"))
                return answer
        raise AssertionError(f"the worker ended before it answered {op}")

    def launch(self, code: bytes, *more: int, **changes: Any) -> Json:  # noqa: ANN401 - of MachineSpec
        """Launch a guest that runs ``code``, with ``more`` descriptors, which are closed."""
        kernel = tiny_kernel.write_elf(self.directory / "kernel", code)
        fds = (os.open("/dev/kvm", os.O_RDWR), os.open(kernel, os.O_RDONLY), *more)
        spec = MachineSpec(
            vm_id="test", vcpus=1, memory_bytes=64 << 20, cmdline="", entry="linux64",
            setup_header="", kvm_fd=0, kernel_fd=1, initrd_fd=None, disks=(), nics=(), rng=True,
            on_reboot="reset", on_panic="keep", requested_ns=time.monotonic_ns(),
        )  # fmt: skip
        try:
            return self.ask("launch", {**spec.encode(), **changes}, fds)
        finally:
            protocol.close_all(fds)

    def wait_for(self, state: str, code: str | None = None) -> Json:
        """Wait for a notice of a state, with a reason if one is given."""
        while True:
            for notice in self.notices:
                reason = notice["reason"] or {}
                if notice["state"] == state and code in (None, reason.get("code")):
                    return notice
            body = receive(self.sock)
            assert body is not None, f"the worker ended before it was {state}"
            self.notices.append(body["data"])

    def wait_for_console(self, text: str) -> None:
        """Wait until the guest has printed something."""
        deadline = time.monotonic() + DEADLINE_S
        while text.encode() not in (self.directory / "console.log").read_bytes():
            assert time.monotonic() < deadline, f"{text!r} was never printed"
            time.sleep(0.005)


@pytest.fixture
def zygote() -> Iterator[socket.socket]:
    """The socket to a zygote of the test's own."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    argv = [sys.executable, "-m", "daemon.zygote", "--fd", str(theirs.fileno())]
    with ours, subprocess.Popen(argv, pass_fds=(theirs.fileno(),), cwd=ROOT) as process:
        theirs.close()
        ours.settimeout(DEADLINE_S)
        assert receive(ours) == {"notice": "hello", "data": {}}
        ours.settimeout(None)
        yield ours
        ours.close()
        assert process.wait(DEADLINE_S) == 0


@pytest.fixture
def worker(zygote: socket.socket) -> Iterator[Worker]:
    """A worker that has launched nothing yet."""
    directory = Path(tempfile.mkdtemp(prefix="ht-"))
    worker = Worker(zygote, directory)
    pidfd = os.pidfd_open(worker.pid)
    yield worker
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    worker.sock.close()
    select.select([pidfd], [], [], DEADLINE_S)
    os.close(pidfd)
    shutil.rmtree(directory)


def test_guest_runs_and_its_boot_timer_is_told(worker: Worker) -> None:
    status = worker.launch(tiny_kernel.say("hi") + tiny_kernel.boot_timer() + tiny_kernel.HALT)
    assert status["state"] == "running"
    worker.wait_for_console("hi")
    while not any(notice["boot_time_us"] for notice in worker.notices):
        body = receive(worker.sock)
        assert body is not None
        worker.notices.append(body["data"])


def test_paused_guest_prints_nothing_and_goes_on_when_resumed(worker: Worker) -> None:
    worker.launch(tiny_kernel.forever(tiny_kernel.say("x") + tiny_kernel.delay(1000)))
    worker.wait_for_console("x")
    assert worker.ask("pause")["state"] == "paused"
    worker.ask("status")
    printed = (worker.directory / "console.log").stat().st_size
    time.sleep(0.05)
    assert (worker.directory / "console.log").stat().st_size == printed
    assert worker.ask("pause")["code"] == "wrong_state"
    assert worker.ask("resume")["state"] == "running"
    worker.wait_for_console("x" * (printed + 5))


def test_poweroff_ends_the_worker_with_last_words(worker: Worker, zygote: socket.socket) -> None:
    worker.launch(tiny_kernel.out(tiny_kernel.SLEEP_CONTROL, tiny_kernel.SLEEP_S5))
    worker.wait_for("stopped", "guest_poweroff")
    assert receive(worker.sock) is None
    assert receive(zygote) == {"notice": "exited", "data": {"pid": worker.pid, "status": 0}}
    last_words = json.loads((worker.directory / "last_words").read_text())
    assert last_words["reason"]["code"] == "guest_poweroff"


def test_guest_that_resets_itself_starts_over(worker: Worker) -> None:
    reset = tiny_kernel.out(tiny_kernel.I8042_COMMAND, tiny_kernel.I8042_RESET)
    worker.launch(tiny_kernel.say("again ") + reset + tiny_kernel.HALT)
    worker.wait_for_console("again again")
    assert worker.ask("status")["state"] == "running"


def test_guest_reset_stops_it_where_that_is_the_policy(worker: Worker) -> None:
    reset = tiny_kernel.out(tiny_kernel.I8042_COMMAND, tiny_kernel.I8042_RESET)
    worker.launch(reset + tiny_kernel.HALT, on_reboot="stop")
    worker.wait_for("stopped", "guest_reboot")


def test_triple_fault_keeps_the_guest_for_a_look_and_a_reset_revives_it(worker: Worker) -> None:
    worker.launch(tiny_kernel.say("boo ") + tiny_kernel.TRIPLE_FAULT)
    crashed = worker.wait_for("crashed", "triple_fault")
    assert crashed["reason"]["detail"]["vcpu"] == 0
    assert worker.ask("stats")["vcpu_exits"]["shutdown"] == 1
    assert worker.ask("resume")["code"] == "wrong_state"
    assert worker.ask("reset")["state"] == "running"
    worker.wait_for_console("boo boo")


def test_panic_is_told_and_the_guest_runs_on(worker: Worker) -> None:
    panic = tiny_kernel.out(tiny_kernel.PVPANIC, tiny_kernel.PVPANIC_PANICKED)
    worker.launch(panic + tiny_kernel.HALT)
    worker.wait_for("running", "guest_panic")
    assert worker.ask("status")["reason"]["code"] == "guest_panic"


def test_errors_of_a_disk_outlive_a_reset(worker: Worker) -> None:
    path = worker.directory / "disk"
    path.write_bytes(bytes(1 << 20))
    # A descriptor that cannot write.
    disk = DiskSpec("root", 2, read_only=False, slot=1)
    worker.launch(disk_kernel(), os.open(path, os.O_RDONLY), disks=[asdict(disk)])
    worker.wait_for_console("up.")
    for number in range(1, 5):
        worker.ask("console_write", {"data": base64.b64encode(b"A").decode()})
        worker.wait_for_console("up." + number * "1\x001.")
    worker.ask("reset")
    worker.ask("quit")
    told = worker.wait_for("stopped")["disk_errors"]
    assert told == {"root": {"count": 4, "error": "EBADF"}}


def test_typed_bytes_reach_the_guest(worker: Worker) -> None:
    worker.launch(tiny_kernel.echo())
    assert worker.ask("console_write", {"data": "aGVsbG8="}) == {"taken": 5}
    worker.wait_for_console("hello")
    assert worker.ask("console_write", {"data": "%"})["code"] == "bad_request"


def test_worker_outlives_its_zygote_and_answers_a_new_hosteld(worker: Worker) -> None:
    worker.launch(tiny_kernel.forever(tiny_kernel.say("x") + tiny_kernel.delay(1000)))
    worker.sock.close()
    worker.connect()
    assert worker.ask("status")["state"] == "running"


def test_kernel_that_is_none_fails_the_launch_and_not_the_worker(worker: Worker) -> None:
    (worker.directory / "junk").write_bytes(b"no kernel" * 1000)
    fds = (os.open("/dev/kvm", os.O_RDWR), os.open(worker.directory / "junk", os.O_RDONLY))
    spec = MachineSpec(
        vm_id="test", vcpus=1, memory_bytes=64 << 20, cmdline="", entry="linux64",
        setup_header="", kvm_fd=0, kernel_fd=1, initrd_fd=None, disks=(), nics=(), rng=False,
        on_reboot="reset", on_panic="keep", requested_ns=0,
    )  # fmt: skip
    answer = worker.ask("launch", spec.encode(), fds)
    protocol.close_all(fds)
    assert answer["code"] == "launch_failed"
    assert worker.ask("status")["state"] == "empty"


def test_pause_while_a_reset_is_due_stays_a_pause(worker: Worker) -> None:
    reset = tiny_kernel.out(tiny_kernel.I8042_COMMAND, tiny_kernel.I8042_RESET)
    worker.launch(tiny_kernel.say("a") + reset + tiny_kernel.say("past its reset"))
    worker.wait_for_console("aa")  # the next reset comes only after a second
    assert worker.ask("pause")["state"] == "paused"
    time.sleep(1.2)
    assert worker.ask("status")["state"] == "paused"
    assert worker.ask("resume")["state"] == "running"
    worker.wait_for_console("aaa")
    assert b"past" not in (worker.directory / "console.log").read_bytes()


def test_reset_takes_the_words_of_an_earlier_crash_back(worker: Worker) -> None:
    # It has a second until its next crash: long enough to look.
    worker.launch(tiny_kernel.delay(400_000) + tiny_kernel.TRIPLE_FAULT)
    worker.wait_for("crashed")
    while not (worker.directory / "last_words").read_bytes():
        time.sleep(0.005)
    assert worker.ask("reset")["state"] == "running"
    assert not (worker.directory / "last_words").read_bytes().strip()


def test_quit_ends_it_in_good_order(worker: Worker, zygote: socket.socket) -> None:
    worker.launch(tiny_kernel.SPIN)
    assert worker.ask("quit") == {}
    assert receive(zygote) == {"notice": "exited", "data": {"pid": worker.pid, "status": 0}}


def test_worker_has_no_capabilities_and_only_its_own_descriptors(worker: Worker) -> None:
    worker.launch(tiny_kernel.SPIN)
    status = Path(f"/proc/{worker.pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert {fields[f"Cap{name}"] for name in ("Inh", "Prm", "Eff", "Bnd")} == {"0" * 16}
    assert fields["NoNewPrivs"] == "1"
    control = worker.directory / "control.sock"
    own_files = {str(worker.directory / name) for name in ("console.log", "log", "last_words")}
    own_files.add(str(worker.directory / "kernel"))
    sockets = {f"socket listening on {control}", f"socket of {control}"}
    assert set(held_by(worker.pid)) == own_files | sockets | WORKER_KINDS
