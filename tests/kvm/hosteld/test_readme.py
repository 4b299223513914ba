# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The README's `hostel` lines do as they are written; the guest is one of a few bytes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.kvm.hosteld.test_hotplug import PLUGGING
from tests.support import tiny_kernel as tiny
from tests.support.hostel import Hostel

README = (Path(__file__).parents[3] / "README.md").read_text()
LIMIT_S = 100.0
GUEST = "/tmp/guest"


def lines() -> list[str]:
    """Return the commands of "Use it" that follow the start of hosteld."""
    part = README.split("## Use it")[1].split("\n## ")[0].replace("\\\n", " ")
    block = part.split("guest/build.py")[1]
    return re.findall(r"^    ((?:hostel|truncate) .*)$", block, re.MULTILINE)


def test_every_hostel_line_of_the_readme_works(own_hostel: Hostel) -> None:
    files = own_hostel.directory
    tiny.write_elf(files / "vmlinuz", tiny.boot_timer() + PLUGGING)
    for name in ("initrd.img", "disk.raw"):
        (files / name).write_bytes(bytes(1 << 20))
    commands = lines()
    assert [line.split()[1] for line in commands].count("vm") > 5
    script = "\n".join(commands).replace(GUEST, str(files))
    # This guest has no ACPI driver that would hear the power button.
    script = script.replace("vm stop web-1", "vm stop web-1 --timeout 1")
    hostel = f'hostel() {{ "{sys.executable}" -m api.cli.main "$@"; }}'
    root = Path(__file__).parents[3]
    variables = {"HOSTEL_SOCKET": str(own_hostel.daemon.socket), "PYTHONPATH": str(root)}
    run = subprocess.run(
        ["sh", "-e", "-c", f"{hostel}\n{script}"],
        env=os.environ | variables,
        cwd=files,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr
    vm = own_hostel.api.vm("web-1")
    assert (vm["state"], vm["vcpus"], vm["memory_mib"]) == ("stopped", 4, 512)
    assert [(disk["id"], disk["size_bytes"]) for disk in vm["disks"]] == [
        ("root", 4096 << 20),
        ("data", 1 << 30),
    ]
    own_hostel.delete("web-1")
