#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Leaves a hosteld running that curl on this machine can drive: `make serve`.

Where this machine can run Linux guests, hosteld runs on it; elsewhere it runs in the lab, with its
API's port forwarded. Either way it listens on the loopback and wants a token. Ctrl-C ends it all.
"""

import argparse
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

if __name__ == "__main__":
    # Replaced, not extended: the script's own folder must not shadow standard modules.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from lab.errors import LabError
from lab.guests import Guest, find_guest
from lab.hosteld import Hosteld
from lab.where import lab_command, why_not_here

PORT: Final = 8480
READY_LIMIT_S: Final = 180.0
POLL_S: Final = 0.2


class Door:
    """Where the API is to be had, and the files that open it.

    Args:
        directory: private; receives the token, and a file with it as a header for `curl -H @`.
        port: on the loopback.
    """

    def __init__(self, directory: Path, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/v1"
        self.listen = f"127.0.0.1:{port}"
        self.token_file = directory / "token"
        self.header_file = directory / "header"
        token = secrets.token_hex(32)
        _write_private(self.token_file, token)
        _write_private(self.header_file, f"Authorization: Bearer {token}\n")

    def answers(self) -> bool:
        """Tell whether the API answers."""
        name, value = self.header_file.read_text().strip().split(": ")
        request = urllib.request.Request(f"{self.url}/host", headers={name: value})
        try:
            with urllib.request.urlopen(request, timeout=30):
                return True
        except urllib.error.HTTPError:
            raise
        except OSError:
            return False

    def usage(self, guest: Guest) -> str:
        """Return the curl lines to begin with."""
        vm = (
            '{"name":"web","vcpus":2,"kernel":"debian","initrd":"debian-initrd",'
            f'"cmdline":"{guest.cmdline}","disks":[{{"id":"root","image":"debian-root"}}],'
            '"nics":[{"id":"net0"}],"start":true}'
        )
        disk = _json(name="debian-root", kind="disk", path=guest.disk)
        initrd = _json(name="debian-initrd", kind="initrd", path=guest.initrd)
        # One word each and quoted: zsh splits no variables, and expands a bare `?`.
        lines = [
            f"V={self.url} H=@{self.header_file}",
            'curl -sS -H $H "$V/host"',
            f'curl -sS -H $H "$V/kernels?wait=60" --json {_json(name="debian", path=guest.kernel)}',
            f'curl -sS -H $H "$V/images?wait=60" --json {initrd}',
            f'curl -sS -H $H "$V/images?wait=60" --json {disk}',
            f'curl -sS -H $H "$V/vms?wait=60" --json {shlex.quote(vm)}',
            'curl -sS -H $H -N "$V/vms/web/console/log?follow=true"',
            'echo uname -a | curl -sS -H $H --data-binary @- "$V/vms/web/console/input"',
            'curl -sS -H $H -X DELETE "$V/vms/web?force=true"',
        ]
        return "\n".join(f"  {line}" for line in lines)


def serve_here(options: Sequence[str], directory: Path) -> int:
    """Run hosteld on this host until it is told to end, or ends by itself."""
    hosteld = Hosteld(directory, options)
    try:
        hosteld.start(READY_LIMIT_S)
        assert hosteld.process is not None
        status = hosteld.process.wait()
        print(f"serve: hosteld ended with status {status}: {hosteld.log_tail(5)}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        ended = hosteld.end()
        if ended:
            print(f"serve: ended {len(ended)} VM(s) that were still there")


def serve_in_lab(door: Door, port: int) -> int:
    """Run hosteld in the lab until we are told to end; return the lab's status."""
    inside = [sys.executable, str(Path(__file__).resolve()), "--inside"]
    inside += ["--listen", door.listen, "--token-file", str(door.token_file)]
    command = lab_command(inside, ["-p", f"127.0.0.1:{port}:{port}"])
    # In our process group: a Ctrl-C at the terminal reaches the lab, which ends all within it.
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        return process.wait()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if process.poll() is None:
            process.terminate()
            process.wait()


def announce(door: Door, guest: Guest, began: float) -> None:
    """Print how to use the API as soon as it answers. Runs in a thread of its own."""
    deadline = began + READY_LIMIT_S
    while not door.answers():
        if time.monotonic() > deadline:
            print(f"serve: no answer from {door.url} so far", file=sys.stderr)
            return
        time.sleep(POLL_S)
    print(f"serve: ready after {time.monotonic() - began:.0f} s. In another terminal:\n")
    print(door.usage(guest), "\n\nCtrl-C ends the daemon and its VMs.", flush=True)


def serve(port: int) -> int:
    """Serve, here or in the lab; return the exit status."""
    began = time.monotonic()
    reason = why_not_here()
    guest = find_guest()
    directory = Path(tempfile.mkdtemp(prefix="hostel-serve-"))
    try:
        door = Door(directory, port)
        if not _is_free(port):
            print(f"serve: port {port} is in use: choose another one by --port", file=sys.stderr)
            return 1
        threading.Thread(target=announce, args=(door, guest, began), daemon=True).start()
        if reason is None:
            options = ["--listen", door.listen, "--token-file", str(door.token_file)]
            return serve_here(options, directory)
        print(
            f"serve: not on this machine itself: {reason}; so in the lab, an emulated AMD-V host",
            flush=True,
        )
        return serve_in_lab(door, port)
    except LabError as err:
        print(f"serve: {err}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nserve: ended")
        return 0
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def serve_inside(options: Sequence[str]) -> int:
    """Serve in the lab, on behalf of a `serve` outside."""
    directory = Path(tempfile.mkdtemp(prefix="hostel-serve-"))
    try:
        return serve_here(options, directory)
    except LabError as err:
        print(f"serve: {err}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def main(arguments: Sequence[str]) -> int:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(prog="make serve", description=__doc__)
    parser.add_argument("--port", type=int, default=PORT, help="loopback port (%(default)s)")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--listen", help=argparse.SUPPRESS)
    parser.add_argument("--token-file", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    if options.inside:
        return serve_inside(["--listen", options.listen, "--token-file", options.token_file])
    return serve(options.port)


def _json(**values: object) -> str:
    text = ",".join(f'"{key}":"{value}"' for key, value in values.items())
    return shlex.quote("{" + text + "}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _write_private(path: Path, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write(text)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    # As an exception, so that `finally` clauses end what runs.
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
