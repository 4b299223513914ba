# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What becomes of a vCPU whose KVM_RUN fails."""

from __future__ import annotations

import errno
import threading
from typing import Any, cast

import pytest

from daemon.worker.vcpus import EXIT_DEFECT, EXIT_MEMORY_LOST, VcpuThreads
from kvm_ffi.errors import KvmError
from kvm_ffi.vcpu import Vcpu


class FailingVcpu:
    """A vCPU that never gets into its guest."""

    index = 0
    exit = None

    def __init__(self, error: Exception) -> None:
        self.error = error

    def run(self) -> int:
        raise self.error

    def kick(self) -> None:
        pass

    def clear_kick(self) -> None:
        pass


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (KvmError("KVM_RUN", errno.EFAULT), EXIT_MEMORY_LOST),
        (KvmError("KVM_RUN", errno.EIO), EXIT_DEFECT),
        (KvmError("KVM_SET_USER_MEMORY_REGION", errno.EFAULT), EXIT_DEFECT),
    ],
)
def test_it_parks_and_says_whether_the_host_lacks_its_memory(error: Exception, kind: int) -> None:
    told: list[int] = []
    has_told = threading.Event()

    def on_fatal(_: Vcpu, kind: int) -> None:
        told.append(kind)
        has_told.set()

    nothing = cast("Any", None)
    vcpu = cast("Vcpu", FailingVcpu(error))
    threads = VcpuThreads([vcpu], nothing, nothing, nothing, on_fatal)
    threads.run()
    assert has_told.wait(10)
    threads.park()
    threads.end()
    assert told == [kind]
