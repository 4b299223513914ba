# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""A worker process: one VM, from launch to its end.

The main thread runs one loop over the control socket, the guest's console output, the slow
devices' kicks and what the machine reports; vCPUs and fast devices have threads of their own.
"""

from __future__ import annotations

import collections
import logging
import os
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from devices.ratelimit import RateLimiter
from kvm_ffi.errors import HostError
from kvm_ffi.eventfd import EventFd
from kvm_ffi.heap_image import HeapImage
from kvm_ffi.system import HostFacts

from .. import protocol
from ..errors import ProtocolError, WorkerError
from ..images.errors import ImageError
from ..protocol import MachineSpec, NicWishes, Status
from .console import BoundedLog, decode_input
from .control import ControlServer, FdHandler
from .counts import Counts
from .device_makers import MachineFds
from .device_stats import device_status
from .last_words import write_last_words
from .limits import change_limits
from .machine import Machine
from .machine_event import MachineEvent
from .settling import Settling

log = logging.getLogger(__name__)

# A guest that resets itself at once after each start costs the host this often, no more.
MIN_RESET_INTERVAL_S: Final = 1.0
# hosteld may have given up, or died, between its fork and its launch.
LAUNCH_TIMEOUT_S: Final = 60.0
_POLICIES: Final = {"guest_reboot": "on_reboot", "guest_panic": "on_panic"}


class Worker:
    """The state of one VM, and what hosteld may do to it.

    Threads: the main thread, except post(), which any thread may call.
    """

    def __init__(
        self,
        vm_id: str,
        selector: selectors.BaseSelector,
        console_fd: int,
        last_words_fd: int,
        facts: HostFacts | None,
        image: HeapImage | None,
    ) -> None:
        self._selector = selector
        self._facts = facts
        self._settling = Settling(image)
        self._counts = Counts()
        self._console = BoundedLog(console_fd)
        self._last_words_fd = last_words_fd
        self._machine: Machine | None = None
        self._spec: MachineSpec | None = None
        self._fds: MachineFds | None = None
        self._status = Status(state="empty", vm_id=vm_id, pid=os.getpid())
        self._control: ControlServer | None = None
        self._events: collections.deque[MachineEvent] = collections.deque()
        self._events_ready = EventFd()
        self._is_done = False
        self._reset_due: float | None = None
        self._last_reset = 0.0
        # What a guest can make the worker log, and so write to the host's disk.
        self._log_limit = RateLimiter()
        self._with_fds: dict[str, FdHandler] = {
            "launch": self._on_launch,
            "attach": self._on_attach,
            "attach_backend": self._on_attach_backend,
            "swap_disk": self._on_swap_disk,
        }
        self._requests: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "status": self._on_status,
            "pause": self._on_pause,
            "resume": self._on_resume,
            "reset": self._on_reset,
            "power_button": self._on_power_button,
            "ctrl_alt_del": self._on_ctrl_alt_del,
            "resize_disk": self._on_resize_disk,
            "limit_disk": self._on_limit,
            "limit_group": self._on_limit,
            "detach": self._on_detach,
            "keep": self._on_keep,
            "set_nic": self._on_set_nic,
            "console_write": self._on_console_write,
            "stats": self._on_stats,
            "quit": self._on_quit,
        }

    def serve(self, control: ControlServer) -> None:
        """Run the main loop until the VM has ended."""
        self._control = control
        self._selector.register(self._events_ready.fd, selectors.EVENT_READ, self._on_events)
        launch_due = time.monotonic() + LAUNCH_TIMEOUT_S
        while not self._is_done:
            due = launch_due if self._status.state == "empty" else None
            for key, _ in self._selector.select(self._timeout(due)):
                # One callback may take away what a later one of the same round stands for.
                if self._selector.get_map().get(key.fd) is key:
                    self._call(key.data)
            if self._reset_due is not None and time.monotonic() >= self._reset_due:
                self._rebuild()
            if self._status.state == "empty" and time.monotonic() >= launch_due:
                self._end("never_launched", "nobody launched a VM in it")
            self._settling.go_on()
            if self._counts.is_due:
                self._tell_counts()
        self._teardown()

    def _timeout(self, launch_due: float | None) -> float | None:
        """Return the seconds until the main loop must do something by itself."""
        due = (launch_due, self._reset_due, self._settling.due, self._counts.due)
        dues = [at for at in due if at is not None]
        return max(0.0, min(dues) - time.monotonic()) if dues else None

    def _call(self, callback: Callable[[], object]) -> None:
        # The border "worker message": whatever goes wrong in one of them, the guest runs on.
        try:
            callback()
        except Exception:
            if self._log_limit.admit() is not None:
                log.exception("main loop callback failed callback=%r", callback)

    def post(self, event: MachineEvent) -> None:
        """Report what happened in the machine; callable on any thread, never blocks."""
        self._events.append(event)
        self._events_ready.signal()

    # --- requests

    def handle(self, op: str, args: dict[str, Any], fds: tuple[int, ...]) -> dict[str, Any]:
        """Serve one request of hosteld.

        Raises:
            WorkerError: it cannot be done, with a stable code.
            ProtocolError: its arguments are wrong.
        """
        if (take := self._with_fds.get(op)) is not None:
            return take(args, fds)
        protocol.close_all(fds)
        handler = self._requests.get(op)
        if handler is None:
            raise ProtocolError(f"unknown op {op!r}")
        return handler(args)

    def _on_launch(self, args: dict[str, Any], fds: tuple[int, ...]) -> dict[str, Any]:
        if self._status.state != "empty":
            protocol.close_all(fds)
            raise WorkerError("wrong_state", f"launch: the worker is {self._status.state}")
        self._fds = MachineFds(fds)
        try:
            self._spec = MachineSpec.decode(args)
            self._build()
        except BaseException as err:
            self._fds.close()
            if isinstance(err, HostError | ImageError | OSError | ValueError):
                raise WorkerError("launch_failed", str(err)) from err
            raise
        self._note_state("running")  # the reply tells it
        return self._status.encode()

    def _on_attach_backend(self, args: dict[str, Any], fds: tuple[int, ...]) -> dict[str, Any]:
        if len(fds) != 1 or self._machine is None:
            protocol.close_all(fds)
            raise WorkerError("wrong_state", f"attach_backend: the VM is {self._status.state}")
        try:
            self._machine.attach_backend(str(args.get("device")), socket.socket(fileno=fds[0]))
        finally:
            self._note_devices()
        return self._status.encode()

    def _on_status(self, _args: dict[str, Any]) -> dict[str, Any]:
        return self._status.encode()

    def _on_pause(self, _args: dict[str, Any]) -> dict[str, Any]:
        self._need("running").pause()
        self._set_state("paused")
        return self._status.encode()

    def _on_resume(self, _args: dict[str, Any]) -> dict[str, Any]:
        machine = self._need("paused")
        if self._reset_due is None:
            machine.resume()
        self._set_state("running")
        return self._status.encode()

    def _on_reset(self, _args: dict[str, Any]) -> dict[str, Any]:
        self._need("running", "paused", "crashed")
        self._status = replace(self._status, reason=None)
        self._rebuild()
        return self._status.encode()

    def _on_power_button(self, _args: dict[str, Any]) -> dict[str, Any]:
        self._need("running").press_power_button()
        return self._status.encode()

    def _on_ctrl_alt_del(self, _args: dict[str, Any]) -> dict[str, Any]:
        if not self._need("running").press_ctrl_alt_del():
            raise WorkerError(
                "guest_ignores_keys",
                "the guest has not read the keys before these, or has its keyboard disabled: try"
                " again, or use stop or reset",
            )
        return self._status.encode()

    def _on_resize_disk(self, args: dict[str, Any]) -> dict[str, Any]:
        machine = self._need("running", "paused", "crashed")
        return {"size_bytes": machine.refresh_disk(str(args.get("disk")))}

    def _on_limit(self, args: dict[str, Any]) -> dict[str, Any]:
        machine = self._need("running", "paused", "crashed")
        assert self._spec is not None
        # A reset builds the machine anew, from the spec.
        self._spec = change_limits(machine, self._spec, args)
        return {}

    def _on_swap_disk(self, args: dict[str, Any], fds: tuple[int, ...]) -> dict[str, Any]:
        try:
            disk_id, swaps = str(args.get("disk")), args.get("swaps")
            if len(fds) != 1 or type(swaps) is not int:
                raise ProtocolError("swap_disk: brings one descriptor and a number, swaps")
            self._need("running", "paused").swap_disk(disk_id, fds[0])
            assert self._spec is not None
            assert self._fds is not None
            self._fds.replace(self._spec.disk(disk_id).fd, fds[0])
            self._spec = self._spec.with_disk(disk_id, swaps=swaps)
        finally:
            protocol.close_all(fds)
        self._note_devices()
        self._tell()  # as in _on_attach()
        return self._status.encode()

    def _on_set_nic(self, args: dict[str, Any]) -> dict[str, Any]:
        nic_id, wishes = str(args.get("nic")), NicWishes.decode(args.get("wishes"))
        self._need("running", "paused").set_nic(nic_id, wishes)
        assert self._spec is not None
        self._spec = self._spec.with_nic_wishes(nic_id, wishes)
        return {}

    def _on_attach(self, args: dict[str, Any], fds: tuple[int, ...]) -> dict[str, Any]:
        try:
            machine = self._need("running")
            assert self._spec is not None
            assert self._fds is not None
            if args.get("first_fd") != len(self._fds):
                raise WorkerError("changed_meanwhile", "another device came first: try again")
            part = self._spec.part(args)
        except BaseException:
            protocol.close_all(fds)
            raise
        self._fds.extend(fds)
        try:
            machine.attach(part, self._fds)
        except BaseException as err:
            self._fds.release(fds)
            if isinstance(err, HostError | OSError | ValueError):
                raise WorkerError("attach_failed", str(err)) from err
            raise
        self._spec = self._spec.joined(part)
        self._note_devices()
        self._tell()  # also for a hosteld that has given up on the reply
        return self._status.encode()

    def _on_detach(self, args: dict[str, Any]) -> dict[str, Any]:
        machine, device_id = self._need("running"), str(args.get("device"))
        if args.get("force"):
            self._forget_devices({device_id: machine.pull(device_id)})
        else:
            machine.ask_to_eject(device_id)
        return self._status.encode()

    def _on_keep(self, args: dict[str, Any]) -> dict[str, Any]:
        machine = self._need("running", "paused", "crashed")
        machine.keep(str(args.get("device")))
        self._forget_devices(machine.collect_ejected())
        return self._status.encode()

    def _forget_devices(self, gone: dict[str, tuple[int, ...]]) -> None:
        assert self._spec is not None
        assert self._fds is not None
        self._spec = self._spec.without(gone)
        for fds in gone.values():
            self._fds.release(fds)
        self._note_devices()

    def _note_devices(self) -> None:
        if self._spec is not None and self._fds is not None:
            self._status = replace(self._status, **device_status(self._spec, self._fds))

    def _on_console_write(self, args: dict[str, Any]) -> dict[str, Any]:
        data = decode_input(str(args.get("data")))
        return {"taken": self._need("running", "paused").serial.write_input(data)}

    def _on_stats(self, _args: dict[str, Any]) -> dict[str, Any]:
        stats = self._need("running", "paused", "crashed").stats()
        return {**stats, "console_lost_bytes": self._console.lost_bytes}

    def _on_quit(self, _args: dict[str, Any]) -> dict[str, Any]:
        self._end("killed", "ended on request")
        return {}

    def _need(self, *states: str) -> Machine:
        if self._machine is None or self._status.state not in states:
            wanted = " or ".join(states)
            raise WorkerError("wrong_state", f"the VM is {self._status.state}, not {wanted}")
        return self._machine

    # --- what the machine reports

    def _on_events(self) -> None:
        self._events_ready.drain()
        while self._events and not self._is_done:
            self._on_event(self._events.popleft())

    def _on_event(self, event: MachineEvent) -> None:
        if self._machine is None or event.generation != self._machine.generation:
            return  # from before a reset
        if self._log_limit.admit() is not None:
            log.info("machine event code=%s: %s", event.code, event.message)
        if event.code == "boot_timer":
            self._on_boot_timer(event)
        elif event.code in ("ejected", "backend_lost"):
            self._forget_devices(self._machine.collect_ejected())
            self._tell()
        elif event.code == "disk_error":
            self._tell_counts()
        elif event.code == "guest_poweroff":
            self._end(event.code, event.message)
        elif event.code in _POLICIES:
            self._on_guest_reset(event, self._policy(_POLICIES[event.code]))
        elif event.code == "watchdog":
            self._on_watchdog(event)
        else:
            self._crash(event)

    def _on_boot_timer(self, event: MachineEvent) -> None:
        if self._status.boot_time_us is None:
            assert self._spec is not None
            elapsed_us = (event.at_ns - self._spec.requested_ns) // 1000
            self._status = replace(self._status, boot_time_us=elapsed_us)
            self._tell()

    def _on_watchdog(self, event: MachineEvent) -> None:
        if self._machine is None or self._status.state != "running":
            return  # paused or crashed a moment before
        self._counts.add_watchdog()
        policy = self._policy("watchdog")
        if policy == "pause":
            state, reason = "paused", event.reason
            try:
                self._machine.pause()
            except TimeoutError as err:
                state, reason = "running", event.reason_with(f"it cannot be paused: {err}")
            self._note_state(state, reason)
            self._look_at_counts(is_last=state == "paused")
            self._tell()
            return
        self._tell_counts()
        if policy != "none":
            self._on_guest_reset(event, "stop" if policy == "poweroff" else policy)

    def _tell_counts(self) -> None:
        if self._look_at_counts():
            self._tell()

    def _look_at_counts(self, *, is_last: bool = False) -> bool:
        machine = self._machine
        is_news = machine is not None and self._counts.look(machine.disks(), is_last=is_last)
        self._status = replace(self._status, **self._counts.told)
        return is_news

    def _policy(self, name: str) -> str:
        assert self._spec is not None
        return str(getattr(self._spec, name))

    def _on_guest_reset(self, event: MachineEvent, policy: str) -> None:
        if policy == "keep":
            self._set_state(self._status.state, event.reason)
            return
        if self._status.state == "crashed":
            return  # another vCPU was first, and the operator wants to look at it
        if policy == "stop":
            self._end(event.code, event.message)
            return
        assert self._machine is not None
        self._machine.stop()
        self._status = replace(self._status, reason=event.reason)
        self._reset_due = max(time.monotonic(), self._last_reset + MIN_RESET_INTERVAL_S)

    def _crash(self, event: MachineEvent) -> None:
        """Stop the vCPUs and keep everything else as it is, for the operator to look at."""
        assert self._machine is not None
        self._machine.stop()
        self._reset_due = None
        self._set_state("crashed", event.reason)
        write_last_words(self._last_words_fd, self._status)

    # --- state

    def _build(self, *, start: bool = True) -> None:
        assert self._spec is not None
        assert self._fds is not None
        self._machine = Machine(
            self._spec,
            self._fds,
            self.post,
            self._facts,
            is_after_watchdog=(self._status.reason or {}).get("code") == "watchdog",
        )
        output, loop = self._machine.serial.output, self._machine.event_loop
        self._selector.register(output.fd, selectors.EVENT_READ, self._on_console_output)
        self._selector.register(loop.fileno(), selectors.EVENT_READ, loop.dispatch)
        self._settling.begin()
        if start:
            self._machine.start()

    def _unbuild(self) -> None:
        machine, self._machine = self._machine, None
        if machine is None:
            return
        machine.stop()
        while data := machine.serial.read_output():
            self._console.append(data)
        self._selector.unregister(machine.serial.output.fd)
        self._selector.unregister(machine.event_loop.fileno())
        disks = machine.disks()
        machine.close()
        self._counts.look(disks)  # what they have counted since goes with them

    def _rebuild(self) -> None:
        """Build the machine anew from the same spec and descriptors: a reset."""
        self._reset_due = None
        self._last_reset = time.monotonic()
        is_paused = self._status.state == "paused"
        try:
            self._unbuild()
            os.ftruncate(self._last_words_fd, 0)
            self._build(start=not is_paused)
        except Exception as err:
            # The border "worker message": after this there is no machine to go back to.
            log.exception("reset failed")
            self._end("reset_failed", f"{type(err).__name__}: {err}")
            return
        self._status = replace(self._status, **self._counts.told, resets=self._status.resets + 1)
        self._set_state("paused" if is_paused else "running", self._status.reason)

    def _end(self, code: str, message: str) -> None:
        self._is_done = True
        if self._machine is not None:
            self._machine.stop()
            self._look_at_counts(is_last=True)
        self._set_state("stopped", {"code": code, "message": message, "detail": {}})
        write_last_words(self._last_words_fd, self._status)

    def _teardown(self) -> None:
        self._unbuild()
        self._selector.unregister(self._events_ready.fd)
        self._events_ready.close()
        if self._fds is not None:
            self._fds.close()

    def _set_state(self, state: str, reason: dict[str, Any] | None = None) -> None:
        self._note_state(state, reason)
        self._tell()

    def _note_state(self, state: str, reason: dict[str, Any] | None = None) -> None:
        self._note_devices()  # also of back ends that were lost between two machines
        self._status = replace(self._status, state=state, reason=reason)

    def _tell(self) -> None:
        if self._control is not None:
            self._control.notify("state", self._status.encode())

    # --- console

    def _on_console_output(self) -> None:
        if self._machine is not None:
            self._machine.serial.output.drain()
            # One piece a round: what remains signals again, and others get their turn.
            self._console.append(self._machine.serial.read_output())
