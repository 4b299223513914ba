# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A Linux guest under test, driven by a shell on its serial console."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from lab.guests import Guest
from lab.rest import Console, Json
from tests.support.hostel import Hostel

BOOT_LIMIT_S = 180.0
COMMAND_LIMIT_S = 90.0
PROMPT = "# "


@dataclass(frozen=True)
class Answer:
    """What a command of the guest did."""

    status: int
    text: str


class LinuxGuest:
    """One VM with a shell on its console."""

    def __init__(self, hostel: Hostel, guest: Guest, name: str) -> None:
        self.hostel = hostel
        self.guest = guest
        self.name = name
        self.console: Console | None = None
        self._numbers = itertools.count()

    @property
    def vm(self) -> Json:
        """The VM as the API shows it."""
        return self.hostel.api.vm(self.name)

    @contextlib.contextmanager
    def running(self, ready: str | None = None) -> Iterator[None]:
        """Start the VM, take its shell, and delete it in the end, also if it does not come up."""
        try:
            self.start(ready)
            yield
        finally:
            self.delete()

    def start(self, ready: str | None = None) -> None:
        """Start the VM and take its shell."""
        offset = self.log_end()
        self.hostel.api.act(self.name, "start")
        self.attach(offset)
        self.log_in(ready)

    def attach(self, offset: int) -> None:
        """Follow the console from an offset of its log on."""
        if self.console is not None:
            self.console.close()
        self.console = Console(self.hostel.api, self.name, offset)

    def log_end(self) -> int:
        """Return where the console's log ends now."""
        path = f"/v1/vms/{self.name}/console/log?limit=1"
        return int(self.hostel.api.request("GET", path).headers["console-end-offset"])

    def log_in(self, ready: str | None = None) -> None:
        """Wait for the shell's prompt, and have it talk like a machine from then on."""
        assert self.console is not None
        at = self.console.wait_for(ready or self.guest.ready_line, limit_s=BOOT_LIMIT_S)
        at = self.console.wait_for(PROMPT, after=at, limit_s=BOOT_LIMIT_S)
        # Behind a pipe the shell neither edits lines nor prompts; kernel messages stay in dmesg.
        # The end is spelled so that the echo of what was typed does not hold it.
        self.type("dmesg -n 1; stty -echo; echo log''ged in; sh 2>&1 | cat")
        self.console.wait_for("logged in\n", after=at, limit_s=COMMAND_LIMIT_S)

    def type(self, line: str) -> None:
        """Type a line into the console."""
        self.hostel.api.type(self.name, line + "\n")

    def sh(self, command: str, limit_s: float = COMMAND_LIMIT_S) -> Answer:
        """Run a command in the guest and return what it printed.

        Raises:
            TimeoutError: it did not end in time.
        """
        assert self.console is not None
        begin, end = (f"{word}-{next(self._numbers)}" for word in ("begin", "end"))
        since = len(self.console.text)
        self.type(f"echo {begin}; {command}\nstatus=$?; echo; echo {end} $status.")
        at = self.console.wait_for(f"{begin}\n", after=since, limit_s=limit_s)
        to = self.console.wait_for(f"\n{end} ", after=at, limit_s=limit_s)
        dot = self.console.wait_for(".", after=to, limit_s=limit_s)
        text = self.console.text
        return Answer(int(text[to : dot - 1]), text[at : to - len(end) - 2].strip())

    def ask(self, command: str, limit_s: float = COMMAND_LIMIT_S) -> str:
        """Run a command that must succeed, and return what it printed."""
        answer = self.sh(command, limit_s)
        assert answer.status == 0, f"{command}: status {answer.status}: {answer.text}"
        return answer.text

    def wait_ended(self, code: str) -> Json:
        """Wait until the VM has stopped, which must be for this reason."""
        vm = self.hostel.api.wait_state(self.name, "stopped", limit_s=COMMAND_LIMIT_S)
        assert vm["reason"]["code"] == code
        return vm

    def delete(self) -> None:
        """Delete the VM, whatever it does."""
        if self.console is not None:
            self.console.close()
        self.hostel.delete(self.name)
