# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What a disk request costs the engine, stage by stage, with a driver in the same memory.

Reads of 4 KiB in batches of 32, one thread, its CPU time. Each case has the stages of the one above
it and one more; the driver's own work is the first. The last two read a file from the page cache.
Needs a C compiler and nothing of the host.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Final

from bench.common import Goal, Row, document, interleave, medians, parser, row, show
from kvm_ffi.build_kvm import COMPILE_ARGS

HERE: Final = Path(__file__).resolve().parent
CSRC: Final = HERE.parent / "kvm_ffi" / "csrc"
UNITS: Final = ("guest_mem", "virtqueue", "engine", "token_bucket", "rate_group", "io_ring",
                "blk_file", "blk_request", "blk_stats", "blk_sync", "blk_ring",
                "blk_control", "blk_engine")  # fmt: skip
ROUNDS: Final = 7
REQUESTS: Final = {"io_uring": 320_000, "threads": 320_000}
REQUESTS_WITHOUT_HOST: Final = 3_200_000
FILE_BYTES: Final = 16 << 20
GOAL_PER_S: Final = 2e6
CASES: Final = {
    "driver": "the driver alone",
    "ring": "+ virtqueue: pop, add_used, publish",
    "request": "+ request: parse, check, copy, answer",
    "null": "+ engine, on a disk that is done at once",
    "deferred": "engine, on a disk that is done a turn later",
    "io_uring": "engine, io_uring, page cache",
    "threads": "engine, threads, page cache",
}


def build(directory: Path) -> Path:
    """Compile ring.c with the engine, and with its flags."""
    program = directory / "ring"
    sources = [HERE / "ring.c", *(CSRC / f"{unit}.c" for unit in UNITS)]
    compiler = os.environ.get("CC", "cc")
    command = [compiler, *COMPILE_ARGS, f"-I{CSRC}", "-o", str(program), *map(str, sources)]
    subprocess.run(command, check=True)
    return program


def cost_ns(program: Path, case: str, file: Path) -> float:
    """Return the nanoseconds of CPU for one request."""
    count = REQUESTS.get(case, REQUESTS_WITHOUT_HOST)
    command = [str(program), case, str(file), str(count)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def rows(middle: dict[str, float]) -> list[Row]:
    """Judge the medians."""
    costs = [row(title, "ns", middle[case]) for case, title in CASES.items()]
    per_s = [
        row(f"requests a second: {CASES[case]}", "/s", 1e9 / middle[case], goal=goal)
        for case, goal in (
            ("null", (Goal.AT_LEAST, GOAL_PER_S)),
            ("deferred", (Goal.AT_LEAST, GOAL_PER_S)),
        )
    ]
    return costs + per_s


def main() -> int:
    """Measure, and print the result."""
    options = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        program = build(directory)
        file = directory / "file"
        file.write_bytes(os.urandom(FILE_BYTES))
        cases = {case: partial(cost_ns, program, case, file) for case in CASES}
        middle = medians(interleave(cases, ROUNDS))
    show(document("ring", "direct", rows(middle)), as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
