# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What the doctor says of a host."""

from __future__ import annotations

import grp
from pathlib import Path
from typing import Any

import pytest

from api.models.resources import DoctorReport
from daemon.supervisor import doctor
from daemon.supervisor.doctor import NEEDED_CAPABILITIES, Probe

ALL = dict.fromkeys(NEEDED_CAPABILITIES, 1)


def probe(**changes: Any) -> Probe:  # noqa: ANN401
    measured = {
        "api_version": 12,
        "capabilities": ALL,
        "instruction_ns": 0.4,
        "lacks_instruction": False,
    }
    return Probe({**measured, **changes}, None)


@pytest.fixture
def kvm(tmp_path: Path) -> str:
    path = tmp_path / "kvm"
    path.touch()
    return str(path)


def status(findings: DoctorReport, name: str) -> str:
    return next(check.status for check in findings.checks if check.name == name)


def test_native_ring_0_is_a_full_host(kvm: str, tmp_path: Path) -> None:
    findings = doctor.examine(kvm, tmp_path, probe())
    assert findings.tier == "full"
    assert status(findings, "ring0") == "ok"


@pytest.mark.parametrize("changes", [{"instruction_ns": 430.0}, {"lacks_instruction": True}])
def test_interpreted_ring_0_is_a_direct_host_with_a_remedy(
    kvm: str, tmp_path: Path, changes: dict[str, Any]
) -> None:
    findings = doctor.examine(kvm, tmp_path, probe(**changes))
    assert findings.tier == "direct"
    ring0 = next(check for check in findings.checks if check.name == "ring0")
    assert ring0.status == "warning"
    assert ring0.remedy is not None


def test_an_emulated_processor_is_not_taken_for_an_interpreter(kvm: str, tmp_path: Path) -> None:
    assert doctor.examine(kvm, tmp_path, probe(instruction_ns=25.0)).tier == "full"


def test_no_kvm_is_told_with_what_to_do(tmp_path: Path) -> None:
    findings = doctor.examine(str(tmp_path / "none"), tmp_path, None)
    assert findings.tier == "any"
    assert status(findings, "kvm") == "missing"


def test_a_missing_capability_is_named(kvm: str, tmp_path: Path) -> None:
    lacking = {name: 1 for name in NEEDED_CAPABILITIES if name != "KVM_CAP_IRQFD"}
    findings = doctor.examine(kvm, tmp_path, probe(capabilities=lacking))
    check = next(check for check in findings.checks if check.name == "kvm-capabilities")
    assert check.status == "missing"
    assert "KVM_CAP_IRQFD" in check.detail


def test_a_probe_that_failed_is_told(tmp_path: Path) -> None:
    failed = doctor.run_probe(str(tmp_path / "none"))
    assert failed.measured is None
    assert "No such file" in (failed.problem or "")


def test_a_host_that_was_not_measured_is_not_taken_for_a_full_one(kvm: str, tmp_path: Path) -> None:
    findings = doctor.examine(kvm, tmp_path, Probe(None, "the probe did not end"))
    assert findings.tier == "any"
    assert status(findings, "ring0") == "missing"


def test_who_may_not_open_a_node_is_told_how_to_be_let_in(
    kvm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    node = tmp_path / "vhost-net"
    node.touch(mode=0o660)
    check = doctor.check_node("vhost-net", str(node), "modprobe vhost_net")
    assert check.status == "warning"
    group = grp.getgrgid(node.stat().st_gid).gr_name
    wanted = "run hosteld as root" if group == "root" else f"usermod -a -G {group} USER"
    assert (check.remedy or "").startswith(wanted)
    node.chmod(0o600)
    check = doctor.check_node("vhost-net", str(node), "modprobe vhost_net")
    assert check.remedy == "run hosteld as root"


def test_every_lack_has_a_remedy(kvm: str, tmp_path: Path) -> None:
    for check in doctor.examine(kvm, tmp_path, probe()).checks:
        assert check.status == "ok" or check.remedy is not None


def test_what_no_vm_uses_is_no_lack(kvm: str, tmp_path: Path) -> None:
    findings = doctor.examine(kvm, tmp_path, probe())
    assert [status(findings, name) for name in ("hugepages", "cgroup-v2", "ksm")] == ["ok"] * 3
