# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""What a machine tells its worker."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class MachineEvent:
    """Something that the guest did, or that happened to it.

    Attributes:
        generation: of the Machine it comes from; a reset makes a new one.
        code: "boot_timer", "guest_poweroff", "guest_reboot", "guest_panic", or what crashed:
            "triple_fault", "kvm_internal_error", "kvm_fail_entry", "kvm_error", "memory_lost"; or
            "ejected", and then collect_ejected() has something to do; or "backend_lost"; or
            "watchdog", as the spec says what is to be done then; or "disk_error", and then disks()
            have new ones.
        at_ns: CLOCK_MONOTONIC.
    """

    generation: int
    code: str
    message: str
    detail: dict[str, Any] = field(default_factory=dict)
    at_ns: int = field(default_factory=time.monotonic_ns)

    @property
    def reason(self) -> dict[str, Any]:
        """Why the VM is in its state from then on, as a Status has it."""
        return {"code": self.code, "message": self.message, "detail": self.detail}

    def reason_with(self, error: str) -> dict[str, Any]:
        """Return the reason with what stands against what was to be done."""
        return {**self.reason, "message": f"{self.message}; {error}", "detail": {"error": error}}
