# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""docs/api.md is true of a real hosteld with a real KVM; the guest is one of a few bytes."""

from __future__ import annotations

import shutil

import pytest

from tests.kvm.hosteld.test_hotplug import PLUGGING
from tests.support import tiny_kernel as tiny
from tests.support.hostel import Hostel
from tests.support.tour import run_tour


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_every_line_of_the_tour_works_as_pasted(own_hostel: Hostel) -> None:
    files = own_hostel.directory
    kernel = tiny.write_elf(files / "kernel", tiny.boot_timer() + tiny.say("hello") + PLUGGING)
    for name in ("initrd", "disk", "other"):
        (files / name).write_bytes(bytes(1 << 20))
    variables = {
        "HOSTEL_SOCKET": str(own_hostel.daemon.socket),
        "KERNEL": str(kernel),
        "INITRD": str(files / "initrd"),
        "DISK": str(files / "disk"),
        "OTHER_DISK": str(files / "other"),
    }
    run_tour(variables, {"web-1-net1": own_hostel.tap("tour")})
    own_hostel.wait_workers()
    for kind in ("vms", "kernels", "images"):
        assert own_hostel.api.get(f"/v1/{kind}")["items"] == []
