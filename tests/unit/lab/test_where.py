# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Where a Linux guest can run, and what is said where it cannot."""

from __future__ import annotations

import pytest

from lab import where
from lab.where import judge, lab_command, why_not_here


def test_a_full_host_and_root_need_no_lab() -> None:
    assert judge({"tier": "full"}, uid=0) is None


@pytest.mark.parametrize(
    ("report", "uid", "said"),
    [
        ({"tier": "full"}, 1000, "root"),
        ({"tier": "direct"}, 0, "interprets ring 0"),
        ({"tier": "any", "checks": [{"name": "kvm", "detail": "/dev/kvm: absent"}]}, 0, "absent"),
        ({"tier": "any"}, 0, "no usable KVM"),
        ({}, 0, "no usable KVM"),
    ],
)
def test_a_lack_is_named(report: dict[str, object], uid: int, said: str) -> None:
    reason = judge(report, uid)
    assert reason is not None
    assert said in reason


def test_in_the_lab_nothing_is_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB", "1")
    assert why_not_here() is None


def test_a_doctor_that_cannot_be_run_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LAB", raising=False)
    monkeypatch.setattr(where, "program", lambda: ["/nonexistent/hosteld"])
    reason = why_not_here()
    assert reason is not None
    assert "did not say" in reason


@pytest.mark.parametrize("said", ["", "no JSON", "[1]"])
def test_a_doctor_that_talks_nonsense_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    monkeypatch.delenv("LAB", raising=False)
    monkeypatch.setattr(where, "program", lambda: ["echo", said, "#"])
    assert why_not_here() is not None


def test_a_command_for_the_lab_is_behind_two_dashes() -> None:
    command = lab_command(["true", "--flag"], ["-c", "1"])
    assert command[2:] == ["run", "-c", "1", "--", "true", "--flag"]
