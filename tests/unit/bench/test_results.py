# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""How benchmarks judge and print what they measured."""

from __future__ import annotations

import json

import pytest

from bench.blk import result as blk_result
from bench.boot import OURS, result
from bench.common import COLUMNS, Goal, document, interleave, medians, row, show
from bench.memory import sum_pss
from bench.vsock import CASES, PEER_NAME
from bench.vsock import result as vsock_result

SMAPS = """\
00400000-00401000 r-xp 00000000 fe:00 12 /usr/bin/python3.11
Pss:                 100 kB
Pss_Dirty:            90 kB
7f0000000000-7f0008000000 rw-s 00000000 00:01 34 /memfd:hostel-ram (deleted)
Rss:               60000 kB
Pss:               60000 kB
7f1000000000-7f1000001000 rw-p 00000000 00:00 0
Pss:                  23 kB
VmFlags: rd wr mr mw me ac
"""


def test_cases_are_measured_in_turns() -> None:
    order: list[str] = []

    def measure(name: str) -> float:
        order.append(name)
        return float(len(order))

    samples = interleave({"a": lambda: measure("a"), "b": lambda: measure("b")}, 2)
    assert order == ["a", "b", "a", "b"]
    assert samples == {"a": [1.0, 3.0], "b": [2.0, 4.0]}
    assert medians(samples) == {"a": 2.0, "b": 3.0}


@pytest.mark.parametrize(
    ("goal", "met"),
    [
        ((Goal.AT_MOST, 5.0), True),
        ((Goal.AT_MOST, 4.9), False),
        ((Goal.AT_LEAST, 5.0), True),
        ((Goal.AT_LEAST, 5.1), False),
        ((Goal.RATIO_AT_MOST, 0.5), True),
        ((Goal.RATIO_AT_MOST, 0.49), False),
    ],
)
def test_a_goal_is_met_up_to_its_limit(goal: tuple[Goal, float], met: bool) -> None:
    assert row("case", "ms", 5.0, ("peer", 10.0), goal).met is met


def test_without_a_peer_there_is_no_ratio() -> None:
    line = row("case", "ms", 5.0)
    assert (line.peer, line.ratio, line.goal, line.met) == (None, None, None, None)


def test_a_document_has_the_agreed_form(capsys: pytest.CaptureFixture[str]) -> None:
    made = document("name", "lab", [row("case", "ms", 5.0, ("peer", 10.0))])
    show(made, as_json=True)
    shown = json.loads(capsys.readouterr().out)
    assert set(shown) == {"bench", "host", "rows"}
    assert set(shown["host"]) == {"cpus", "kernel", "tier"}
    assert tuple(shown["rows"][0]) == COLUMNS


def test_a_table_says_plainly_when_a_goal_is_missed(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row("case", "ms", 5.0, goal=(Goal.AT_MOST, 4.0))]
    show(document("name", "direct", rows), as_json=False)
    assert "NO" in capsys.readouterr().out.splitlines()[-1]


def test_memory_is_counted_without_the_guest_s_ram() -> None:
    assert sum_pss(SMAPS, "memfd:hostel-ram") == 123


def test_memory_is_not_counted_where_no_guest_ram_is_found() -> None:
    with pytest.raises(ValueError, match="no mapping named"):
        sum_pss(SMAPS, "memfd:other")


def test_the_boot_goal_is_set_against_the_fastest_peer() -> None:
    samples = {OURS: [40.0, 50.0, 60.0], "slow": [200.0], "fast": [100.0]}
    rows = result(samples, "lab")["rows"]
    assert [(line["peer_name"], line["goal"], line["met"]) for line in rows] == [
        ("qemu fast", "ratio <= 0.50", True),
        ("qemu slow", None, None),
    ]


def test_vsock_compares_both_back_ends_with_qemu() -> None:
    values = {"hostel vhost": 2.0, "hostel unix": 8.0, PEER_NAME: 4.0}
    samples = {f"{side}/{case}": [value] for case in CASES for side, value in values.items()}
    rows = vsock_result(samples)
    assert [each.ratio for each in rows] == [0.5, 2.0] * len(CASES)
    # More MB/s is better, and fewer microseconds.
    assert [each.met for each in rows] == [False, True, False, True, True, False]


def test_blk_counts_the_rows_that_are_clearly_better() -> None:
    values = {"hostel": 3.0, "q35": 2.0, "microvm-pci": 2.9}
    one = {f"{side} {metric}": [v] for side, v in values.items() for metric in ("per_s", "cpu_us")}
    *_, last = blk_result({"randread,4096,1,1": one, "randread,4096,32,1": one})
    assert (last.ours, last.unit, last.goal, last.met) == (2, "of 4", ">= 2 of 4", True)
