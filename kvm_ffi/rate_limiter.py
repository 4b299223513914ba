# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Rate limits of a device, or of several together: token buckets for bytes and for operations.

The C side is csrc/token_bucket.c and csrc/rate_group.c; engines take tokens from it without the
GIL.
"""

from __future__ import annotations

import abc
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ._kvm import ffi, lib

if TYPE_CHECKING:
    from ._kvm import CData

MAX_RATE: Final = lib.TOKEN_BUCKET_MAX_RATE
"""Most bytes or operations per second that can be asked for."""
MAX_BURST: Final = lib.TOKEN_BUCKET_MAX_BURST
"""Most bytes or operations that a bucket can hold."""


@dataclass(frozen=True, slots=True)
class RateLimit:
    """What a device may do; 0 is no limit.

    Attributes:
        bytes_per_s: up to MAX_RATE.
        bytes_burst: what a device that was idle may do at once, up to MAX_BURST; 0 is a tenth of
            a second's worth, and less than a hundredth counts as a hundredth.
        ops_per_s: requests, or packets.
        ops_burst: likewise.
    """

    bytes_per_s: int = 0
    bytes_burst: int = 0
    ops_per_s: int = 0
    ops_burst: int = 0


UNLIMITED: Final = RateLimit()


class _Buckets(abc.ABC):
    """What can be limited, one device or several: a C object, and what was set last."""

    def __init__(self, limit: RateLimit = UNLIMITED) -> None:
        self._c = self._make()
        self._limit = UNLIMITED
        self.set(limit)

    @property
    def raw(self) -> CData:
        """The C struct, for the configuration of engines; it must outlive them."""
        return self._c

    @property
    def limit(self) -> RateLimit:
        """What was set last."""
        return self._limit

    def set(self, limit: RateLimit) -> None:
        """Change the limits.

        Raises:
            ValueError: a rate or a burst is not in its range.
        """
        ret = self._set(_config(limit), time.monotonic_ns())
        assert ret == 0  # _config() has checked the ranges
        self._limit = limit

    @abc.abstractmethod
    def _make(self) -> CData: ...

    @abc.abstractmethod
    def _set(self, config: CData, now_ns: int) -> int: ...


class RateLimiter(_Buckets):
    """The buckets of one device, shared by its engines; wake those that wait after set().

    Threads: any.
    """

    def _make(self) -> CData:
        limiter = ffi.new("struct rate_limiter *")
        lib.rate_limiter_init(limiter)
        return ffi.gc(limiter, lib.rate_limiter_deinit)

    def _set(self, config: CData, now_ns: int) -> int:
        return int(lib.rate_limiter_set(self._c, config, now_ns))


class RateGroup(_Buckets):
    """Buckets that several devices share, each of which may have a RateLimiter of its own.

    Devices that always have requests get equal shares of it: csrc/rate_group.h says how. What is
    set() counts at once also for those that wait.

    Threads: any.
    """

    def _make(self) -> CData:
        group = ffi.new("struct rate_group *")
        lib.rate_group_init(group)
        return ffi.gc(group, lib.rate_group_deinit)

    def _set(self, config: CData, now_ns: int) -> int:
        return int(lib.rate_group_set(self._c, config, now_ns))


def _config(limit: RateLimit) -> CData:
    """Return a checked `struct rate_limit *`.

    Raises:
        ValueError: a rate or a burst is not in its range.
    """
    for name in ("bytes_per_s", "ops_per_s"):
        _check(name, getattr(limit, name), MAX_RATE)
    for name in ("bytes_burst", "ops_burst"):
        _check(name, getattr(limit, name), MAX_BURST)
    config = ffi.new("struct rate_limit *")
    config.bytes_per_s, config.bytes_burst = limit.bytes_per_s, limit.bytes_burst
    config.ops_per_s, config.ops_burst = limit.ops_per_s, limit.ops_burst
    return config


def _check(name: str, value: int, maximum: int) -> None:
    if not 0 <= value <= maximum:
        raise ValueError(f"{name}={value}: must be 0..{maximum}")
