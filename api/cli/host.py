# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""``hostel host``, ``hostel events`` and ``hostel doctor``."""

from __future__ import annotations

import json
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
    from ..models.resources import Check, Event

# The doctor boots a guest of a few bytes; it takes well below a second where the host is sound.
DOCTOR_DEADLINE_S: Final = 30.0
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
    checks = _checks(context)
    if as_json:
        print(json.dumps([check.model_dump(mode="json") for check in checks], indent=2))
    else:
        from . import tables

        tables.show_checks(checks)
    if any(check.status == "missing" for check in checks):
        raise typer.Exit(EXIT_API_ERROR)


def _checks(context: typer.Context) -> list[Check]:
    """Ask the daemon; without one, ask its program."""
    from ..client import HostelClient, Unreachable
    from ..errors import ApiError

    try:
        with HostelClient(endpoint_of(context)) as client:
            return client.host().checks
    except ApiError as err:
        fail(describe(err), EXIT_API_ERROR)
    except Unreachable as err:
        print(f"hostel: {err}; asking `hosteld --doctor` instead", file=sys.stderr)
    return _checks_without_daemon()


def _checks_without_daemon() -> list[Check]:
    from pydantic import TypeAdapter, ValidationError

    from ..models.resources import Check

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
        shown = json.loads(run.stdout)
        checks = shown["checks"] if isinstance(shown, dict) else shown
        return TypeAdapter(list[Check]).validate_python(checks)
    except (ValueError, KeyError, ValidationError):
        said = run.stderr.decode(errors="replace").strip().splitlines()[-1:]
        reason = said[0] if said else f"exit status {run.returncode}"
        fail(f"{program} --doctor failed: {reason}", EXIT_UNREACHABLE)


def _find_hosteld() -> str:
    """Return the hosteld beside this program, or whichever PATH has."""
    beside = Path(sys.argv[0]).absolute().with_name("hosteld")
    return str(beside) if beside.exists() else "hosteld"
