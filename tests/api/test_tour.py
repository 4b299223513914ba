# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Every line of docs/api.md works as pasted; tests/kvm/hosteld/test_tour.py asks a real hosteld."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.api.live import LiveServer
from tests.support.tour import TOUR, run_tour


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_every_line_works_as_pasted(live: LiveServer, tmp_path: Path) -> None:
    variables = {"HOSTEL_SOCKET": live.path}
    for name in ("KERNEL", "INITRD", "DISK", "OTHER_DISK"):
        path = tmp_path / name.lower()
        path.write_bytes(b"\x7fELF" if name == "KERNEL" else bytes(4096))
        variables[name] = str(path)
    run_tour(variables, {})
    assert not live.service.vms
    assert not live.service.kernels
    assert not live.service.images


def test_every_variable_is_set_before_it_is_used() -> None:
    blocks = "".join(re.findall(r"^```(?:sh)?\n(.*?)^```$", TOUR, re.DOTALL | re.MULTILINE))
    for name in set(re.findall(r"\$\{?([A-Z_]+)", blocks)):
        first_set = re.search(rf"(?:^|[ \n]){name}=", blocks)
        first_used = re.search(rf"\$\{{?{name}\b", blocks)
        assert first_set, f"{name} is set nowhere"
        assert first_used
        assert first_set.start() < first_used.start(), name
