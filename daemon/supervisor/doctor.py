# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What this host can do, and what to do about each lack.

Every check looks and changes nothing. Whether ring 0 runs natively is measured (probe.py), since no
capability tells it.
"""

from __future__ import annotations

import grp
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from api.errors import ApiError
from api.models.resources import Check, DoctorReport, Tier

from . import procfs
from .backend_tools import find_tool
from .launch import MIB, open_kvm

# An emulated host takes seconds to start Python. Below what any client gives the whole answer.
PROBE_TIMEOUT_S: Final = 40.0
# A processor needs below 1 ns for an instruction, an emulated processor some 10, KVM's emulator
# 400 and more.
INTERPRETED_NS: Final = 100.0
MIN_STATE_BYTES: Final = 1 << 30
MIN_MEMORY_BYTES: Final = 512 * MIB
NEEDED_API_VERSION: Final = 12
NEEDED_CAPABILITIES: Final = (
    "KVM_CAP_USER_MEMORY",
    "KVM_CAP_IRQCHIP",
    "KVM_CAP_IRQFD",
    "KVM_CAP_IOEVENTFD",
    "KVM_CAP_IRQ_ROUTING",
    "KVM_CAP_SIGNAL_MSI",
    "KVM_CAP_IMMEDIATE_EXIT",
    "KVM_CAP_EXT_CPUID",
    "KVM_CAP_MP_STATE",
    "KVM_CAP_SET_TSS_ADDR",
    "KVM_CAP_SET_IDENTITY_MAP_ADDR",
    "KVM_CAP_ADJUST_CLOCK",
)
_CAP_NET_ADMIN: Final = 12  # Linux include/uapi/linux/capability.h


@dataclass(frozen=True, slots=True)
class Probe:
    """What the probe process told, or why it told nothing."""

    measured: dict[str, Any] | None
    problem: str | None

    @property
    def is_interpreted(self) -> bool:
        """Whether ring 0 is interpreted."""
        return self.measured is not None and (
            bool(self.measured["lacks_instruction"])
            or float(self.measured["instruction_ns"]) > INTERPRETED_NS
        )


def run_probe(kvm_device: str) -> Probe:
    """Measure in a process of its own.

    Threads: any; blocks for a fraction of a second, PROBE_TIMEOUT_S at the most.
    """
    root = str(Path(__file__).resolve().parents[2])
    argv = [sys.executable, "-m", "daemon.supervisor.probe", kvm_device]
    path = os.environ.get("PYTHONPATH")
    env = {**os.environ, "PYTHONPATH": f"{root}:{path}" if path else root}
    try:
        done = subprocess.run(
            argv, env=env, capture_output=True, timeout=PROBE_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as err:
        return Probe(None, f"the probe did not end: {err}")
    if done.returncode != 0:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        return Probe(None, f"the probe failed: {' '.join(last)}")
    return Probe(json.loads(done.stdout), None)


def examine(kvm_device: str, state_dir: Path, probe: Probe | None) -> DoctorReport:
    """Check everything.

    Args:
        kvm_device: path of /dev/kvm.
        state_dir: hosteld's, or where it would be.
        probe: what run_probe() returned; None where KVM cannot be opened.
    """
    kvm = check_kvm(kvm_device)
    checks = [kvm]
    tier: Tier = "any"
    if kvm.status == "ok" and probe is not None:
        checks += [*_probe_checks(probe)]
        if probe.measured is not None:
            tier = "direct" if probe.is_interpreted else "full"
    checks += [
        _check_tun(),
        _check_net_admin(),
        check_node("vhost-net", "/dev/vhost-net", "modprobe vhost_net"),
        check_node("vhost-vsock", "/dev/vhost-vsock", "modprobe vhost_vsock"),
        *_check_back_ends(),
        *_unused_so_far(),
        _check_memory(),
        _check_state_dir(state_dir),
    ]
    return DoctorReport(tier=tier, checks=checks)


def _ok(name: str, detail: str) -> Check:
    return Check(name=name, status="ok", detail=detail, remedy=None)


def _warn(name: str, detail: str, remedy: str | None) -> Check:
    return Check(name=name, status="warning", detail=detail, remedy=remedy)


def _miss(name: str, detail: str, remedy: str | None) -> Check:
    return Check(name=name, status="missing", detail=detail, remedy=remedy)


def check_kvm(path: str) -> Check:
    """Say whether the KVM device can be opened."""
    try:
        os.close(open_kvm(path))
    except ApiError as err:
        detail, _, remedy = err.detail.partition("; ")
        return _miss("kvm", detail, remedy or None)
    return _ok("kvm", f"{path} can be opened")


def _probe_checks(probe: Probe) -> list[Check]:
    if probe.measured is None:
        return [_miss("ring0", probe.problem or "not measured", "see the kernel log: dmesg")]
    version = int(probe.measured["api_version"])
    checks = [
        _ok("kvm-api", f"version {version}")
        if version == NEEDED_API_VERSION
        else _miss("kvm-api", f"version {version}, must be {NEEDED_API_VERSION}", "use Linux")
    ]
    have = probe.measured["capabilities"]
    lacking = [name for name in NEEDED_CAPABILITIES if name not in have]
    checks.append(
        _miss("kvm-capabilities", f"lacks {', '.join(lacking)}", "use Linux 5.10 or later")
        if lacking
        else _ok("kvm-capabilities", f"all {len(NEEDED_CAPABILITIES)} that are needed")
    )
    took = f"{float(probe.measured['instruction_ns']):g} ns an instruction"
    if probe.is_interpreted:
        lack = ", and CLAC is unknown to it" if probe.measured["lacks_instruction"] else ""
        checks.append(
            _warn(
                "ring0",
                f"interpreted, {took}{lack}: this host runs tiny guests, not stock kernels",
                "use a host with VT-x or AMD-V, or nested virtualization; or run in the lab",
            )
        )
    else:
        checks.append(_ok("ring0", f"native, {took}: this host runs stock kernels"))
    return checks


def _node_remedy(path: str) -> str:
    """Return how this user may be let in at a device node: through its group, if it has one."""
    node = Path(path).stat()
    if node.st_gid != 0 and node.st_mode & 0o060 == 0o060:
        try:
            return f"usermod -a -G {grp.getgrgid(node.st_gid).gr_name} USER, then log in again"
        except KeyError:
            pass  # a group without a name, as in a container
    return "run hosteld as root"


def check_node(name: str, path: str, remedy: str) -> Check:
    """Say whether a device node that Hostel can do without can be opened.

    Args:
        remedy: what brings the node, where it is not there.
    """
    if not Path(path).exists():
        return _warn(name, f"{path} is not there; Hostel does without it", remedy)
    if not os.access(path, os.R_OK | os.W_OK):
        return _warn(
            name,
            f"{path}: no permission for uid {os.geteuid()}; Hostel does without it",
            _node_remedy(path),
        )
    return _ok(name, f"{path} can be opened")


def _check_back_ends() -> list[Check]:
    checks = []
    for name, use in (("qemu-storage-daemon", "disks in formats, NBD"), ("virtiofsd", "shares")):
        try:
            found = find_tool(name)
        except ApiError as err:
            remedy = err.detail.partition(": ")[2]
            checks.append(_warn(name, f"is not installed: no VM gets {use}", remedy))
            continue
        if name == "virtiofsd" and os.geteuid() != 0:
            checks.append(_warn(name, f"{found} needs root: no VM gets {use}", "run as root"))
        else:
            checks.append(_ok(name, f"{found} serves {use}"))
    return checks


def _check_tun() -> Check:
    path = "/dev/net/tun"
    if not Path(path).exists():
        return _warn("tun", f"{path} is not there: VMs get no network", "modprobe tun")
    if not os.access(path, os.R_OK | os.W_OK):
        detail = f"{path}: no permission for uid {os.geteuid()}: VMs get no network"
        return _warn("tun", detail, f"chmod 0666 {path}")
    return _ok("tun", f"{path} can be opened")


def _check_net_admin() -> Check:
    status = Path("/proc/self/status").read_text()
    effective = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff"))
    if int(effective, 16) >> _CAP_NET_ADMIN & 1:
        return _ok("net-admin", "taps can be made and put on bridges")
    return _warn(
        "net-admin",
        "no CAP_NET_ADMIN: only taps that were made for this user can be used",
        "run hosteld as root, or: ip tuntap add NAME mode tap vnet_hdr user USER",
    )


def _unused_so_far() -> list[Check]:
    """Tell what the host has and no VM uses yet: nothing of it is a lack, and nothing to do."""
    free = Path("/proc/meminfo").read_text().partition("HugePages_Free:")[2].split()
    controllers = Path("/sys/fs/cgroup/cgroup.controllers")
    cgroup = controllers.read_text().strip() if controllers.exists() else "not mounted"
    ksm = Path("/sys/kernel/mm/ksm/run")
    sharing = "the kernel has none" if not ksm.exists() else f"run is {ksm.read_text().strip()}"
    return [
        _ok("hugepages", f"{free[0] if free else 'none'} free; no VM uses them"),
        _ok("cgroup-v2", f"{cgroup or 'no controllers'}; hosteld sets no limits"),
        _ok("ksm", f"{sharing}; no VM offers it pages"),
    ]


def _check_memory() -> Check:
    total, available = procfs.memory()
    text = f"{available // MIB} of {total // MIB} MiB available"
    if available < MIN_MEMORY_BYTES:
        return _warn("memory", text, "stop what is not needed")
    return _ok("memory", text)


def _check_state_dir(path: Path) -> Check:
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free
    text = f"{path}: {free // MIB} MiB free"
    if not os.access(path, os.W_OK):
        return _miss("state-dir", f"{path} is not writable", "choose another with --state-dir")
    if free < MIN_STATE_BYTES:
        return _warn("state-dir", text, "make room, or choose another with --state-dir")
    return _ok("state-dir", text)


def main(kvm_device: str, state_dir: Path, *, as_json: bool, write: Callable[[str], object]) -> int:
    """Print all checks; return 1 when something is missing without which no VM runs."""
    probe = run_probe(kvm_device) if check_kvm(kvm_device).status == "ok" else None
    findings = examine(kvm_device, state_dir, probe)
    if as_json:
        write(findings.model_dump_json(indent=2) + "\n")
    else:
        lines = []
        for check in findings.checks:
            lines.append(f"{check.status:8} {check.name:20} {check.detail}\n")
            if check.remedy:
                lines.append(f"{'':29} -> {check.remedy}\n")
        write("".join([*lines, f"tier: {findings.tier}\n"]))
    return int(any(check.status == "missing" for check in findings.checks))
