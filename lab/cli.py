# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The commands of `lab/lab`."""

import argparse
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

from lab import sync
from lab.client import Command, Execution
from lab.errors import LAB_FAILED, LabError
from lab.layout import Layout, find_layout
from lab.qemu import Forward
from lab.session import Options, Running, Session, sweep

USAGE: Final = """\
Run commands on an emulated x86-64 host with AMD-V, on any machine.

  lab/lab run [options] -- COMMAND...    boot, run COMMAND, power off
  lab/lab up [options]                   boot once and stay
  lab/lab exec [options] -- COMMAND...   run COMMAND in the lab that is up
  lab/lab status | down

The exit status is COMMAND's; 124 if it ran too long, 125 if the lab itself failed."""

# What a command in the lab gets of our environment; LAB=1 tells it where it is.
PASSED_ENV: Final = frozenset(
    [
        "COLUMNS",
        "FORCE_COLOR",
        "HOME",
        "LANG",
        "LC_ALL",
        "LOGNAME",
        "NO_COLOR",
        "PYTEST_ADDOPTS",
        "SHELL",
        "TERM",
        "TZ",
        "USER",
    ]
)
PASSED_PREFIX: Final = "HOSTEL_"


def main(arguments: Sequence[str]) -> int:
    """Run one command line; return the exit status."""
    head, command = _split(list(arguments))
    options = _parser().parse_args(head)
    takes_command = options.action in (_run, _exec)
    if takes_command and not command:
        print("lab: put -- and a COMMAND at the end", file=sys.stderr)
        return LAB_FAILED
    if command and not takes_command:
        print("lab: only run and exec take a COMMAND", file=sys.stderr)
        return LAB_FAILED
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    action: Callable[[argparse.Namespace, list[str]], int] = options.action
    try:
        return action(options, command)
    except LabError as err:
        print(f"lab: {err}", file=sys.stderr)
    except BrokenPipeError:
        return 128 + signal.SIGPIPE  # who reads our output has seen enough
    except OSError as err:
        # A full disk, or a cache directory that cannot be written.
        print(f"lab: {err.filename or 'system'}: {err.strerror}", file=sys.stderr)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return LAB_FAILED


def forward(text: str) -> Forward:
    """Read HOSTPORT:GUESTPORT, with or without 127.0.0.1: before it."""
    parts = text.split(":")
    if len(parts) == 3 and parts[0] == "127.0.0.1":
        parts = parts[1:]
    try:
        host, guest = (int(part) for part in parts)
    except ValueError as err:
        raise argparse.ArgumentTypeError(
            f"{text}: must be [127.0.0.1:]HOSTPORT:GUESTPORT (only loopback is offered)"
        ) from err
    if not (1 <= host <= 65535 and 2 <= guest <= 65535):
        raise argparse.ArgumentTypeError(f"{text}: ports must be 1..65535, in the lab 2..65535")
    return Forward(host, guest)


