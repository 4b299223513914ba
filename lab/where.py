# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Decides whether a Linux guest can run on this machine itself, or needs the lab."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from lab.hosteld import ROOT, program

DOCTOR_LIMIT_S: Final = 60.0
LAB: Final = Path(__file__).with_name("lab")


def in_lab() -> bool:
    """Tell whether this process runs in the lab."""
    return os.environ.get("LAB") == "1"


def why_not_here() -> str | None:
    """Return why this machine cannot run a Linux guest with a network, or None if it can.

    The lab can: it is not examined again, since every start of a Python is slow there.
    """
    if in_lab():
        return None
    try:
        run = subprocess.run(
            [*program(), "--doctor", "--json"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=DOCTOR_LIMIT_S,
            check=False,
        )
        report = json.loads(run.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as err:
        return f"`hosteld --doctor` did not say what this machine can do ({err})"
    if not isinstance(report, dict):
        return "`hosteld --doctor` did not say what this machine can do"
    return judge(report, os.geteuid())


def judge(report: Mapping[str, Any], uid: int) -> str | None:
    """Return why the host that a doctor's report describes cannot run a Linux guest, or None.

    Args:
        report: what `hosteld --doctor --json` prints.
        uid: who would run hosteld; a tap takes root's rights.
    """
    tier = report.get("tier")
    if tier == "direct":
        return "its /dev/kvm interprets ring 0, so stock kernels don't run on it"
    if tier != "full":
        details = {check["name"]: check["detail"] for check in report.get("checks", [])}
        return f"it has no usable KVM ({details.get('kvm', 'no /dev/kvm')})"
    if uid != 0:
        return "making a tap takes root, and this is a plain user"
    return None


def lab_command(command: Sequence[str], options: Sequence[str] = ()) -> list[str]:
    """Return the command line that boots a lab, runs a command in it and powers it off."""
    return [sys.executable, str(LAB), "run", *options, "--", *command]
