# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""How long a tiny VM takes from POST to its first instruction; and how many at once a second.

Needs a direct host: any machine with a /dev/kvm that this user may open.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from bench.common import Goal, Row, document, parser, progress, row, show
from lab.rest import Api, Json
from tests.support import tiny_kernel
from tests.support.hostel import Hostel

COUNT = 50
WARM_UP = 5
SEQUENCE_GOAL_MS = 10.0
AT_ONCE_GOAL = 100.0
CODE = tiny_kernel.boot_timer() + tiny_kernel.HALT


def main() -> int:
    """Measure, and print the result."""
    options = parser(__doc__).parse_args()
    directory = Path(tempfile.mkdtemp(prefix="hb-"))
    # Sockets and pids on a tmpfs, as /run is on a host that systemd started.
    runtime_dir = Path(tempfile.mkdtemp(prefix="hb-", dir="/dev/shm"))
    hostel = Hostel(directory, runtime_dir=runtime_dir)
    try:
        hostel.start()
        tier = str(hostel.api.get("/v1/host")["tier"])
        kernel = hostel.kernel(CODE)
        for number in range(WARM_UP):
            create(hostel.api, kernel, f"warm-{number}")
            hostel.delete(f"warm-{number}")
        rows = [*in_sequence(hostel, kernel), at_once(hostel, kernel)]
    finally:
        hostel.end()
        shutil.rmtree(directory)
        shutil.rmtree(runtime_dir)
    show(document("create", tier, rows), as_json=options.json)
    return 0


def create(api: Api, kernel: str, name: str) -> Json:
    """Create and start a VM; return it as it was answered."""
    body = {"name": name, "kernel": kernel, "memory_mib": 16, "rng": False, "start": True}
    return api.post("/v1/vms?wait=60", body)


def first_instruction_ms(api: Api, vm: Json) -> float:
    """Return how long after hosteld took the request the guest's first instruction ran."""
    if vm["boot_time_us"] is None:
        vm = api.wait_vm(vm["name"], lambda vm: vm["boot_time_us"] is not None, "timed")
    return float(vm["boot_time_us"]) / 1e3


def round_trip_ms(api: Api) -> float:
    """Return what a request costs that does nothing: the part that boot_time_us leaves out."""
    began = time.monotonic()
    api.request("GET", "/v1/operations/none")
    return (time.monotonic() - began) * 1e3


def in_sequence(hostel: Hostel, kernel: str) -> list[Row]:
    """One VM after the other, all kept until the end."""
    answers, starts, trips = [], [], []
    for number in range(COUNT):
        name = f"seq-{number}"
        began = time.monotonic()
        vm = create(hostel.api, kernel, name)
        answers.append((time.monotonic() - began) * 1e3)
        starts.append(first_instruction_ms(hostel.api, vm))
        trips.append(round_trip_ms(hostel.api))
    progress(f"in sequence: {min(starts):.2f} to {max(starts):.2f} ms")
    for number in range(COUNT):
        hostel.delete(f"seq-{number}")
    # A whole empty round trip is more than the request's way in, so this errs against us.
    total = median(starts) + median(trips)
    goal = (Goal.AT_MOST, SEQUENCE_GOAL_MS)
    return [
        row(f"{COUNT} in sequence: POST to first guest instruction", "ms", total, goal=goal),
        row(f"{COUNT} in sequence: POST to its answer", "ms", median(answers)),
    ]


def at_once(hostel: Hostel, kernel: str) -> Row:
    """All VMs at once; over when every guest has run its first instruction."""
    names = [f"once-{number}" for number in range(COUNT)]
    with ThreadPoolExecutor(COUNT) as pool:
        began = time.monotonic()
        for vm in pool.map(lambda name: create(hostel.api, kernel, name), names):
            first_instruction_ms(hostel.api, vm)
        took_s = time.monotonic() - began
        list(pool.map(hostel.delete, names))
    return row(f"{COUNT} at once", "VMs/s", COUNT / took_s, goal=(Goal.AT_LEAST, AT_ONCE_GOAL))


if __name__ == "__main__":
    sys.exit(main())
