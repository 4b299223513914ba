# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""``hostel host``, ``hostel events`` and ``hostel doctor``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from .support import (
    EXIT_API_ERROR,
    EXIT_UNREACHABLE,
    Json,
    describe,
    endpoint_of,
    fail,
    print_json,
    print_line,
    session,
)

if TYPE_CHECKING:
    from ..models.resources import DoctorReport, Event

# The doctor boots a guest of a few bytes; it takes well below a second where the host is sound, and
# gives up after 40 s.
DOCTOR_DEADLINE_S: Final = 60.0
EVENTS_PAGE: Final = 1000


def host(context: typer.Context, as_json: Json = False) -> None:
    """Describe the host and the daemon."""
    with session(context) as client:
        found = client.host()
        if as_json:
            print_json(found)
            return
        from . import tables

        tables.show_host(found)


def events(
    context: typer.Context,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as they happen.")] = False,
    after: Annotated[
        int | None,
        typer.Option(min=0, help="Begin after this id; with --follow left out: only news."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what happened; with --json one object a line."""
    with session(context) as client:
        if follow:
            for event in client.follow_events(after=after):
                _print_event(event, as_json=as_json)
            return
        cursor = after or 0
        while page := client.list_events(after=cursor, limit=EVENTS_PAGE):
            for event in page:
                _print_event(event, as_json=as_json)
            cursor = page[-1].id


def _print_event(event: Event, *, as_json: bool) -> None:
    if as_json:
        print_line(event)
        return
    from . import tables

    tables.show_event(event)


def doctor(context: typer.Context, as_json: Json = False) -> None:
    """Say what this host can do, and what to do about each lack."""
    report = _report(context)
    if as_json:
        print_json(report)
    else:
        from . import tables

        tables.show_doctor(report)
    if any(check.status == "missing" for check in report.checks):
        raise typer.Exit(EXIT_API_ERROR)


def _report(context: typer.Context) -> DoctorReport:
    """Ask the daemon; without one, ask its program."""
    from ..client import HostelClient, Unreachable
    from ..errors import ApiError
    from ..models.resources import DoctorReport

    try:
        with HostelClient(endpoint_of(context)) as client:
            found = client.host()
            return DoctorReport(tier=found.tier, checks=found.checks)
    except ApiError as err:
        fail(describe(err), EXIT_API_ERROR)
    except Unreachable as err:
        print(f"hostel: {err}; asking `hosteld --doctor` instead", file=sys.stderr)
    return _report_without_daemon()


def _report_without_daemon() -> DoctorReport:
    from pydantic import ValidationError

    from ..models.resources import DoctorReport

    program = _find_hosteld()
    try:
        run = subprocess.run(
            [program, "--doctor", "--json"],
            capture_output=True,
            timeout=DOCTOR_DEADLINE_S,
            check=False,
        )
    except FileNotFoundError:
        fail(f"{program} is not there: install Hostel on this host", EXIT_UNREACHABLE)
    except subprocess.TimeoutExpired:
        fail(f"{program} --doctor took longer than {DOCTOR_DEADLINE_S:g} s", EXIT_UNREACHABLE)
    try:
        return DoctorReport.model_validate_json(run.stdout)
    except ValidationError:
        said = run.stderr.decode(errors="replace").strip().splitlines()[-1:]
        reason = said[0] if said else f"exit status {run.returncode}"
        fail(f"{program} --doctor failed: {reason}", EXIT_UNREACHABLE)


def _find_hosteld() -> str:
    """Return the hosteld beside this program, or whichever PATH has."""
    beside = Path(sys.argv[0]).absolute().with_name("hosteld")
    return str(beside) if beside.exists() else "hosteld"
