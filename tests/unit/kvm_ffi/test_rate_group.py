# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A budget that several engines share, on a clock of our own: what it gives in sum, and to whom."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvm_ffi._kvm import ffi, lib
from kvm_ffi.eventfd import EventFd
from kvm_ffi.rate_limiter import MAX_RATE, RateGroup, RateLimit, RateLimiter

MS = 1_000_000
SECOND = 1_000 * MS
START = 1_000 * SECOND
# How late a thread wakes up on a busy host.
LATE_NS = 60_000
# How far a share may be from an equal one.
FAIR = 0.05


class Member:
    """A member whose wake-up is an eventfd that the test reads."""

    def __init__(self, group: RateGroup, limiter: RateLimiter | None = None) -> None:
        self.group, self.limiter = group, limiter
        self.wake = EventFd()
        self.raw = ffi.new("struct rate_member *")
        lib.rate_group_join(group.raw, self.raw, self.wake.fd)

    def take(self, now: int, length: int = 0) -> int:
        own = ffi.NULL if self.limiter is None else self.limiter.raw
        wait: int = lib.rate_group_take(self.raw, own, length, now)
        return wait

    def leave(self) -> None:
        lib.rate_group_leave(self.raw)
        self.wake.close()


class Crowd:
    """Members of one group, and what each does: requests of one size, `think` ns between them."""

    def __init__(self, **limit: int) -> None:
        self.group = RateGroup()
        self.set(START, **limit)
        self.members: list[Member] = []

    def set(self, now: int, **limit: int) -> int:
        config = ffi.new("struct rate_limit *", limit)
        result: int = lib.rate_group_set(self.group.raw, config, now)
        return result

    def add(self, limiter: RateLimiter | None = None) -> Member:
        self.members.append(Member(self.group, limiter))
        return self.members[-1]

    def drain(self, length: int = 0) -> None:
        """Use up the burst, by a member that goes then."""
        guest = Member(self.group)
        while guest.take(START, length) == 0:
            pass
        guest.leave()

    def serve(
        self,
        seconds: float,
        lengths: list[int],
        *,
        late_ns: int = LATE_NS,
        think_ns: tuple[int, ...] = (),
    ) -> list[int]:
        """How many requests of its length each member got done, woken up to late_ns late."""
        chance = random.Random(1)
        counts = [0] * len(lengths)
        longest = [0] * len(lengths)
        asked = [START] * len(lengths)
        turns = [(START, index) for index in range(len(lengths))]
        end = START + int(seconds * SECOND)
        while turns[0][0] < end:
            now, index = heapq.heappop(turns)
            think = think_ns[index] if think_ns else 0
            wait = 0
            # As an engine does: so many in a turn, then a look at the rest of the world.
            for _ in range(1 if think else 32):
                wait = self.members[index].take(now, lengths[index])
                if wait:
                    break
                counts[index] += 1
                longest[index] = max(longest[index], now - asked[index])
                asked[index] = now + think
            late = chance.randrange(late_ns + 1) if wait else 0
            heapq.heappush(turns, (now + max(wait, think, 1_000) + late, index))
        self.longest_ns = [max(longest[i], end - asked[i]) for i in range(len(lengths))]
        return counts


@pytest.fixture
def crowd() -> Iterator[Crowd]:
    crowd = Crowd()
    yield crowd
    for member in crowd.members:
        member.leave()


def fill(crowd: Crowd, count: int, **limit: int) -> Crowd:
    """Give a crowd its limit and its members, and take its burst away."""
    assert crowd.set(START, **limit) == 0
    crowd.drain(limit.get("bytes_per_s", 0) and 4096)
    for _ in range(count):
        crowd.add()
    return crowd


@pytest.mark.parametrize(("ops", "seconds"), [(50, 10), (1_000, 2), (20_000, 0.4), (100_000, 0.2)])
@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_a_group_delivers_its_limit_in_sum_and_equal_shares(
    crowd: Crowd, ops: int, seconds: float, count: int
) -> None:
    counts = fill(crowd, count, ops_per_s=ops).serve(seconds, [0] * count)
    assert sum(counts) == pytest.approx(seconds * ops, rel=0.02, abs=1)
    share = seconds * ops / count
    assert min(counts) >= share * (1 - FAIR) - 1
    assert max(counts) <= share * (1 + FAIR) + 1


def test_small_requests_do_not_starve_large_ones(crowd: Crowd) -> None:
    lengths = [4096, 4096, 1 << 20]
    counts = fill(crowd, 3, bytes_per_s=20 << 20).serve(4, lengths)
    moved = [count * length for count, length in zip(counts, lengths, strict=True)]
    assert sum(moved) == pytest.approx(4 * (20 << 20), rel=0.02)
    assert min(moved) >= (1 - FAIR) * sum(moved) / 3 - (1 << 20)


def test_a_disk_with_one_request_at_a_time_gets_each_soon(crowd: Crowd) -> None:
    # It needs 1 ms for each, so without the others it could have 500 in that time.
    counts = fill(crowd, 3, ops_per_s=20_000).serve(0.5, [0, 0, 0], think_ns=(0, 0, MS))
    assert sum(counts) == pytest.approx(10_000, rel=0.02)
    assert counts[2] >= 350


@pytest.mark.parametrize("ops", [50, 1_000, 20_000])
def test_nobody_waits_longer_than_the_others_need_for_their_turn(crowd: Crowd, ops: int) -> None:
    fill(crowd, 4, ops_per_s=ops).serve(0.5, [0] * 4, late_ns=LATE_NS)
    one = SECOND // ops
    # For each of three others two milliseconds, a request of theirs and of its own; then its own.
    assert max(crowd.longest_ns) <= 3 * (2 * MS + 2 * one) + one + LATE_NS


