# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from kvm_ffi._kvm import ffi, lib
from kvm_ffi.errors import BadDescriptorChain
from kvm_ffi.memory import GuestMemory
from kvm_ffi.types import Gpa
from kvm_ffi.virtqueue import MAX_QUEUE_SIZE, Virtqueue, VirtqueueState
from tests.support.ring_driver import (
    INDIRECT,
    NEXT,
    NO_INTERRUPT,
    NO_NOTIFY,
    WRITE,
    Desc,
    RingDriver,
)

LOW_SIZE = 0x20000
HIGH_GPA = 0x40000  # LOW_SIZE..HIGH_GPA is the MMIO hole
HIGH_SIZE = 0x10000
DATA = 0x8000
TABLE = 0xC000


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory([(Gpa(0), LOW_SIZE), (Gpa(HIGH_GPA), HIGH_SIZE)]) as guest_memory:
        yield guest_memory


@pytest.fixture
def driver(memory: GuestMemory) -> RingDriver:
    return RingDriver(memory, size=8)


def expect_broken(queue: Virtqueue) -> None:
    with pytest.raises(BadDescriptorChain):
        queue.pop()
    assert queue.is_broken
    with pytest.raises(BadDescriptorChain):
        queue.pop()


def test_an_empty_ring_gives_nothing(driver: RingDriver) -> None:
    assert driver.queue().pop() is None


def test_a_chain_comes_with_its_bytes_and_goes_back_used(driver: RingDriver) -> None:
    driver.memory.write(Gpa(DATA), b"requestheader")
    driver.offer(driver.chain([(DATA, 7, 0), (DATA + 7, 6, 0), (DATA + 64, 4, WRITE)], first=2))
    queue = driver.queue()
    chain = queue.pop()
    assert chain is not None
    assert (chain.head, chain.readable_len, chain.writable_len) == (2, 13, 4)
    assert chain.read(8) == b"requesth"
    assert chain.read(100) == b"eader"
    assert chain.read(1) == b""
    assert chain.write(b"an") == 2
    assert chain.write(b"swer") == 2
    queue.add_used(chain, 4)
    assert driver.take_used() == []
    assert queue.publish()
    assert driver.take_used() == [(2, 4)]
    assert driver.memory.read(Gpa(DATA + 64), 5) == b"answ\0"


def test_two_chains_may_be_held_at_once(driver: RingDriver) -> None:
    driver.memory.write(Gpa(DATA), b"ab")
    driver.offer(driver.chain([(DATA, 1, 0)]), driver.chain([(DATA + 1, 1, 0)], first=1))
    queue = driver.queue()
    first, second = queue.pop(), queue.pop()
    assert first is not None
    assert second is not None
    assert (first.read(9), second.read(9)) == (b"a", b"b")


def test_the_ring_wraps_around_sixteen_bits(driver: RingDriver) -> None:
    queue = driver.queue()
    queue.restore(VirtqueueState(0xFFFE, 0xFFFE))
    driver.avail_idx = driver.used_seen = 0xFFFE
    driver.memory.write(Gpa(driver.used_gpa + 2), struct.pack("<H", 0xFFFE))
    for head in range(4):
        driver.offer(driver.chain([(DATA, 1, WRITE)], first=head))
        chain = queue.pop()
        assert chain is not None
        queue.add_used(chain, 1)
    queue.publish()
    assert driver.take_used() == [(0, 1), (1, 1), (2, 1), (3, 1)]
    assert queue.state == VirtqueueState(2, 2)


def test_an_indirect_table_is_followed(driver: RingDriver) -> None:
    driver.memory.write(Gpa(DATA), b"ab")
    driver.set_table(TABLE, [Desc(DATA + 1, 1, NEXT, 2), Desc(0, 0), Desc(DATA, 4, WRITE)])
    driver.set_desc(0, Desc(DATA, 1, NEXT, 1))
    driver.set_desc(1, Desc(TABLE, 48, INDIRECT))
    driver.offer(0)
    chain = driver.queue().pop()
    assert chain is not None
    assert chain.read(9) == b"ab"
    assert chain.writable_len == 4


