# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The peer: QEMU with KVM, at its best, with the same kernel, initrd, command line and RAM."""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PROGRAM: Final = "qemu-system-x86_64"
# rtc=on: without one, Linux waits 1.2 s for it.
MACHINES: Final = {
    "microvm": "microvm,rtc=on",
    "microvm-pci": "microvm,rtc=on,acpi=on,pcie=on,pit=on,pic=on",
    "q35": "q35",
}
# What a first start reads from a disk, a second one finds in memory.
FIRMWARE: Final = ("/usr/share/qemu", "/usr/share/seabios")
FIRMWARE_NAMES: Final = ("bios*.bin", "*boot*.bin", "pvh.bin", "kvmvapic.bin")
RAM_NAME: Final = "memory-backend-memfd"


@dataclass(frozen=True)
class Peer:
    """One QEMU guest to be."""

    machine: str  # a key of MACHINES
    kernel: Path  # an ELF is entered by PVH, a bzImage as QEMU does it
    initrd: Path
    cmdline: str
    memory_mib: int
    # A mapping of its own, which costs QEMU the huge pages that it gives its RAM otherwise; another
    # process can map it too.
    has_named_ram: bool = False
    devices: tuple[str, ...] = ()
    cpus: int = 1
    program: tuple[str, ...] = (PROGRAM,)

    def command(self) -> list[str]:
        """Return the command line; nothing that is not needed is there."""
        machine, ram = f"{MACHINES[self.machine]},accel=kvm", []
        if self.has_named_ram:
            machine += ",memory-backend=ram"
            ram = ["-object", f"{RAM_NAME},id=ram,size={self.memory_mib}M,share=on"]
        return [
            *(*self.program, "-M", machine, *ram),
            *("-m", str(self.memory_mib), "-cpu", "host", "-smp", str(self.cpus)),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-serial", "stdio", "-kernel", str(self.kernel), "-initrd", str(self.initrd)),
            *("-append", self.cmdline, *self.devices),
        ]

    @contextmanager
    def running(self, marker: bytes, limit_s: float) -> Iterator[tuple[int, float]]:
        """Run the guest; yield QEMU's process id and the seconds from exec to the marker.

        Raises:
            TimeoutError: the marker did not come.
        """
        with subprocess.Popen(
            self.command(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process:
            # Popen returns when exec has succeeded: forking this Python is not QEMU's time.
            began = time.monotonic()
            try:
                yield process.pid, _await(process, marker, limit_s) - began
            finally:
                process.kill()

    def boot_s(self, marker: bytes, limit_s: float) -> float:
        """Boot it once; return the seconds from exec to the marker."""
        with self.running(marker, limit_s) as (_, seconds):
            return seconds


def _await(process: subprocess.Popen[bytes], marker: bytes, limit_s: float) -> float:
    """Read a guest's serial port until the marker comes; return when that was."""
    assert process.stdout is not None
    fd = process.stdout.fileno()
    deadline = time.monotonic() + limit_s
    data = b""
    while marker not in data:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([fd], [], [], left)[0]:
            raise TimeoutError(f"QEMU: no {marker!r} in {limit_s:g} s; it said: {data[-500:]!r}")
        piece = os.read(fd, 65536)
        if not piece:
            raise TimeoutError(f"QEMU ended early; it said: {data[-500:]!r}")
        data += piece
    return time.monotonic()


def copy_to(directory: Path) -> tuple[str, ...]:
    """Copy QEMU's program, libraries and firmware into a directory; return how to start it there.

    In the lab the host's files are behind 9p, where each open(2) is a wait, and time that is
    counted by instructions runs away in a wait.
    """
    found = subprocess.run(
        ["ldd", shutil.which(PROGRAM) or PROGRAM], stdout=subprocess.PIPE, text=True, check=True
    )
    libraries = re.findall(r"(/\S+) \(0x", found.stdout)
    firmware = (p for base in FIRMWARE for name in FIRMWARE_NAMES for p in Path(base).glob(name))
    for path in (shutil.which(PROGRAM) or PROGRAM, *libraries, *firmware):
        if not (directory / Path(path).name).exists():  # as QEMU looks: the first place counts
            shutil.copy(path, directory)
    (loader,) = directory.glob("ld-linux*.so*")
    program = directory / PROGRAM
    return (str(loader), "--library-path", str(directory), str(program), "-L", str(directory))


def warm_up(*files: Path) -> None:
    """Bring QEMU's program, libraries and firmware, and more files, into the page cache."""
    subprocess.run([PROGRAM, "--version"], stdout=subprocess.DEVNULL, check=True)
    firmware = (p for base in FIRMWARE for name in FIRMWARE_NAMES for p in Path(base).glob(name))
    for path in (*firmware, *files):
        if path.is_file():
            path.read_bytes()
