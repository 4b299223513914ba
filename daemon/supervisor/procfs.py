# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Processes: who is behind a pid, how did it end, how much memory has it."""

from __future__ import annotations

import fcntl
import functools
import os
import select
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_STARTTIME_FIELD: Final = 22  # of /proc/pid/stat, proc_pid_stat(5), counted from 1
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")

# Linux include/uapi/linux/pidfd.h: struct pidfd_info of 64 bytes (PIDFD_INFO_SIZE_VER0: mask,
# cgroupid, then 32-bit pid, tgid, ppid, eight ids, exit_code); PIDFD_GET_INFO is _IOWR(0xFF, 11) of
# it.
# PIDFD_INFO_EXIT came in Linux 6.15; before that the zygote alone knows how a worker ended.
_PIDFD_INFO: Final = struct.Struct("=QQ11Ii")
_PIDFD_GET_INFO: Final = (3 << 30) | (64 << 16) | (0xFF << 8) | 11
_PIDFD_INFO_EXIT: Final = 1 << 3


@dataclass(frozen=True, slots=True)
class Identity:
    """A process, told from another one with the same pid by its start time and boot."""

    pid: int
    start_ticks: int
    boot_id: str


@functools.cache
def boot_id() -> str:
    """Return the id of this boot of the host."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def start_ticks(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; None when there is none."""
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        stat = os.read(fd, 4096)
    except ProcessLookupError:
        return None
    finally:
        os.close(fd)
    # The command in field 2 may hold blanks and parentheses; what follows its last ')' is plain.
    return int(stat.rpartition(b")")[2].split()[_STARTTIME_FIELD - 3])


def identify(pid: int) -> Identity | None:
    """Return who a pid is now; None when there is no such process."""
    ticks = start_ticks(pid)
    return None if ticks is None else Identity(pid, ticks, boot_id())


def open_if_same(identity: Identity) -> int | None:
    """Return a pidfd of exactly that process, None when it has gone."""
    if identity.boot_id != boot_id():
        return None
    try:
        pidfd = os.pidfd_open(identity.pid)
    except OSError:
        return None
    # The pidfd is open, so the pid cannot change hands between here and a signal.
    has_ended, _, _ = select.select([pidfd], [], [], 0)
    if has_ended or start_ticks(identity.pid) != identity.start_ticks:
        os.close(pidfd)
        return None
    return pidfd


def exit_status(pidfd: int) -> int | None:
    """Return the wait status of a process that has ended and been reaped; None when unknown."""
    buffer = bytearray(64)
    _PIDFD_INFO.pack_into(buffer, 0, _PIDFD_INFO_EXIT, *([0] * 13))
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, buffer)
    except OSError:
        return None
    fields = _PIDFD_INFO.unpack_from(buffer)
    return int(fields[-1]) if fields[0] & _PIDFD_INFO_EXIT else None


def rss_bytes(pid: int) -> int:
    """Return the resident memory of a process, guest RAM included; 0 when it has gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
    except (FileNotFoundError, ProcessLookupError):
        return 0


@functools.cache
def memory_total() -> int:
    """Return the bytes of the host's memory, as it was when first asked."""
    return memory()[0]


def memory() -> tuple[int, int]:
    """Return (total, available) bytes of the host's memory."""
    fields = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        fields[name] = int(rest.split()[0]) * 1024
    return fields["MemTotal"], fields.get("MemAvailable", fields["MemFree"])