def test_an_indirect_table_need_not_be_aligned(driver: RingDriver) -> None:
    driver.set_table(TABLE + 3, [Desc(DATA, 5, WRITE)])
    driver.set_desc(0, Desc(TABLE + 3, 16, INDIRECT))
    driver.offer(0)
    chain = driver.queue().pop()
    assert chain is not None
    assert chain.writable_len == 5


def test_the_write_flag_of_an_indirect_descriptor_is_ignored(driver: RingDriver) -> None:
    # VIRTIO 1.2, 2.7.5.3.2
    driver.set_table(TABLE, [Desc(DATA, 5)])
    driver.set_desc(0, Desc(TABLE, 16, INDIRECT | WRITE))
    driver.offer(0)
    chain = driver.queue().pop()
    assert chain is not None
    assert (chain.readable_len, chain.writable_len) == (5, 0)


def test_a_chain_of_queue_size_buffers_is_allowed(driver: RingDriver) -> None:
    driver.offer(driver.chain([(DATA, 1, 0)] * 8))
    chain = driver.queue().pop()
    assert chain is not None
    assert chain.readable_len == 8


def test_empty_buffers_are_skipped_wherever_they_point(driver: RingDriver) -> None:
    driver.memory.write(Gpa(DATA), b"x")
    driver.offer(driver.chain([(1 << 63, 0, 0), (DATA, 1, 0), (1 << 63, 0, WRITE)]))
    chain = driver.queue().pop()
    assert chain is not None
    assert (chain.readable_len, chain.writable_len, chain.read(2)) == (1, 0, b"x")


@pytest.mark.parametrize(
    ("gpa", "length"),
    [
        pytest.param(LOW_SIZE - 1, 2, id="last byte of RAM"),
        pytest.param(LOW_SIZE, 1, id="in the hole"),
        pytest.param(LOW_SIZE - 16, HIGH_GPA - LOW_SIZE + 32, id="over the hole"),
        pytest.param(HIGH_GPA + HIGH_SIZE - 1, 2, id="end of the last region"),
        pytest.param((1 << 64) - 1, 2, id="wraps to zero"),
        pytest.param(0, 0xFFFFFFFF, id="4 GiB"),
    ],
)
def test_a_buffer_that_leaves_memory_breaks_the_queue(
    driver: RingDriver, gpa: int, length: int
) -> None:
    driver.offer(driver.chain([(gpa, length, WRITE)]))
    expect_broken(driver.queue())


@pytest.mark.parametrize("gpa", [LOW_SIZE - 1, HIGH_GPA + HIGH_SIZE - 1, HIGH_GPA])
def test_a_buffer_of_one_byte_at_an_edge_of_memory_is_fine(driver: RingDriver, gpa: int) -> None:
    driver.offer(driver.chain([(gpa, 1, WRITE)]))
    chain = driver.queue().pop()
    assert chain is not None
    assert chain.write(b"zz") == 1
    assert driver.memory.read(Gpa(gpa), 1) == b"z"


def test_a_chain_that_loops_breaks_the_queue(driver: RingDriver) -> None:
    driver.set_desc(0, Desc(DATA, 1, NEXT, 1))
    driver.set_desc(1, Desc(DATA, 1, NEXT, 0))
    driver.offer(0)
    expect_broken(driver.queue())


def test_a_loop_of_empty_buffers_breaks_the_queue(driver: RingDriver) -> None:
    driver.set_desc(0, Desc(DATA, 0, NEXT, 0))
    driver.offer(0)
    expect_broken(driver.queue())


@pytest.mark.parametrize("head", [8, 9, 0xFFFF])
def test_a_head_out_of_range_breaks_the_queue(driver: RingDriver, head: int) -> None:
    driver.offer(head)
    expect_broken(driver.queue())


@pytest.mark.parametrize("after", [8, 0xFFFF])
def test_a_next_out_of_range_breaks_the_queue(driver: RingDriver, after: int) -> None:
    driver.set_desc(0, Desc(DATA, 1, NEXT, after))
    driver.offer(0)
    expect_broken(driver.queue())


def test_a_writable_buffer_before_a_readable_one_breaks_the_queue(driver: RingDriver) -> None:
    driver.offer(driver.chain([(DATA, 1, WRITE), (DATA, 1, 0)]))
    expect_broken(driver.queue())


