# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What a process has open, by names that a test can compare."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

# What every worker has, besides what belongs to its VM: standard input; the zygote's memory, and
# what gives it back; its loops; KVM and what came of it; guest memory.
WORKER_KINDS = {
    "/dev/null",
    "memfd:hostel-heap",
    "own maps",
    "own pagemap",
    "own task",
    "eventpoll",
    "eventfd",
    "/dev/kvm",
    "kvm-vm",
    "kvm-vcpu",
    "memfd:hostel-ram",
}


def held_by(pid: int) -> Counter[str]:
    """Return how often a process holds what: paths, kinds, sockets and taps by their names."""
    sockets = _unix_sockets()
    held: Counter[str] = Counter()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        name = str(link.readlink()).removesuffix(" (deleted)")
        name = re.sub(rf"^/proc/{pid}/", "own ", name)
        name = re.sub(r"^/(?=memfd:)", "", name)
        name = re.sub(r"^anon_inode:\[?([a-z-]+).*", r"\1", name)
        if found := re.fullmatch(r"socket:\[(\d+)\]", name):
            name = f"socket {sockets.get(found[1], found[1])}"
        if name == "/dev/net/tun":
            info = Path(f"/proc/{pid}/fdinfo/{link.name}").read_text()
            name = "tap " + "".join(re.findall(r"^iff:\s*(\S+)", info, re.MULTILINE))
        held[name] += 1
    return held


def _unix_sockets() -> dict[str, str]:
    """Return what Unix sockets are bound to or accepted from, by inode."""
    found = {}
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split(maxsplit=7)
        is_listening = int(fields[3], 16) & 0x10000  # __SO_ACCEPTCON
        path = fields[7] if len(fields) > 7 else "without a name"
        found[fields[6]] = f"listening on {path}" if is_listening else f"of {path}"
    return found
