# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What every benchmark shares: interleaved rounds, medians, a table for people, one JSON document.

Figures are ratios against a peer on the same host in the same run (DESIGN section 9); a goal is
met or not, and nothing fails because of it.
"""

from __future__ import annotations

import argparse
import enum
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

Measure = Callable[[], float]
COLUMNS: Final = ("case", "unit", "ours", "peer", "peer_name", "ratio", "goal", "met")


class Goal(enum.Enum):
    """What a limit is a limit of."""

    AT_MOST = "<="
    AT_LEAST = ">="
    RATIO_AT_MOST = "ratio <="
    RATIO_AT_LEAST = "ratio >="


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a result.

    Attributes:
        ours: median of our side, in ``unit``.
        peer: median of the peer's side in the same run, or None.
        ratio: ours/peer, or None where there is no peer.
        goal: in words, such as "ratio <= 0.50", or None.
        met: whether the goal is met, None where there is none.
    """

    case: str
    unit: str
    ours: float
    peer: float | None = None
    peer_name: str | None = None
    ratio: float | None = None
    goal: str | None = None
    met: bool | None = None


def row(
    case: str,
    unit: str,
    ours: float,
    peer: tuple[str, float] | None = None,
    goal: tuple[Goal, float] | None = None,
) -> Row:
    """Build a row and judge its goal.

    Args:
        case: what was measured.
        unit: of ``ours`` and of the peer's value.
        ours: our median.
        peer: (name, median) of the same run.
        goal: what is to hold, and its limit.
    """
    name, value = peer if peer is not None else (None, None)
    ratio = ours / value if value else None
    if goal is None:
        return Row(case, unit, ours, value, name, ratio)
    kind, limit = goal
    if kind in (Goal.RATIO_AT_MOST, Goal.RATIO_AT_LEAST):
        met = None
        if ratio is not None:
            met = ratio <= limit if kind is Goal.RATIO_AT_MOST else ratio >= limit
        return Row(case, unit, ours, value, name, ratio, f"{kind.value} {limit:.2f}", met)
    met = ours <= limit if kind is Goal.AT_MOST else ours >= limit
    return Row(case, unit, ours, value, name, ratio, f"{kind.value} {limit:g} {unit}", met)


def interleave(cases: Mapping[str, Measure], rounds: int) -> dict[str, list[float]]:
    """Measure every case once a round, A B A B, so that a host's drift touches all alike."""
    samples: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds):
        for name, measure in cases.items():
            value = measure()
            samples[name].append(value)
            progress(f"round {number + 1}/{rounds} {name}: {value:.6g}")
    return samples


def medians(samples: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return each case's median."""
    return {name: statistics.median(values) for name, values in samples.items()}


def progress(text: str) -> None:
    """Say on stderr what is going on; stdout holds the result alone."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def host(tier: str) -> dict[str, Any]:
    """Describe where the figures come from; ``tier`` is direct, full or lab."""
    return {"cpus": os.cpu_count(), "kernel": platform.release(), "tier": tier}


def document(name: str, tier: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Return a result as DESIGN section 9 has it."""
    return {"bench": name, "host": host(tier), "rows": [asdict(each) for each in rows]}


def show(result: Mapping[str, Any], *, as_json: bool) -> None:
    """Print a result: as one JSON document, or as a table."""
    if as_json:
        print(json.dumps(result, indent=1))
        return
    where = result["host"]
    print(f"{result['bench']}: {where['tier']} host, {where['cpus']} CPUs, Linux {where['kernel']}")
    lines = [COLUMNS, *([_cell(each[name]) for name in COLUMNS] for each in result["rows"])]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    for line in lines:
        cells = zip(line, widths, strict=True)
        print("  " + "  ".join(cell.ljust(width) for cell, width in cells).rstrip())


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a command line with ``--json``."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--json", action="store_true", help="print one JSON document")
    return result