def test_an_empty_writable_one_before_a_readable_one_breaks_the_queue(driver: RingDriver) -> None:
    driver.offer(driver.chain([(DATA, 0, WRITE), (DATA, 1, 0)]))
    expect_broken(driver.queue())


def test_lengths_that_overflow_32_bits_break_the_queue() -> None:
    # 16 buffers of 256 MiB are one byte too many for 32 bits; nothing of it is ever touched.
    with GuestMemory([(Gpa(0), 1 << 28)]) as memory:
        driver = RingDriver(memory, size=16)
        driver.offer(driver.chain([(0, 1 << 28, WRITE)] * 16))
        expect_broken(driver.queue())


def test_lengths_that_just_fit_32_bits_are_allowed() -> None:
    with GuestMemory([(Gpa(0), 1 << 28)]) as memory:
        driver = RingDriver(memory, size=16)
        driver.offer(driver.chain([(0, 1 << 28, WRITE)] * 15 + [(0, (1 << 28) - 1, WRITE)]))
        chain = driver.queue().pop()
        assert chain is not None
        assert chain.writable_len == 0xFFFFFFFF


def test_an_indirect_table_that_loops_breaks_the_queue(driver: RingDriver) -> None:
    driver.set_table(TABLE, [Desc(DATA, 1, NEXT, 1), Desc(DATA, 1, NEXT, 0)])
    driver.set_desc(0, Desc(TABLE, 32, INDIRECT))
    driver.offer(0)
    expect_broken(driver.queue())


def test_an_indirect_table_inside_another_breaks_the_queue(driver: RingDriver) -> None:
    driver.set_table(TABLE, [Desc(TABLE, 16, INDIRECT)])
    driver.set_desc(0, Desc(TABLE, 16, INDIRECT))
    driver.offer(0)
    expect_broken(driver.queue())


def test_an_indirect_descriptor_with_a_next_breaks_the_queue(driver: RingDriver) -> None:
    driver.set_table(TABLE, [Desc(DATA, 1)])
    driver.set_desc(0, Desc(TABLE, 16, INDIRECT | NEXT, 1))
    driver.set_desc(1, Desc(DATA, 1))
    driver.offer(0)
    expect_broken(driver.queue())


def test_an_indirect_descriptor_that_was_not_negotiated_breaks_the_queue(
    driver: RingDriver,
) -> None:
    driver.set_table(TABLE, [Desc(DATA, 1)])
    driver.set_desc(0, Desc(TABLE, 16, INDIRECT))
    driver.offer(0)
    expect_broken(driver.queue(indirect=False))


@pytest.mark.parametrize(
    ("gpa", "length"),
    [
        pytest.param(TABLE, 0, id="empty"),
        pytest.param(TABLE, 17, id="half a descriptor"),
        pytest.param(TABLE, 16 * 9, id="longer than the queue"),
        pytest.param(TABLE, 0xFFFFFFF0, id="4 GiB"),
        pytest.param(LOW_SIZE - 16, 32, id="leaves memory"),
        pytest.param((1 << 64) - 16, 16, id="at the end of the address space"),
    ],
)
def test_a_bad_indirect_table_breaks_the_queue(driver: RingDriver, gpa: int, length: int) -> None:
    driver.set_desc(0, Desc(gpa, length, INDIRECT))
    driver.offer(0)
    expect_broken(driver.queue())


def test_a_next_outside_the_indirect_table_breaks_the_queue(driver: RingDriver) -> None:
    # Index 2 would be a valid descriptor of the ring, but not of the table.
    driver.set_table(TABLE, [Desc(DATA, 1, NEXT, 2), Desc(DATA, 1)])
    driver.set_desc(0, Desc(TABLE, 32, INDIRECT))
    driver.offer(0)
    expect_broken(driver.queue())


def test_a_chain_longer_than_the_queue_breaks_it_even_through_a_table(driver: RingDriver) -> None:
    driver.set_table(TABLE, [Desc(DATA, 1, NEXT, i + 1) for i in range(7)] + [Desc(DATA, 1)])
    driver.set_desc(0, Desc(DATA, 1, NEXT, 1))
    driver.set_desc(1, Desc(TABLE, 16 * 8, INDIRECT))
    driver.offer(0)
    expect_broken(driver.queue())


