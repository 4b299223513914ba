# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What benchmarks with Linux guests share: where they run, and a hosteld that has their guest."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from bench.common import Row, document, progress, show
from lab import cpio
from lab.guests import Guest, find_guest
from lab.hosteld import ROOT
from lab.where import in_lab, lab_command, why_not_here
from tests.support.hostel import Hostel

LAB_RUN_LIMIT_S: Final = 1800


def run(
    name: str,
    arguments: argparse.ArgumentParser,
    measure: Callable[[Guest, argparse.Namespace], Any],
    rows: Callable[[Any], list[Row]],
) -> int:
    """Measure here, or in one run of the lab where this host cannot; print the result.

    Args:
        name: of the benchmark, and of its module.
        arguments: its options, which the lab gets as they are.
        measure: returns samples that JSON can hold.
        rows: makes the result of them.
    """
    arguments.add_argument("--samples", action="store_true", help="print raw samples as JSON")
    options = arguments.parse_args()
    if options.samples:
        print(json.dumps(measure(find_guest(), options)))
        return 0
    if (reason := why_not_here()) is None:
        samples, tier = measure(find_guest(), options), "lab" if in_lab() else "full"
    else:
        progress(f"not on this machine itself: {reason}; so in the lab")
        samples, tier = json.loads(_samples_of_lab(name)), "lab"
    show(document(name, tier, rows(samples)), as_json=options.json)
    return 0


def _samples_of_lab(name: str) -> bytes:
    options = [word for word in sys.argv[1:] if word != "--json"]
    command = lab_command([sys.executable, "-m", f"bench.{name}", "--samples", *options])
    find_guest()  # made here, where it is quick
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, timeout=LAB_RUN_LIMIT_S, check=True
    )
    return done.stdout


def initrd_with(guest: Guest, files: Mapping[str, bytes]) -> bytes:
    """Return the guest's initrd with programs of one's own: the kernel lets later archives win."""
    archive = cpio.Archive()
    for path, data in files.items():
        archive.file(path, data, 0o755)
    first = guest.initrd.read_bytes()
    return first + bytes(-len(first) % 4) + archive.to_bytes()


@contextmanager
def hosteld(directory: Path, guest: Guest, initrd: Path) -> Iterator[Hostel]:
    """Yield one with the kernel ``debian`` and the initrd ``load``; it ends with its VMs."""
    directory.mkdir()
    hostel = Hostel(directory)
    try:
        hostel.start()
        hostel.api.post("/v1/kernels?wait=60", {"name": "debian", "path": str(guest.kernel)})
        image = {"name": "load", "kind": "initrd", "path": str(initrd)}
        hostel.api.post("/v1/images?wait=60", image)
        yield hostel
    finally:
        hostel.end()
