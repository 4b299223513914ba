# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Where the Linux guest's files are: built when they are missing, handed on into the lab."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lab.errors import LAB_FAILED, LabError
from lab.hosteld import ROOT
from lab.layout import default_cache

# Passed on by the lab, like everything that starts with HOSTEL_.
VARIABLE: Final = "HOSTEL_GUEST"
BUILD_LIMIT_S: Final = 900


@dataclass(frozen=True)
class Guest:
    """The files that guest/build.py makes, and what their consoles say."""

    kernel: Path
    initrd: Path
    instant: Path  # an initrd whose init reports to the boot timer and waits
    load: Path  # an initrd whose init puts load on a disk, or data that can be checked
    disk: Path
    ready_line: str
    instant_line: str

    # Not `quiet`: people watch it boot.
    cmdline: str = "console=ttyS0 root=/dev/vda rw reboot=k panic=-1"


def find_guest() -> Guest:
    """Return the guest's files, building what is missing or old.

    Raises:
        LabError: they cannot be built; the builder has said why.
    """
    given = os.environ.get(VARIABLE)
    directory = Path(given) if given else default_cache() / "guest"
    if not given:
        builder = [sys.executable, str(ROOT / "guest" / "build.py"), str(directory)]
        # Its report is for those who call it themselves.
        run = subprocess.run(builder, stdout=subprocess.DEVNULL, timeout=BUILD_LIMIT_S, check=False)
        if run.returncode != 0:
            raise LabError("the guest's files cannot be built")
        os.environ[VARIABLE] = str(directory)
    return read_guest(directory)


def read_guest(directory: Path) -> Guest:
    """Return the guest that was built into a directory.

    Raises:
        LabError: there is none.
    """
    try:
        manifest = json.loads((directory / "manifest.json").read_text())
    except (OSError, ValueError) as err:
        raise LabError(f"no guest in {directory}: {err}") from err
    return Guest(
        kernel=directory / "vmlinuz",
        initrd=directory / "initrd.img",
        instant=directory / "initrd-min.img",
        load=directory / "initrd-load.img",
        disk=directory / "disk.raw",
        ready_line=manifest["ready_line"],
        instant_line=manifest["boot_timer"]["console_line"],
    )


def main() -> int:
    """Build what is missing, and print where it is: for the Makefile."""
    try:
        guest = find_guest()
    except LabError as err:
        print(f"guest: {err}", file=sys.stderr)
        return LAB_FAILED
    print(guest.kernel.parent)
    return 0


if __name__ == "__main__":
    sys.exit(main())