@pytest.mark.parametrize("idx", [9, 0x8000, 0xFFFF])
def test_an_avail_index_that_jumps_breaks_the_queue(driver: RingDriver, idx: int) -> None:
    driver.set_avail_idx(idx)
    expect_broken(driver.queue())


def test_an_avail_index_that_goes_back_breaks_the_queue(driver: RingDriver) -> None:
    driver.offer(driver.chain([(DATA, 1, 0)]), 0)
    queue = driver.queue()
    assert queue.pop() is not None
    assert queue.pop() is not None
    driver.set_avail_idx(1)
    expect_broken(queue)


def test_more_chains_in_flight_than_descriptors_break_the_queue(driver: RingDriver) -> None:
    driver.chain([(DATA, 1, 0)])
    queue = driver.queue()
    driver.offer(*[0] * 8)
    popped = [queue.pop() for _ in range(8)]
    assert all(popped)
    driver.offer(0)
    expect_broken(queue)


@pytest.mark.parametrize(
    ("size", "desc", "avail", "used"),
    [
        pytest.param(0, 0x1000, 0x2000, 0x3000, id="size 0"),
        pytest.param(3, 0x1000, 0x2000, 0x3000, id="size no power of two"),
        pytest.param(2048, 0x1000, 0x2000, 0x3000, id="size too large"),
        pytest.param(1 << 16, 0x1000, 0x2000, 0x3000, id="size beyond 16 bits"),
        pytest.param(8, 0x1008, 0x2000, 0x3000, id="desc unaligned"),
        pytest.param(8, 0x1000, 0x2001, 0x3000, id="avail unaligned"),
        pytest.param(8, 0x1000, 0x2000, 0x3002, id="used unaligned"),
        pytest.param(8, LOW_SIZE - 16, 0x2000, 0x3000, id="desc leaves memory"),
        pytest.param(8, 0x1000, LOW_SIZE - 20, 0x3000, id="avail leaves memory"),
        pytest.param(8, 0x1000, 0x2000, LOW_SIZE - 64, id="used leaves memory"),
        pytest.param(8, HIGH_GPA - 16, 0x2000, 0x3000, id="desc in the hole"),
        pytest.param(8, (1 << 64) - 16, 0x2000, 0x3000, id="desc wraps"),
        pytest.param(8, 1 << 64, 0x2000, 0x3000, id="desc beyond 64 bits"),
    ],
)
def test_bad_queue_registers_are_a_guest_error(
    memory: GuestMemory, size: int, desc: int, avail: int, used: int
) -> None:
    with pytest.raises(BadDescriptorChain):
        Virtqueue(memory, 0, size, Gpa(desc), Gpa(avail), Gpa(used), 0)


def test_rings_may_end_at_the_last_byte_of_memory(memory: GuestMemory) -> None:
    used_bytes, avail_bytes, desc_bytes = 6 + 8 * 8 + 2, 6 + 2 * 8 + 2, 16 * 8
    Virtqueue(
        memory, 0, 8, Gpa(LOW_SIZE - desc_bytes), Gpa(HIGH_GPA + HIGH_SIZE - avail_bytes),
        Gpa(HIGH_GPA + HIGH_SIZE - used_bytes), 0,
    )  # fmt: skip


def test_the_largest_queue_works(memory: GuestMemory) -> None:
    driver = RingDriver(memory, size=MAX_QUEUE_SIZE)
    driver.chain([(HIGH_GPA, 1, WRITE)] * MAX_QUEUE_SIZE)
    driver.offer(0)
    chain = driver.queue().pop()
    assert chain is not None
    assert chain.writable_len == MAX_QUEUE_SIZE


def serve(queue: Virtqueue, driver: RingDriver, count: int) -> bool:
    """Complete `count` one-byte chains in one publish; whether an interrupt is due."""
    driver.offer(*[driver.chain([(DATA, 1, WRITE)])] * count)
    for _ in range(count):
        chain = queue.pop()
        assert chain is not None
        queue.add_used(chain, 1)
    return queue.publish()