def environment(layout: Layout, ours: dict[str, str]) -> dict[str, str]:
    """Return the environment of a command in the lab."""
    passed = {
        name: value
        for name, value in ours.items()
        if name in PASSED_ENV or name.startswith(PASSED_PREFIX)
    }
    path = ours.get("PATH", "/usr/bin:/bin") + ":/usr/local/sbin:/usr/sbin:/sbin"
    if layout.venv is not None:
        passed["VIRTUAL_ENV"] = str(layout.venv)
        path = f"{layout.venv}/bin:{path}"
    return passed | {"PATH": path, "LAB": "1"}


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Cut the command line at the first `--`."""
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


class _Parser(argparse.ArgumentParser):
    """Fails with the lab's own status: argparse's 2 could as well be COMMAND's."""

    def error(self, message: str) -> NoReturn:
        """Print how to use this command and what was wrong."""
        self.print_usage(sys.stderr)
        self.exit(LAB_FAILED, f"lab: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lab/lab", description=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(required=True, metavar="run|up|exec|status|down")
    run = actions.add_parser("run", help="boot, run one command, power off")
    up = actions.add_parser("up", help="boot once and stay")
    execute = actions.add_parser("exec", help="run a command in the lab that is up")
    status = actions.add_parser("status", help="say whether a lab is up")
    down = actions.add_parser("down", help="power the lab off")
    for action, function in ((run, _run), (up, _up), (execute, _exec)):
        action.set_defaults(action=function)
    status.set_defaults(action=_status)
    down.set_defaults(action=_down)
    for action in (run, up):
        action.add_argument("-m", dest="memory_mib", type=int, default=3072, metavar="MIB")
        # Not more unless asked for: two emulated CPUs panic now and then; see docs/lab.md.
        action.add_argument("-c", dest="cpus", type=int, default=1, metavar="CPUS")
        action.add_argument(
            "-o", dest="out", type=Path, metavar="OUT", help="directory shared for writing, as /out"
        )
        action.add_argument(
            *("-p", "--publish"), type=forward, action="append", default=[],
            metavar="HOSTPORT:GUESTPORT", help="lead a loopback port to the lab's loopback",
        )  # fmt: skip
        action.add_argument(
            "--disk", type=Path, metavar="FILE", help="raw file that is a disk with the serial disk"
        )
        action.add_argument(
            "--icount", action="store_true", help="1 CPU, time by instruction count: for benchmarks"
        )
    up.add_argument(
        "--idle", type=float, default=240, metavar="MINUTES",
        help="power off after so long without a command; 0: never (default %(default)s)",
    )  # fmt: skip
    for action in (run, execute):
        action.add_argument("-t", dest="timeout_s", type=float, metavar="SECONDS")
        action.add_argument("-C", dest="cwd", type=Path, default=Path(), metavar="DIR")
        action.add_argument("-i", dest="stdin", action="store_true", help="pass on standard input")
    execute.add_argument(
        "--no-sync", dest="sync", action="store_false", help="don't bring changed files over"
    )
    return parser


def _shape(options: argparse.Namespace, *, idle_minutes: float) -> Options:
    if not 256 <= options.memory_mib <= 1 << 20:
        raise LabError(f"-m {options.memory_mib}: must be 256..1048576 MiB")
    if not 1 <= options.cpus <= 64:
        raise LabError(f"-c {options.cpus}: must be 1..64")
    return Options(
        memory_mib=options.memory_mib,
        cpus=1 if options.icount else options.cpus,
        icount=options.icount,
        out=options.out.resolve() if options.out else None,
        forwards=tuple(options.publish),
        idle_minutes=idle_minutes,
        disk=options.disk.resolve(strict=True) if options.disk else None,
    )


def _execute(layout: Layout, running: Running, options: argparse.Namespace, argv: list[str]) -> int:
    command = Command(
        argv=argv,
        cwd=os.fspath(options.cwd.resolve()),
        env=environment(layout, dict(os.environ)),
        forward_stdin=options.stdin,
        timeout_s=options.timeout_s,
        has_heartbeat=not running.options.get("icount"),
    )
    return Execution(running.endpoint, command).run()


def _run(options: argparse.Namespace, argv: list[str]) -> int:
    layout = find_layout()
    runs = layout.cache / "run"
    runs.mkdir(parents=True, exist_ok=True, mode=0o700)
    sweep(runs)
    directory = Path(tempfile.mkdtemp(dir=runs, prefix="once-"))
    session = Session(layout, directory)
    try:
        running = session.start(_shape(options, idle_minutes=0), linger=False)
        try:
            return _execute(layout, running, options, argv)
        except LabError as err:
            raise LabError(f"{err}; its console said: {session.console_tail()}") from err
        finally:
            session.stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _up(options: argparse.Namespace, argv: list[str]) -> int:
    layout = find_layout()
    session = Session(layout, layout.run_dir)
    running = session.find()
    if running is not None:
        print(f"lab: already up (process {running.pid}); lab/lab down ends it")
        return 0
    running = session.start(_shape(options, idle_minutes=options.idle), linger=True)
    print(f"lab: up in {running.boot_s:g} s (process {running.pid})")
    return 0


def _exec(options: argparse.Namespace, argv: list[str]) -> int:
    layout = find_layout()
    session = Session(layout, layout.run_dir)
    running = session.find()
    if running is None:
        raise LabError("no lab is up: start one with lab/lab up")
    if options.sync:
        sync.bring_over(layout, session.directory, running.endpoint)
    try:
        return _execute(layout, running, options, argv)
    except LabError as err:
        if session.find() is None:
            raise LabError(f"the lab died; its console said: {session.console_tail()}") from err
        raise


def _status(options: argparse.Namespace, argv: list[str]) -> int:
    layout = find_layout()
    session = Session(layout, layout.run_dir)
    running = session.find()
    if running is None:
        print("lab: down")
        return 1
    answers = "answers" if running.endpoint.call("ping") else "does not answer"
    shape = " ".join(f"{key}={value}" for key, value in running.options.items())
    print(f"lab: up and {answers}, process {running.pid}, {shape}")
    print(f"lab: console in {session.directory / 'console.log'}")
    return 0


def _down(options: argparse.Namespace, argv: list[str]) -> int:
    layout = find_layout()
    print("lab: down" if Session(layout, layout.run_dir).stop() else "lab: was not up")
    return 0


def _leave(number: int, frame: FrameType | None) -> None:
    # As an exception, so that `finally` clauses take the emulated host down.
    raise SystemExit(128 + number)
