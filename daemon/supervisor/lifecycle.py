# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The one table of a VM's life: what each state allows, and where it leads.

::

    creating -> stopped -> starting -> running <-> paused
    running -> stopping -> stopped      when the guest powers off in time, or is killed
    starting, running, paused, stopping -> crashed -> starting
    any state but creating -> deleting -> gone
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from api.errors import Conflict
from api.models.vms import VmAction, VmState


@dataclass(frozen=True, slots=True)
class StateRule:
    """What one state allows.

    Attributes:
        actions: what a client may do, and the state that it leads to at once.
        outcomes: the states that may follow without a client's doing: how a job ends, what the
            guest does, what a restarted hosteld finds.
        may_delete: whether a delete needs no ``force``.
        may_force_delete: whether a delete with ``force`` works.
        may_reshape: whether vCPUs, memory, kernel, initrd and cmdline may change.
        may_plug: whether disks and network interfaces may come and go.
        has_worker: whether a worker process stands behind it; crashed may have one or not.
    """

    actions: Mapping[VmAction, VmState]
    outcomes: frozenset[VmState]
    may_delete: bool = False
    may_force_delete: bool = False
    may_reshape: bool = False
    may_plug: bool = False
    has_worker: bool = False


def _rule(actions: dict[VmAction, VmState], *outcomes: VmState, **flags: bool) -> StateRule:
    return StateRule(MappingProxyType(actions), frozenset(outcomes), **flags)


_S = VmState
_A = VmAction

TABLE: Final[Mapping[VmState, StateRule]] = MappingProxyType(
    {
        # Its disks are being copied; when that fails the VM is gone again.
        _S.CREATING: _rule({}, _S.STOPPED, _S.STARTING, _S.DELETING),
        _S.STOPPED: _rule(
            {_A.START: _S.STARTING},
            _S.DELETING,
            may_delete=True,
            may_force_delete=True,
            may_reshape=True,
            may_plug=True,
        ),
        _S.STARTING: _rule(
            {_A.KILL: _S.STOPPED},
            _S.RUNNING,
            _S.PAUSED,
            _S.STOPPED,
            _S.CRASHED,
            _S.DELETING,
            may_force_delete=True,
            has_worker=True,
        ),
        _S.RUNNING: _rule(
            {
                _A.PAUSE: _S.PAUSED,
                _A.STOP: _S.STOPPING,
                _A.KILL: _S.STOPPED,
                _A.RESET: _S.RUNNING,
                _A.CTRL_ALT_DEL: _S.RUNNING,
            },
            _S.PAUSED,
            _S.STOPPED,
            _S.CRASHED,
            _S.DELETING,
            may_force_delete=True,
            may_plug=True,
            has_worker=True,
        ),
        # A paused guest cannot answer the power button: resume it first, or kill it. Nor can it
        # take a device in or let one go.
        _S.PAUSED: _rule(
            {_A.RESUME: _S.RUNNING, _A.KILL: _S.STOPPED},
            _S.RUNNING,
            _S.STOPPED,
            _S.CRASHED,
            _S.DELETING,
            may_force_delete=True,
            has_worker=True,
        ),
        # The guest has been asked to power off. Back to running when it did not in time and must
        # not be killed.
        _S.STOPPING: _rule(
            {_A.KILL: _S.STOPPED},
            _S.RUNNING,
            _S.PAUSED,
            _S.STOPPED,
            _S.CRASHED,
            _S.DELETING,
            may_force_delete=True,
            has_worker=True,
        ),
        # The worker may still be there with the guest's last state, or be gone. Starting ends what
        # is left of it.
        _S.CRASHED: _rule(
            {_A.START: _S.STARTING, _A.KILL: _S.STOPPED},
            _S.STOPPED,
            _S.DELETING,
            may_delete=True,
            may_force_delete=True,
            may_reshape=True,
            may_plug=True,
        ),
        # A delete that failed half-way may be asked for again.
        _S.DELETING: _rule({}, may_delete=True, may_force_delete=True),
    }
)


def allowed_actions(state: VmState) -> list[VmAction]:
    """Return what a client may do in a state, in the order of VmAction."""
    return [action for action in VmAction if action in TABLE[state].actions]


def check_action(name: str, state: VmState, action: VmAction) -> VmState:
    """Return the state that an action leads to.

    Args:
        name: the VM's, for the message.
        state: the VM's state now.
        action: what the client wants.

    Raises:
        Conflict: the state does not allow it; carries the state and what it allows.
    """
    following = TABLE[state].actions.get(action)
    if following is None:
        raise _conflict(name, state, action.value)
    return following


def check_delete(name: str, state: VmState, *, force: bool) -> None:
    """Refuse a delete that the state does not allow.

    Raises:
        Conflict: as check_action().
    """
    rule = TABLE[state]
    if rule.may_delete or (force and rule.may_force_delete):
        return
    if rule.may_force_delete:
        raise _conflict(name, state, "delete", "; stop it first, or delete with force")
    raise _conflict(name, state, "delete")


def check_reshape(name: str, state: VmState, field: str) -> None:
    """Refuse a change of shape that the state does not allow.

    Raises:
        Conflict: as check_action().
    """
    if not TABLE[state].may_reshape:
        raise Conflict(
            "wrong_state",
            f"VM {name} is {state.value}: {field} can change only while it is stopped",
            field=field,
            state=state.value,
            allowed=[other.value for other, rule in TABLE.items() if rule.may_reshape],
        )


def check_plug(name: str, state: VmState) -> None:
    """Refuse to attach or detach a device where the state does not allow it.

    Raises:
        Conflict: as check_action().
    """
    if not TABLE[state].may_plug:
        raise Conflict(
            "wrong_state",
            f"VM {name} is {state.value}: devices come and go while it is running or at rest",
            state=state.value,
            allowed=[other.value for other, rule in TABLE.items() if rule.may_plug],
        )


def check_swap(name: str, state: VmState) -> None:
    """Refuse to put another file behind a disk where the state does not allow it.

    Raises:
        Conflict: as check_action().
    """
    allowed = [other for other, rule in TABLE.items() if rule.may_plug or other is _S.PAUSED]
    if state not in allowed:
        raise Conflict(
            "wrong_state",
            f"VM {name} is {state.value}: a disk can use another file while it is running, paused"
            " or at rest",
            state=state.value,
            allowed=[other.value for other in allowed],
        )


def check_outcome(state: VmState, following: VmState) -> None:
    """Hold the daemon itself to the table.

    Raises:
        AssertionError: a state follows that the table does not have; a defect of the daemon.
    """
    rule = TABLE[state]
    if following is not state and following not in rule.outcomes | set(rule.actions.values()):
        raise AssertionError(f"no way from {state.value} to {following.value}")


def _conflict(name: str, state: VmState, wanted: str, hint: str = "") -> Conflict:
    allowed = [action.value for action in allowed_actions(state)]
    now = f"allowed now: {', '.join(allowed)}" if allowed else "nothing is allowed now"
    return Conflict(
        "wrong_state",
        f"VM {name} is {state.value}: {wanted} is not allowed; {now}{hint}",
        state=state.value,
        allowed=allowed,
    )