def test_what_one_does_not_use_the_others_may(crowd: Crowd) -> None:
    fill(crowd, 2, ops_per_s=1_000)
    assert crowd.serve(1, [0])[0] == pytest.approx(1_000, rel=0.02)


def test_who_was_idle_has_no_claim_to_what_the_others_got(crowd: Crowd) -> None:
    fill(crowd, 2, ops_per_s=1_000).serve(5, [0])
    now = START + 5 * SECOND
    counts = [0, 0]
    for step in range(20_000):
        for index in (0, 1):
            counts[index] += crowd.members[index].take(now + step * 100_000) == 0
    assert counts == [pytest.approx(1_000, rel=FAIR)] * 2


def test_one_that_does_not_come_for_its_turn_loses_it(crowd: Crowd) -> None:
    fill(crowd, 2, ops_per_s=100, ops_burst=1)
    stuck, other = crowd.members
    wait = stuck.take(START)
    assert other.take(START) == wait
    now = START + wait
    assert other.take(now) == 0
    # It had one more than the stuck one, which has its turn, for a while after the time it named.
    now += wait
    waits = 0
    while other.take(now):
        now += other.take(now)
        waits += 1
    assert wait <= now - (START + wait) <= wait + 2 * lib.RATE_GROUP_LATE_NS
    assert waits < 200


def test_a_device_limit_and_the_group_s_both_hold(crowd: Crowd) -> None:
    fill(crowd, 0, ops_per_s=1_000)
    slow = RateLimiter()
    config = ffi.new("struct rate_limit *", {"ops_per_s": 100})
    assert lib.rate_limiter_set(slow.raw, config, START) == 0
    crowd.add(slow)
    crowd.add()
    counts = crowd.serve(4, [0, 0])
    # It waits for its own limit most of the time, and the group does not wait with it.
    assert counts[0] == pytest.approx(410, rel=0.02)
    assert sum(counts) == pytest.approx(4_000, rel=0.02)


def test_what_waits_for_the_group_takes_nothing_from_the_device_s_limit(crowd: Crowd) -> None:
    fill(crowd, 0, ops_per_s=1_000, ops_burst=10)
    own = RateLimiter()
    config = ffi.new("struct rate_limit *", {"ops_per_s": 1, "ops_burst": 2})
    assert lib.rate_limiter_set(own.raw, config, START) == 0
    member = crowd.add(own)
    assert [member.take(START) for _ in range(50)] == [MS] * 50
    assert [member.take(START + 100 * MS) for _ in range(3)] == [0, 0, SECOND]


def test_a_member_that_waits_for_its_own_limit_holds_up_nobody(crowd: Crowd) -> None:
    fill(crowd, 0, ops_per_s=10, ops_burst=1)
    own = RateLimiter()
    first, other = crowd.add(own), crowd.add()
    assert first.take(START) == other.take(START) == 100 * MS
    assert other.take(START + 100 * MS) == 0
    # It is the first one's turn now; but it is limited, and has nothing.
    config = ffi.new("struct rate_limit *", {"bytes_per_s": 1, "bytes_burst": 1})
    assert lib.rate_limiter_set(own.raw, config, START) == 0
    assert lib.rate_limiter_take(own.raw, 100, START) == 0
    assert first.take(START + 101 * MS, 1) > SECOND
    assert other.take(START + 200 * MS) == 0


def test_a_new_limit_and_a_leave_wake_who_waits(crowd: Crowd) -> None:
    fill(crowd, 2, ops_per_s=1, ops_burst=1)
    first, second = crowd.members
    assert first.take(START) > 0
    first.wake.drain()
    assert crowd.set(START, ops_per_s=1_000) == 0
    assert (first.wake.drain(), second.wake.drain()) == (1, 1)
    assert first.take(START + MS) == 0
    crowd.members.remove(second)
    second.leave()
    assert first.wake.drain() == 1


def test_without_a_limit_nothing_waits(crowd: Crowd) -> None:
    assert RateGroup().limit == RateLimit()
    member = crowd.add()
    assert {member.take(START, 0xFFFFFFFF) for _ in range(1000)} == {0}
    fill(crowd, 0, ops_per_s=1, ops_burst=1)
    assert member.take(START) > 0
    assert crowd.set(START) == 0
    assert member.take(START) == 0


def test_a_limit_out_of_range_is_refused_and_changes_nothing() -> None:
    group = RateGroup(RateLimit(ops_per_s=5))
    with pytest.raises(ValueError, match=f"ops_per_s={MAX_RATE + 1}: must be 0.."):
        group.set(RateLimit(ops_per_s=MAX_RATE + 1))
    assert group.limit == RateLimit(ops_per_s=5)
    crowd = Crowd(ops_per_s=5)
    assert crowd.set(START, ops_per_s=MAX_RATE + 1) < 0


@settings(max_examples=60)
@given(
    rate=st.integers(1 << 10, 1 << 34),
    burst=st.integers(0, 1 << 30),
    lengths=st.lists(st.integers(512, 1 << 25), min_size=1, max_size=6),
    late_ns=st.integers(0, 5 * MS),
)
def test_no_crowd_gets_more_than_the_burst_and_what_came_since(
    rate: int, burst: int, lengths: list[int], late_ns: int
) -> None:
    crowd = Crowd(bytes_per_s=rate, bytes_burst=burst)
    for _ in lengths:
        crowd.add()
    counts = crowd.serve(0.05, lengths, late_ns=late_ns)
    moved = sum(count * length for count, length in zip(counts, lengths, strict=True))
    # One request larger than the bucket goes when that is full; what it goes beyond is owed.
    most = max(burst or rate // 10, rate // 100, 1) + 0.05 * rate + max(lengths)
    for member in crowd.members:
        member.leave()
    assert moved <= most
