# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The emulated machine: QEMU's command line, and what its death means."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lab.errors import LabError

PROGRAM: Final = "qemu-system-x86_64"
AGENT_PORT: Final = 1  # in the lab; see agent.py
READY_LINE: Final = "lab: ready"
FAILED_PREFIX: Final = "lab: failed: "
# svm: the point of all this. la57 off: 5-level paging doubles the cost of a nested page walk.
CPU: Final = "max,+svm,-la57"
CMDLINE: Final = (
    "console=ttyS0 reboot=t panic=-1 mitigations=off tsc=reliable quiet loglevel=1"
    " systemd.unified_cgroup_hierarchy=1"
)


@dataclass(frozen=True)
class Forward:
    """A port of this machine's loopback that leads to one of the lab's."""

    host_port: int
    guest_port: int


@dataclass(frozen=True)
class Disk:
    """A raw file that the lab sees as a virtio disk with the serial number `serial`."""

    serial: str
    file: Path
    writable: bool = False


@dataclass(frozen=True)
class Machine:
    """All that a lab is made of."""

    kernel: Path
    initrd: Path
    control: Path  # directory with the agent and its configuration
    out: Path  # directory that the lab may write to
    console: Path  # file that receives the serial console
    agent_port: int
    disks: tuple[Disk, ...] = ()
    forwards: tuple[Forward, ...] = ()
    memory_mib: int = 3072
    cpus: int = 1
    icount: bool = False

    def command(self) -> list[str]:
        """Return QEMU's command line."""
        accel = ["-accel", "tcg,thread=multi,tb-size=512"]
        if self.icount:
            # Emulated time follows instructions: slower, but nearly the same in each run.
            accel = ["-accel", "tcg,thread=single,tb-size=512", "-icount", "shift=0,sleep=off"]
        return [
            *(PROGRAM, "-M", "q35", *accel, "-cpu", CPU),
            *("-smp", "1" if self.icount else str(self.cpus), "-m", str(self.memory_mib)),
            *("-kernel", str(self.kernel), "-initrd", str(self.initrd), "-append", CMDLINE),
            *("-display", "none", "-no-reboot", "-nodefaults", "-monitor", "none"),
            *("-serial", f"file:{_escape(self.console)}", "-device", "virtio-rng-pci"),
            *_share("root", Path("/"), "readonly=on,multidevs=remap"),
            *_share("lab", self.control, "readonly=on"),
            *_share("out", self.out, "multidevs=remap"),
            *(word for disk in self.disks for word in _disk(disk)),
            *("-netdev", self._network(), "-device", "virtio-net-pci,netdev=net,romfile="),
        ]

    def _network(self) -> str:
        # restrict: nothing in the lab reaches this machine or beyond, except as an answer.
        agent = Forward(self.agent_port, AGENT_PORT)
        rules = [
            f"hostfwd=tcp:127.0.0.1:{f.host_port}-10.0.2.15:{f.guest_port}"
            for f in (agent, *self.forwards)
        ]
        return ",".join(["user,id=net,restrict=on", *rules])


def _escape(path: Path) -> str:
    """Write a path as an option value, where QEMU doubles each comma."""
    return str(path).replace(",", ",,")


def _share(tag: str, path: Path, options: str) -> list[str]:
    return ["-virtfs", f"local,path={_escape(path)},mount_tag={tag},security_model=none,{options}"]


def _disk(disk: Disk) -> list[str]:
    mode = "cache=unsafe,discard=unmap" if disk.writable else "readonly=on"
    drive = f"if=none,id={disk.serial},format=raw,file={_escape(disk.file)},{mode}"
    device = f"virtio-blk-pci,drive={disk.serial},serial={disk.serial}"
    return ["-drive", drive, "-device", device]


def explain_death(stderr: str, console: str, forwards: tuple[Forward, ...]) -> LabError:
    """Say in one line why QEMU ended before the lab was ready.

    Args:
        stderr: All that QEMU printed.
        console: All that the lab's kernel and init printed.
        forwards: The forwards that the caller asked for.
    """
    for forward in forwards:
        if f"hostfwd=tcp:127.0.0.1:{forward.host_port}-" in stderr or (
            f"127.0.0.1:{forward.host_port}-" in stderr and "host forwarding" in stderr
        ):
            return LabError(f"port 127.0.0.1:{forward.host_port} is in use: choose another one")
    for line in console.splitlines():
        if line.startswith(FAILED_PREFIX):
            return LabError(f"the lab did not start: {line.removeprefix(FAILED_PREFIX)}")
    tail = (stderr.strip() or console.strip() or "it printed nothing").splitlines()[-5:]
    return LabError("QEMU ended before the lab was ready: " + " | ".join(tail))
