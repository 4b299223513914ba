# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Every line of docs/api.md works as pasted."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.api.live import LiveServer

TOUR = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
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


def lines() -> list[str]:
    """Return the shell commands of the tour; one may span lines within its quotes."""
    script = "".join(re.findall(r"^```sh\n(.*?)^```$", TOUR, re.DOTALL | re.MULTILINE))
    return re.findall(r"^(?:curl|\w+=).*?(?=^curl|^\w+=|\Z)", script, re.DOTALL | re.MULTILINE)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_every_line_works_as_pasted(live: LiveServer, tmp_path: Path) -> None:
    kernel, disk = tmp_path / "kernel", tmp_path / "disk"
    kernel.write_bytes(b"\x7fELF")
    disk.write_bytes(b"\0" * 4096)
    commands = lines()
    assert len(commands) > 30
    script = "\n".join(
        checked(command).replace("--max-time 5", "--max-time 0.3") for command in commands
    )
    variables = {"HOSTEL_SOCKET": live.path, "KERNEL": str(kernel), "DISK": str(disk)}
    run = subprocess.run(
        ["sh", "-c", f"{SETUP}\n{script}"],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr
    assert not live.service.vms
    assert not live.service.kernels


# Prints what failed and ends; $1: the expected exit status, $2: the expected HTTP status.
SETUP = r"""
curl() { command curl -w '\n%{stderr}%{http_code}\n' "$@" 2>>"$LOG"; }
LOG=$(mktemp)
want() {
    got=$?
    status=$(tail -n 1 "$LOG")
    if [ "$got" != "$1" ] || { [ "$2" != any ] && [ "$status" != "$2" ]; }; then
        echo "exit $got, HTTP $status, wanted $1 and $2: $3"
        exit 1
    fi
}
"""


def checked(command: str) -> str:
    """Return a command followed by a check of how it ended."""
    text = command.rstrip("\n")
    if not text.startswith("curl"):
        return f"{text}\nwant 0 any assignment"
    refusal = next((status for part, status in REFUSALS.items() if part in text), None)
    exit_status = TIMED_OUT if "--max-time" in text else 0
    status = refusal if refusal is not None else "any"
    fails = "" if refusal is not None else " --fail-with-body"
    return f"{text.replace('curl -sS', f'curl -sS{fails}', 1)}\nwant {exit_status} {status} tour"
