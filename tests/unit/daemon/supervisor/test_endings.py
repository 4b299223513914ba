# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What a worker's end says about its VM."""

from __future__ import annotations

import signal

import pytest

from api.models.vms import VmState
from daemon.protocol import Status
from daemon.supervisor.endings import judge, reason_of
from daemon.supervisor.workers import Ending

KILLED = int(signal.SIGKILL)
EXITED_3 = 3 << 8


def words(state: str, code: str = "guest_poweroff") -> Status:
    return Status(state, "x", 1, {"code": code, "message": "m", "detail": {"rip": 1}})


@pytest.mark.parametrize("last_words", [None, words("crashed"), words("stopped")])
def test_a_kill_that_was_asked_for_needs_no_reason(last_words: Status | None) -> None:
    verdict = judge(Ending(KILLED, last_words, ()), was_killed=True)
    assert (verdict.state, verdict.reason) == (VmState.STOPPED, None)


def test_last_words_are_believed() -> None:
    verdict = judge(Ending(0, words("stopped"), ()), was_killed=False)
    assert verdict.state is VmState.STOPPED
    assert verdict.reason is not None
    assert verdict.reason.code == "guest_poweroff"


def test_a_guest_that_crashed_before_its_worker_died_has_crashed_for_its_own_reason() -> None:
    verdict = judge(Ending(KILLED, words("crashed", "triple_fault"), ()), was_killed=False)
    assert verdict.state is VmState.CRASHED
    assert verdict.reason is not None
    assert verdict.reason.code == "triple_fault"


def test_a_worker_that_was_told_to_quit_needs_no_reason() -> None:
    verdict = judge(Ending(0, words("stopped", "killed"), ()), was_killed=False)
    assert (verdict.state, verdict.reason) == (VmState.STOPPED, None)


@pytest.mark.parametrize("last_words", [None, words("running"), words("paused")])
def test_a_sudden_death_is_told_with_signal_and_log(last_words: Status | None) -> None:
    verdict = judge(Ending(KILLED, last_words, ("one", "two")), was_killed=False)
    assert verdict.state is VmState.CRASHED
    assert verdict.reason is not None
    assert verdict.reason.detail == {"signal": "SIGKILL", "log": "one\ntwo"}
    assert "dmesg" in verdict.reason.message
    assert "two" in verdict.reason.message


def test_a_worker_without_the_memory_of_a_file_says_what_that_may_be() -> None:
    reason = judge(Ending(int(signal.SIGBUS), None, ()), was_killed=False).reason
    assert reason is not None
    assert (reason.code, reason.detail["signal"]) == ("worker_killed", "SIGBUS")
    assert "file system of a pmem file is full" in reason.message


def test_an_exit_is_told_with_its_status() -> None:
    reason = judge(Ending(EXITED_3, None, ()), was_killed=False).reason
    assert reason is not None
    assert (reason.code, reason.detail["exit_status"]) == ("worker_failed", 3)


def test_a_death_that_nobody_saw_is_told_as_such() -> None:
    reason = judge(Ending(None, None, ()), was_killed=False).reason
    assert reason is not None
    assert reason.code == "worker_lost"


def test_a_reason_of_any_size_and_shape_is_cut_to_what_can_be_kept() -> None:
    told = {"code": "c" * 1000, "message": "m" * 100_000, "detail": {"a": [1] * 10_000, "b": 2}}
    reason = reason_of(told)
    assert reason is not None
    assert len(reason.code) == 64
    assert len(reason.message) == 2000
    assert len(str(reason.detail["a"])) == 2000
    assert reason.detail["b"] == 2
    assert reason_of({"detail": "x"}) is not None
