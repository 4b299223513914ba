# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Rate limits of a machine that change while it runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kvm_ffi.rate_limiter import RateLimit

from ..errors import ProtocolError, WorkerError
from ..protocol import MachineSpec
from .machine import Machine


def change_limits(machine: Machine, spec: MachineSpec, args: dict[str, Any]) -> MachineSpec:
    """Change the limits of a disk or a rate group, and return the machine's spec with them.

    Args:
        machine: which has the disk or the group.
        spec: of the machine.
        args: those of a limit_disk or a limit_group, as protocol.py has them.

    Raises:
        WorkerError: the VM has no such disk, or no such group.
        ProtocolError: a limit is none, or out of range.
    """
    limits = args.get("rate_limit")
    if not isinstance(limits, dict):
        raise ProtocolError("rate_limit must be an object")
    try:
        limit = RateLimit(**limits)
        if "group" not in args:
            disk_id = str(args.get("disk"))
            machine.disk(disk_id).set_limit(limit)
            return spec.with_disk(disk_id, rate_limit=limits)
        group_id = str(args["group"])
        if group_id not in machine.rate_groups:
            raise WorkerError("no_such_group", f"the VM has no rate group {group_id!r}")
        machine.rate_groups[group_id].set(limit)
        return replace(spec, rate_groups={**spec.rate_groups, group_id: limits})
    except (TypeError, ValueError) as err:
        raise ProtocolError(f"rate_limit: {err}") from err
