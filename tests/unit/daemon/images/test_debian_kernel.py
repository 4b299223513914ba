# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Debian's kernels, where the lab has fetched them: the stock one (xz), the cloud one (lz4)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from daemon.images.importer import import_kernel
from daemon.images.records import KernelRecord
from daemon.worker.boot import BootSource, load
from kvm_ffi.memory import GuestMemory
from kvm_ffi.types import Gpa
from lab.layout import default_cache
from tests.support.kernels import MIB

pytestmark = pytest.mark.slow

CACHE = default_cache() / "kernels"


@pytest.fixture(params=["linux-image-cloud-amd64", "linux-image-amd64"])
def record(request: pytest.FixtureRequest, tmp_path: Path) -> KernelRecord:
    found = sorted((CACHE / request.param / "boot").glob("vmlinuz-*"))
    if not found:
        pytest.skip(f"{request.param} is not in the lab's cache: lab/lab fetches it")
    return import_kernel(found[0], tmp_path)


def test_a_debian_kernel_has_both_entries_and_a_banner(record: KernelRecord) -> None:
    assert record.format == "bzImage"
    assert record.entry == "linux64"
    assert record.elf.linux64_gpa == 16 * MIB
    assert record.elf.pvh_gpa is not None
    assert "Debian" in (record.banner or "")


def test_a_debian_kernel_fills_less_ram_than_it_spans(record: KernelRecord) -> None:
    with record.path.open("rb") as kernel, GuestMemory([(Gpa(0), 256 * MIB)]) as memory:
        source = BootSource(
            kernel.fileno(), "linux64", "quiet", setup_header=bytes.fromhex(record.setup_header)
        )
        load(memory, source)
        first = record.elf.segments[0]
        want = os.pread(kernel.fileno(), MIB, first.file_offset)
        assert memory.read(Gpa(first.gpa), MIB) == want
        assert os.fstat(memory.fd).st_blocks * 512 < record.elf.end_gpa - first.gpa
