# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""KVM file descriptors, guest memory and the C core.

The names below are the usual ones; they are imported on first use, so that importing the package,
or one module of it, costs nothing else.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .capabilities import Capabilities
    from .errors import (
        BadDescriptorChain,
        BadGuestAddress,
        CapabilityMissing,
        GuestError,
        HostError,
        KvmError,
    )
    from .eventfd import EventFd
    from .exits import ExitKind, ExitTable
    from .irq_routing import IrqRouter
    from .memory import GuestMemory
    from .system import Kvm
    from .types import Gpa, Gsi, Hva
    from .uart import Uart
    from .vcpu import Vcpu, install_kick_signal
    from .virtqueue import DescriptorChain, Virtqueue
    from .vm import Vm

__all__ = [
    "BadDescriptorChain",
    "BadGuestAddress",
    "Capabilities",
    "CapabilityMissing",
    "DescriptorChain",
    "EventFd",
    "ExitKind",
    "ExitTable",
    "Gpa",
    "Gsi",
    "GuestError",
    "GuestMemory",
    "HostError",
    "Hva",
    "IrqRouter",
    "Kvm",
    "KvmError",
    "Uart",
    "Vcpu",
    "Virtqueue",
    "Vm",
    "install_kick_signal",
]

_MODULE_OF: Final = {
    "BadDescriptorChain": "errors",
    "BadGuestAddress": "errors",
    "Capabilities": "capabilities",
    "CapabilityMissing": "errors",
    "DescriptorChain": "virtqueue",
    "EventFd": "eventfd",
    "ExitKind": "exits",
    "ExitTable": "exits",
    "Gpa": "types",
    "Gsi": "types",
    "GuestError": "errors",
    "GuestMemory": "memory",
    "HostError": "errors",
    "Hva": "types",
    "IrqRouter": "irq_routing",
    "Kvm": "system",
    "KvmError": "errors",
    "Uart": "uart",
    "Vcpu": "vcpu",
    "Virtqueue": "virtqueue",
    "Vm": "vm",
    "install_kick_signal": "vcpu",
}


def __getattr__(name: str) -> object:
    """Import a public name where it lives (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value