def test_without_event_idx_the_flag_of_the_driver_decides(driver: RingDriver) -> None:
    queue = driver.queue()
    assert serve(queue, driver, 1)
    driver.set_avail_flags(NO_INTERRUPT)
    assert not serve(queue, driver, 1)


def test_event_idx_interrupts_once_until_the_driver_asks_again(driver: RingDriver) -> None:
    queue = driver.queue(event_idx=True)
    assert [serve(queue, driver, 1) for _ in range(5)] == [True, False, False, False, False]
    driver.set_used_event(5)
    assert [serve(queue, driver, 2) for _ in range(3)] == [True, False, False]


def test_event_idx_is_met_anywhere_inside_a_batch(driver: RingDriver) -> None:
    queue = driver.queue(event_idx=True)
    driver.set_used_event(6)
    assert not serve(queue, driver, 6)
    assert serve(queue, driver, 8)


def test_event_idx_ignores_the_flag(driver: RingDriver) -> None:
    driver.set_avail_flags(NO_INTERRUPT)
    assert serve(driver.queue(event_idx=True), driver, 1)


def test_publishing_nothing_wants_no_interrupt(driver: RingDriver) -> None:
    assert not driver.queue().publish()


def test_kicks_are_switched_by_the_flag(driver: RingDriver) -> None:
    queue = driver.queue()
    queue.disable_kick()
    assert driver.used_flags == NO_NOTIFY
    assert not queue.enable_kick()
    assert driver.used_flags == 0


def test_kicks_are_switched_by_avail_event(driver: RingDriver) -> None:
    queue = driver.queue(event_idx=True)
    driver.offer(driver.chain([(DATA, 1, 0)]))
    queue.pop()
    queue.disable_kick()
    assert (driver.used_flags, driver.avail_event) == (0, 0)
    assert not queue.enable_kick()
    assert driver.avail_event == 1


@pytest.mark.parametrize("event_idx", [False, True])
def test_a_chain_that_came_before_kicks_were_enabled_is_reported(
    driver: RingDriver, event_idx: bool
) -> None:
    queue = driver.queue(event_idx=event_idx)
    driver.offer(driver.chain([(DATA, 1, 0)]))
    assert queue.enable_kick()


def test_an_unpopped_chain_comes_again(driver: RingDriver) -> None:
    driver.offer(driver.chain([(DATA, 1, 0)]), driver.chain([(DATA, 1, 0)], first=3))
    queue = driver.queue()
    queue.pop()
    queue.pop()
    lib.virtqueue_unpop(queue.raw, 2)
    heads = [chain.head for chain in (queue.pop(), queue.pop()) if chain]
    assert heads == [0, 3]


def test_a_restored_queue_goes_on_and_interrupts_once(driver: RingDriver) -> None:
    before = driver.queue(event_idx=True)
    serve(before, driver, 3)
    after = driver.queue(event_idx=True)
    after.restore(before.state)
    # Whether the interrupt of the last publish got through is unknown, so one is repeated.
    assert [serve(after, driver, 1), serve(after, driver, 1)] == [True, False]
    assert driver.take_used() == [(0, 1)] * 5


@pytest.mark.parametrize("state", [VirtqueueState(9, 0), VirtqueueState(0, 1)])
def test_an_impossible_state_is_refused(driver: RingDriver, state: VirtqueueState) -> None:
    with pytest.raises(ValueError, match="more than 8 chains"):
        driver.queue().restore(state)


def test_a_state_beyond_16_bits_is_refused(driver: RingDriver) -> None:
    with pytest.raises(ValueError, match="16 bits"):
        driver.queue().restore(VirtqueueState(1 << 16, 1 << 16))


def test_more_written_than_the_chain_holds_is_a_bug_of_the_device(driver: RingDriver) -> None:
    driver.offer(driver.chain([(DATA, 1, WRITE)]))
    queue = driver.queue()
    chain = queue.pop()
    assert chain is not None
    with pytest.raises(ValueError, match="written=2"):
        queue.add_used(chain, 2)


def test_the_c_structs_have_the_layout_that_python_believes() -> None:
    assert ffi.sizeof("struct iovec") == 16
    assert ffi.sizeof("struct desc_chain") >= 32
    assert ffi.sizeof("struct virtqueue") >= 64
