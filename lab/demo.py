#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The main job, end to end: `make demo`.

Starts a hosteld of its own and drives a Debian guest through its whole life by curl. Every line
after a `$` is run exactly as it is printed. Where this machine cannot run the guest itself, the
same happens in the lab.
"""

import contextlib
import json
import os
import re
import secrets
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Final, NoReturn

if __name__ == "__main__":
    # Replaced, not extended: the script's own folder must not shadow standard modules.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from lab.errors import LabError
from lab.guests import Guest, find_guest
from lab.hosteld import Hosteld
from lab.where import in_lab, lab_command, why_not_here

CURL: Final = "curl -sS --fail-with-body --unix-socket $S"
PROMPT: Final = "# "
# What a person would type at the console, and how its end is told from its echo.
COMMAND: Final = "uname -a; nproc; ip link"
END: Final = "answered 42"
BACK: Final = "still here, 42"
CALL_LIMIT_S: Final = 90.0
BOOT_LIMIT_S: Final = 120.0
GUEST_LIMIT_S: Final = 60.0

Json = dict[str, Any]


class DemoFailed(Exception):
    """A step did not do what it should; the message is for the person at the terminal."""


class Demo:
    """One run of the demo.

    Args:
        hosteld: started and ended by the demo.
        guest: the files that the guest is made of.
    """

    def __init__(self, hosteld: Hosteld, guest: Guest) -> None:
        self.hosteld = hosteld
        self.guest = guest
        self.tap = f"demo-{secrets.token_hex(3)}"
        self.times: list[tuple[str, float]] = []
        self.console = bytearray()
        self.step_name = "start"

    def run(self) -> None:
        """Run every step.

        Raises:
            DemoFailed: a step failed, or took too long.
        """
        steps: tuple[tuple[str, Callable[[], None]], ...] = (
            ("start hosteld", self.start),
            ("import kernel, initrd and disk", self.import_files),
            ("create the VM", self.create),
            ("boot to a shell", self.boot),
            ("run a command", self.type_command),
            ("pause", self.pause),
            ("resume", self.resume),
            ("power off from inside", self.power_off),
            ("delete the VM", self.delete),
            ("stop hosteld", self.stop),
        )
        for name, step in steps:
            self.step_name = name
            say(f"\n== {name}")
            began = time.monotonic()
            step()
            self.times.append((name, time.monotonic() - began))
        self.show_times()

    # --- the steps

    def start(self) -> None:
        """Start hosteld and ask it about the host."""
        say(f"$ {shlex.join(self.hosteld.argv)} &")
        self.hosteld.start()
        say(f"$ S={self.hosteld.socket} V=http://localhost/v1")
        host = self.call("/host")
        self.show(host, "version", "tier", "kernel", "cpu_count")

    def import_files(self) -> None:
        """Import what the guest boots from."""
        kernel = {"name": "debian", "path": str(self.guest.kernel)}
        self.show(self.call("/kernels?wait=60", kernel), "format", "compression", "entry")
        for name, kind, path in (
            ("debian-initrd", "initrd", self.guest.initrd),
            ("debian-root", "disk", self.guest.disk),
        ):
            image = {"name": name, "kind": kind, "path": str(path)}
            self.show(self.call("/images?wait=60", image), "kind", "size_bytes", "sha256")

    def create(self) -> None:
        """Create the VM."""
        vm = {
            "name": "demo",
            "vcpus": 2,
            "memory_mib": 256,
            "kernel": "debian",
            "initrd": "debian-initrd",
            "cmdline": self.guest.cmdline,
            "disks": [{"id": "root", "image": "debian-root"}],
            "nics": [{"id": "net0", "tap": self.tap}],
            "rng": True,
        }
        self.show(self.call("/vms?wait=60", vm), "id", "state", "disks", "nics")

    def boot(self) -> None:
        """Start the VM and show its console until its shell is there."""
        self.show(self.call("/vms/demo/start?wait=60", method="POST"), "state", "pid")
        self.watch(f"{self.guest.ready_line}.*?{PROMPT}", BOOT_LIMIT_S, echo=True)
        self.show(self.call("/vms/demo"), "state", "boot_time_us")

    def type_command(self) -> None:
        """Run a command on the serial console."""
        # The shell works the sum out, so that the end is not found in the echo of what was typed.
        typed = f"{COMMAND}; echo answered $((6 * 7))"
        since = len(self.console)
        self.type(typed)
        self.watch(END, GUEST_LIMIT_S, echo=False)
        text = self.console[since:].decode(errors="replace").replace("\r", "")
        _, _, answer = text.partition("(6 * 7))")
        for line in answer.partition(END)[0].strip().splitlines():
            say(f"  | {line}")

    def pause(self) -> None:
        """Pause the VM."""
        self.call("/vms/demo/pause?wait=60", method="POST")
        self.expect_state("paused")

    def resume(self) -> None:
        """Let the VM run on, and see that its shell still answers."""
        self.call("/vms/demo/resume?wait=60", method="POST")
        self.expect_state("running")
        self.type("echo still here, $((6 * 7))")
        self.watch(BACK, GUEST_LIMIT_S, echo=False)
        say(f"  | {BACK}")

    def power_off(self) -> None:
        """Have the guest power itself off, and be told of it."""
        line = f'{CURL} -N "$V/events/stream"'
        with self.stream(line) as events:
            self.read_until(events, "retry:", CALL_LIMIT_S, line)
            self.type("poweroff")
            text = self.read_until(events, "event: vm.stopped.*?\n\n", GUEST_LIMIT_S, line)
        for told in text[text.rindex(b"event: vm.stopped") :].decode().strip().splitlines():
            say(f"  | {told}")
        vm = self.expect_state("stopped")
        code = (vm["reason"] or {}).get("code")
        if code != "guest_poweroff":
            raise DemoFailed(f"it stopped with the reason {code}, not guest_poweroff")

    def delete(self) -> None:
        """Delete the VM; nothing of it stays."""
        self.call("/vms/demo?wait=60", method="DELETE")
        if Path("/sys/class/net", self.tap).exists():
            raise DemoFailed(f"the tap {self.tap} is still there")
        say(f"  it is gone, and so is the tap {self.tap}")

    def stop(self) -> None:
        """Stop hosteld."""
        assert self.hosteld.process is not None
        say(f"$ kill {self.hosteld.process.pid}")
        status = self.hosteld.stop()
        if status != 0:
            raise DemoFailed(f"hosteld ended with status {status}")

    # --- curl

    def call(self, path: str, body: Json | None = None, *, method: str = "") -> Json:
        """Print a curl line, run it, and return the JSON that it printed.

        Args:
            path: below /v1.
            body: sent by POST.
            method: which, without a body; left out: GET.

        Raises:
            DemoFailed: it failed, or took too long.
        """
        line = f'{CURL}{f" -X {method}" if method else ""} "$V{path}"'
        if body is not None:
            line += f" --json {shlex.quote(json.dumps(body))}"
        answer = self.shell(line)
        try:
            found = json.loads(answer) if answer else {}
        except ValueError as err:
            raise DemoFailed(f"not JSON: {answer[:200]}") from err
        assert isinstance(found, dict)
        if found.get("state") == "running" and "may_cancel" in found:
            return self.call_operation(found["id"])
        return found

    def call_operation(self, operation_id: str) -> Json:
        """Wait for an operation that took longer than its request would wait."""
        operation = self.call(f"/operations/{operation_id}?wait=60")
        if operation["state"] != "succeeded":
            raise DemoFailed(f"{operation['kind']}: {operation['error'] or operation['state']}")
        result: Json = operation["result"] or {}
        return result

    def shell(self, line: str) -> str:
        """Print a shell line, run it, and return what it printed."""
        say(f"$ {line}")
        try:
            done = subprocess.run(
                ["sh", "-c", line],
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=CALL_LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as err:
            raise DemoFailed(f"no answer in {CALL_LIMIT_S:g} s: {line}") from err
        answer = done.stdout.decode(errors="replace")
        if done.returncode != 0:
            said = " ".join((answer + done.stderr.decode(errors="replace")).split())
            raise DemoFailed(f"curl ended with status {done.returncode}: {said}")
        return answer

    def type(self, text: str) -> None:
        """Type a line into the guest's console."""
        line = f'{CURL} --data-binary @- "$V/vms/demo/console/input"'
        self.shell(f"echo {shlex.quote(text)} | {line}")

    def watch(self, pattern: str, limit_s: float, *, echo: bool) -> None:
        """Follow the console from where we were until a pattern matches."""
        path = f"console/log?offset={len(self.console)}&follow=true"
        line = f'{CURL} -N "$V/vms/demo/{path}"'
        with self.stream(line) as log:
            self.read_until(log, pattern, limit_s, line, keep=True, echo=echo)

    @contextlib.contextmanager
    def stream(self, line: str) -> Iterator["subprocess.Popen[bytes]"]:
        """Print a curl line that goes on until it is ended, and run it meanwhile."""
        say(f"$ {line}")
        process = subprocess.Popen(
            ["sh", "-c", f"exec {line}"],
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def read_until(
        self,
        process: "subprocess.Popen[bytes]",
        pattern: str,
        limit_s: float,
        line: str,
        *,
        keep: bool = False,
        echo: bool = False,
    ) -> bytes:
        """Read a stream until a pattern matches; return all that was read.

        Raises:
            DemoFailed: the stream ended before, or the pattern did not match in time.
        """
        assert process.stdout is not None
        fd = process.stdout.fileno()
        printer = LinePrinter() if echo else None
        data = bytearray()
        deadline = time.monotonic() + limit_s
        while not re.search(pattern.encode(), data, re.DOTALL):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([fd], [], [], left)[0]:
                raise DemoFailed(f"no {pattern!r} in {limit_s:g} s from: {line}")
            piece = os.read(fd, 65536)
            if not piece:
                said = " ".join(bytes(data[-300:]).decode(errors="replace").split())
                raise DemoFailed(f"the stream ended early; it said: {said}")
            data += piece
            if keep:
                self.console += piece
            if printer is not None:
                printer.feed(piece)
        if printer is not None:
            printer.end()
        return bytes(data)

    def environment(self) -> dict[str, str]:
        """Return the environment of the printed lines."""
        return os.environ | {"S": str(self.hosteld.socket), "V": "http://localhost/v1"}

    # --- what people see

    def expect_state(self, state: str) -> Json:
        """Show the VM's state, which must be this one."""
        vm = self.call("/vms/demo")
        self.show(vm, "state", "reason")
        if vm["state"] != state:
            raise DemoFailed(f"the VM is {vm['state']}, not {state}")
        return vm

    def show(self, answer: Json, *keys: str) -> None:
        """Print the part of an answer that matters here."""
        part = {key: answer[key] for key in keys if answer.get(key) is not None}
        say(f"  {json.dumps(part)}")

    def show_times(self) -> None:
        """Print the table of how long each step took."""
        say("\nHow long each step took" + (" (in the lab: an emulated CPU)" if in_lab() else ""))
        for name, seconds in [*self.times, ("together", sum(s for _, s in self.times))]:
            say(f"  {name:<32} {seconds:8.2f} s")

    def show_failure(self, err: Exception) -> None:
        """Print what failed, and what hosteld and the guest said last."""
        say(f"\ndemo: FAILED at '{self.step_name}': {err}")
        # May well fail too, and must not hide what failed first.
        with contextlib.suppress(DemoFailed):
            self.show(self.call("/vms/demo"), "state", "reason")
        say("hosteld's last lines:")
        for line in self.hosteld.log_tail(15).split(" | "):
            say(f"  {line}")
        if self.console:
            say("the console's last lines:")
            for line in bytes(self.console[-4096:]).decode(errors="replace").splitlines()[-15:]:
                say(f"  | {line}")

    def clean_up(self) -> None:
        """End whatever is left of a run, whole or broken off."""
        ended = self.hosteld.end()
        if ended:
            say(f"demo: ended {len(ended)} left-over process(es)")
        if Path("/sys/class/net", self.tap).exists():
            subprocess.run(["ip", "link", "delete", self.tap], check=False)


class LinePrinter:
    """Prints a console's bytes as lines, as they come."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Print the lines that are complete."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._print(line)

    def end(self) -> None:
        """Print what is left."""
        if self._rest:
            self._print(self._rest)

    def _print(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip("\r")
        # A guest's control characters are not for the person's terminal.
        say("  | " + "".join(c if c.isprintable() or c == "\t" else "?" for c in text))


def say(text: str) -> None:
    """Print for the person at the terminal, at once."""
    print(text, flush=True)


def leave(number: int, frame: FrameType | None) -> NoReturn:
    """Turn a signal into an exception, so that `finally` clauses clean up."""
    raise SystemExit(128 + number)


def main() -> int:
    """Run the demo here, or in the lab; return the exit status."""
    reason = why_not_here()
    guest = find_guest()
    if reason is not None:
        say(f"demo: not on this machine itself: {reason}; so in the lab, an emulated AMD-V host")
        command = lab_command([sys.executable, str(Path(__file__).resolve())])
        # Not a child: a Ctrl-C is then the lab's own, which takes everything down.
        os.execv(command[0], command)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    directory = Path(tempfile.mkdtemp(prefix="hostel-demo-"))
    demo = Demo(Hosteld(directory), guest)
    try:
        demo.run()
    except (DemoFailed, LabError) as err:
        demo.show_failure(err)
        return 1
    except KeyboardInterrupt:
        say("\ndemo: interrupted")
        return 128 + signal.SIGINT
    finally:
        # A second Ctrl-C must not leave half of it behind.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        demo.clean_up()
        shutil.rmtree(directory, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
