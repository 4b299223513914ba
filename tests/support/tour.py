# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The shell lines of docs/api.md, run as they stand there and each of them checked."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

TOUR = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
LIMIT_S = 100.0
# curl's exit status for --max-time, which ends what would be followed for ever.
TIMED_OUT = 28
# What the lines under "Errors" and the refusals before them are there to show.
REFUSALS = {
    "-X POST http://localhost/v1/vms/web-1/start": 409,
    "-X DELETE http://localhost/v1/operations/$OPERATION": 409,
    '{"memory_mib": 512}': 412,
    '"vcpu": 2': 422,
    """'{"name": "web-3"'""": 400,
    "http://localhost/v1/vms/web-3": 404,
}
# Prints what failed and ends; $1: the expected exit status, $2: the expected HTTP status.
SETUP = r"""
curl() { command curl -w '\n%{stderr}%{http_code}\n' "$@" 2>>"$LOG"; }
LOG=$(mktemp)
trap 'rm -f "$LOG"' EXIT
want() {
    got=$?
    status=$(tail -n 1 "$LOG")
    if [ "$got" != "$1" ] || { [ "$2" != any ] && [ "$status" != "$2" ]; }; then
        echo "exit $got, HTTP $status, wanted $1 and $2: $3"
        exit 1
    fi
}
"""


def lines() -> list[str]:
    """Return the shell commands of the tour; one may span lines within its quotes."""
    script = "".join(re.findall(r"^```sh\n(.*?)^```$", TOUR, re.DOTALL | re.MULTILINE))
    return re.findall(r"^(?:curl|\w+=).*?(?=^curl|^\w+=|\Z)", script, re.DOTALL | re.MULTILINE)


def checked(number: int, command: str) -> str:
    """Return a command followed by a check of how it ended."""
    text = command.rstrip("\n")
    if not text.startswith("curl"):
        # Empty is no value: the lines that use the variable would mean something else.
        name = text.partition("=")[0]
        return f'{text}\n[ -n "${name}" ]\nwant 0 any "command {number} of the tour"'
    refusal = next((status for part, status in REFUSALS.items() if part in text), None)
    exit_status = TIMED_OUT if "--max-time" in text else 0
    status = refusal if refusal is not None else "any"
    fails = "" if refusal is not None else " --fail-with-body"
    text = text.replace("curl -sS", f"curl -sS{fails}", 1).replace("--max-time 5", "--max-time 0.3")
    return f'{text}\nwant {exit_status} {status} "command {number} of the tour"'


def run_tour(variables: Mapping[str, str], changes: Mapping[str, str]) -> None:
    """Run every command of the tour.

    Args:
        variables: those that the document tells its reader to set.
        changes: parts of commands that have to be others here, such as a name that must be unique.

    Raises:
        AssertionError: a command did not do as the document says.
    """
    commands = lines()
    assert len(commands) > 30
    script = "\n".join(checked(number, command) for number, command in enumerate(commands, 1))
    for old, new in changes.items():
        assert old in script
        script = script.replace(old, new)
    run = subprocess.run(
        ["sh", "-c", f"{SETUP}\n{script}"],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr
