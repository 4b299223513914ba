# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What this host can do, and what to do about each lack.

Every check looks and changes nothing. Whether ring 0 runs natively is measured (probe.py), since no
capability tells it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from api.errors import ApiError
from api.models.resources import Check

from . import procfs
from .backend_tools import find_tool
from .launch import MIB, open_kvm

Tier = Literal["any", "direct", "full"]

# An emulated host takes seconds to start Python.
PROBE_TIMEOUT_S: Final = 60.0
# A processor needs below 1 ns for an instruction, an emulated processor some 10, KVM's emulator
# 400 and more.
INTERPRETED_NS: Final = 100.0
MIN_STATE_BYTES: Final = 1 << 30
MIN_MEMORY_BYTES: Final = 512 * MIB
NEEDED_API_VERSION: Final = 12
NEEDED_CAPABILITIES: Final = (
    "KVM_CAP_USER_MEMORY",
    "KVM_CAP_IRQCHIP",
    "KVM_CAP_PIT2",
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


@dataclass(frozen=True, slots=True)
class Findings:
    """All checks, and the tier that they amount to."""

    tier: Tier
    checks: list[Check]


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


def examine(kvm_device: str, state_dir: Path, probe: Probe | None) -> Findings:
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
        tier = "direct" if probe.is_interpreted else "full"
    checks += [
        _check_tun(),
        _check_net_admin(),
        _check_node("vhost-net", "/dev/vhost-net", "modprobe vhost_net"),
        _check_node("vhost-vsock", "/dev/vhost-vsock", "modprobe vhost_vsock"),
        *_check_back_ends(),
        _check_hugepages(),
        _check_cgroup(),
        _check_ksm(),
        _check_memory(),
        _check_state_dir(state_dir),
    ]
    return Findings(tier, checks)


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


def _check_node(name: str, path: str, remedy: str) -> Check:
    if not Path(path).exists():
        return _warn(name, f"{path} is not there; Hostel does without it", remedy)
    if not os.access(path, os.R_OK | os.W_OK):
        return _warn(name, f"{path}: no permission for uid {os.geteuid()}", None)
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
        return _warn("tun", f"{path}: no permission for uid {os.geteuid()}", f"chmod 0666 {path}")
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


def _check_hugepages() -> Check:
    free = Path("/proc/meminfo").read_text().partition("HugePages_Free:")[2].split()
    count = int(free[0]) if free else 0
    if count:
        return _ok("hugepages", f"{count} free")
    return _warn(
        "hugepages", "none reserved; Hostel does without them so far", "sysctl vm.nr_hugepages=N"
    )


def _check_cgroup() -> Check:
    controllers = Path("/sys/fs/cgroup/cgroup.controllers")
    if not controllers.exists():
        return _warn(
            "cgroup-v2",
            "the unified hierarchy is not mounted at /sys/fs/cgroup: VMs get no limits",
            "boot with systemd.unified_cgroup_hierarchy=1",
        )
    return _ok("cgroup-v2", f"controllers: {controllers.read_text().strip() or 'none'}")


def _check_ksm() -> Check:
    path = Path("/sys/kernel/mm/ksm/run")
    if not path.exists():
        return _warn("ksm", "the kernel has no page sharing (CONFIG_KSM)", None)
    if path.read_text().strip() == "1":
        return _ok("ksm", "same pages of guests are shared")
    return _warn("ksm", "page sharing is off", f"echo 1 > {path}")


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
        checks = [check.model_dump() for check in findings.checks]
        write(json.dumps({"tier": findings.tier, "checks": checks}, indent=2) + "\n")
    else:
        lines = []
        for check in findings.checks:
            lines.append(f"{check.status:8} {check.name:20} {check.detail}\n")
            if check.remedy:
                lines.append(f"{'':29} -> {check.remedy}\n")
        write("".join([*lines, f"tier: {findings.tier}\n"]))
    return int(any(check.status == "missing" for check in findings.checks))
