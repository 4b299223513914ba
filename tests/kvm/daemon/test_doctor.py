# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What the doctor says of the KVM of this host."""

from __future__ import annotations

import re
from pathlib import Path

from daemon.supervisor import doctor


def has_virtualization() -> bool:
    """Tell whether the processor says that it has VT-x or AMD-V, real or nested."""
    return re.search(r"^flags\b.* (vmx|svm)\b", Path("/proc/cpuinfo").read_text(), re.M) is not None


def test_ring_0_is_native_where_the_processor_has_virtualization_and_nowhere_else(
    tmp_path: Path,
) -> None:
    probe = doctor.run_probe("/dev/kvm")
    assert probe.problem is None
    assert probe.measured is not None
    assert probe.is_interpreted is not has_virtualization()
    findings = doctor.examine("/dev/kvm", tmp_path, probe)
    assert findings.tier == ("full" if has_virtualization() else "direct")


def test_this_kvm_has_all_that_is_called_needed(tmp_path: Path) -> None:
    checks = doctor.examine("/dev/kvm", tmp_path, doctor.run_probe("/dev/kvm")).checks
    found = {check.name: check for check in checks}
    assert found["kvm-api"].status == "ok"
    assert found["kvm-capabilities"].status == "ok", found["kvm-capabilities"].detail
