# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The C ring and the slow model of it, on the same random rings, step by step."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvm_ffi.memory import GuestMemory
from kvm_ffi.types import Gpa
from tests.fuzz.ring_walk import walk
from tests.support.virtqueue_pair import (
    AVAIL,
    DESC,
    HIGH_GPA,
    HIGH_SIZE,
    INTERESTING,
    KINDS,
    LOW_SIZE,
    TABLE,
    Rings,
    Step,
)

addresses = st.sampled_from(INTERESTING) | st.integers(0, LOW_SIZE)
lengths = st.sampled_from((0, 1, 16, 32, 48, 17, 0x1000, 0xFFFFFFFF, 0xFFFFFFF0)) | st.integers(
    0, 64
)
# Mostly what a driver would write, so that long chains happen, and sometimes anything.
flags = st.sampled_from((0, 1, 1, 1, 2, 3, 3, 4, 4, 5, 6, 7, 0xFFF8, 0xFFFF))
descriptors = st.builds(
    lambda addr, length, flag, after: struct.pack("<QIHH", addr, length, flag, after),
    addresses, lengths, flags, st.integers(0, 9) | st.just(0xFFFF),
)  # fmt: skip
steps = st.lists(
    st.builds(
        Step,
        st.sampled_from(KINDS),
        st.integers(0, 7),
        st.integers(0, 9) | st.integers(0, 0xFFFF),
    ),
    max_size=60,
)


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    with GuestMemory([(Gpa(0), LOW_SIZE), (Gpa(HIGH_GPA), HIGH_SIZE)]) as guest_memory:
        yield guest_memory


@pytest.mark.slow
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.sampled_from((1, 2, 4, 8)),
    event_idx=st.booleans(),
    indirect=st.booleans(),
    ring=st.lists(st.integers(0, 8), min_size=8, max_size=8),
    offered=st.integers(0, 8),
    table=st.lists(descriptors, min_size=8, max_size=8),
    second=st.lists(descriptors, min_size=4, max_size=4),
    taken=steps,
)
def test_the_ring_in_c_does_what_the_model_does(
    memory: GuestMemory, size: int, event_idx: bool, indirect: bool, ring: list[int],
    offered: int, table: list[bytes], second: list[bytes], taken: list[Step],
) -> None:  # fmt: skip
    rings = Rings.make(memory, size, event_idx=event_idx, indirect=indirect)
    rings.poke(DESC, b"".join(table[:size]))
    rings.poke(TABLE, b"".join(second))
    rings.poke(AVAIL + 4, struct.pack(f"<{size}H", *ring[:size]))
    rings.poke(AVAIL + 2, struct.pack("<H", min(offered, size)))
    for step in taken:
        rings.take(step)
    rings.compare()


@pytest.mark.slow
def test_both_do_the_same_over_a_long_walk(
    memory: GuestMemory, capsys: pytest.CaptureFixture[str]
) -> None:
    done = walk(memory, seed=1, steps=100_000)
    with capsys.disabled():
        print(f"\n{done}")
    assert done.steps == 100_000
    # A walk that always breaks at once, or never, would show little.
    assert done.chains > 5_000
    assert done.broken > 300
    assert done.wraps > 5
