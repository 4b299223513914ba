# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Starting and ending a daemon, with a stand-in for hosteld."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lab import hosteld
from lab.errors import LabError
from lab.hosteld import Hosteld, is_hosteld, is_running


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosteld, "program", lambda: ["sh", "-c", 'echo "state_dir is bad"; exit 3'])


@pytest.mark.usefixtures("stand_in")
def test_a_daemon_that_ends_is_told_with_its_log(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="status 3: state_dir is bad"):
        Hosteld(tmp_path).start()


def test_a_log_that_is_not_there_is_said_to_be_empty(tmp_path: Path) -> None:
    assert Hosteld(tmp_path).log_tail(3) == "it logged nothing"


def test_the_last_lines_of_a_log_are_one_line(tmp_path: Path) -> None:
    daemon = Hosteld(tmp_path)
    daemon.log.write_text("one\ntwo\nthree\n")
    assert daemon.log_tail(2) == "two | three"


def test_an_ended_process_is_not_running_even_before_it_is_waited_for() -> None:
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not is_running(process.pid)
    process.wait()


def test_other_programs_are_not_taken_for_hosteld() -> None:
    assert is_running(os.getpid())
    assert not is_hosteld(os.getpid())


def orphan(argv: list[str], environment: dict[str, str]) -> int:
    """Start a program whose parent ends at once; return its process id."""
    shell = subprocess.run(
        ["sh", "-c", f"{shlex.join(argv)} >/dev/null 2>&1 & echo $!"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    return int(shell.stdout)


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [(["-m", "daemon.zygote"], {}), ([], {"HOSTEL_BACKEND": "/run/x/vms/1/root"})],
    ids=["by its name", "a back end"],
)
def test_an_orphaned_process_of_a_daemon_is_found_and_ended(
    arguments: list[str], environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosteld, "ORPHAN_GRACE_S", 0.0)
    hosteld.become_reaper()
    pid = orphan([sys.executable, "-c", "import time; time.sleep(60)", *arguments], environment)
    assert is_running(pid)
    assert hosteld.end_orphans() == [pid]
    assert not is_running(pid)
