# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The real zygote around a worker without a VM: ``fake_zygote.py --fd N``.

The words of the VM's command line choose how the worker behaves:

    refuse-launch, die-on-launch, hang-on-launch
    booted, crashed, panicked, rebooted     told right after the launch
    exit-3                                  ends by itself, with a line in its log
    ignore-button, die-on-pause, hang-on-pause, slow-console, bad-stats
    ignore-keys                             a guest that reads no keys
    hang-up-on-stats                        closes the connection once, and lives
    keep-devices, late-eject                detaches nothing unless forced, or not before it is told
                                            to keep it
    old-worker                              knows nothing of devices that come and go
    mute-attach, mute-swap_disk             does it, and does not answer
    late-swap                               swaps a disk's file when it is asked something else next
    surrogate                               tells a reason that is no Unicode text
    lie=PID                                 says that it is that process, from the launch on
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import signal
import socket
import sys
import time
import types
from dataclasses import replace
from typing import Any

from daemon import protocol, zygote
from daemon.protocol import MachineSpec, Status

AFTER_LAUNCH: dict[str, dict[str, Any]] = {
    "booted": {"boot_time_us": 4321},
    "crashed": {
        "state": "crashed",
        "reason": {"code": "triple_fault", "message": "the guest fell over", "detail": {"rip": 16}},
    },
    "panicked": {"reason": {"code": "guest_panic", "message": "the guest panicked", "detail": {}}},
    "surrogate": {
        "reason": {"code": "guest_panic", "message": "\ud800", "detail": {"\ud801": "\ud802"}}
    },
    "rebooted": {
        "reason": {"code": "guest_reboot", "message": "it rebooted", "detail": {}},
        "resets": 1,
    },
}


class FakeWorker:
    """Speaks the protocol, and does as its command line says."""

    def __init__(self, vm_id: str, fds: tuple[int, ...]) -> None:
        listener, self.console, self.log, self.words_fd = fds
        self.listener = socket.socket(fileno=listener)
        self.status = Status("empty", vm_id, os.getpid())
        self.moods: set[str] = set()
        self.fds: tuple[int, ...] = ()
        self.swapped: tuple[int, ...] = ()  # with the lock on the file
        self.late: dict[str, int] = {}
        self.peer: socket.socket | None = None

    def run(self) -> int:
        """Serve one hosteld after the other."""
        while True:
            self.peer, _ = self.listener.accept()
            with contextlib.suppress(ConnectionError), self.peer:
                while (message := protocol.receive(self.peer)) is not None:
                    self.serve(message)
            self.peer = None

    def serve(self, message: protocol.Message) -> None:
        op, args = message.body["op"], message.body["args"]
        if op == "launch":
            self.launch(MachineSpec.decode(args), message.fds)
        if f"hang-on-{op}" in self.moods:
            time.sleep(600)
        if f"die-on-{op}" in self.moods:
            os.kill(os.getpid(), signal.SIGKILL)
        if f"hang-up-on-{op}" in self.moods:
            self.moods.remove(f"hang-up-on-{op}")
            raise ConnectionResetError
        if (error := self.refusal(op)) is not None:
            if op != "launch":
                protocol.close_all(message.fds)
            self.send({"id": message.body["id"], "error": error})
            return
        if op in ("attach", "detach", "keep"):
            self.plug(op, args, message.fds)
        self.swap(op, args, message.fds)
        if f"mute-{op}" in self.moods:
            self.moods.remove(f"mute-{op}")
            return
        reply = self.answer(op, args)
        self.send({"id": message.body["id"], "ok": reply})
        if op == "launch":
            self.live()

    def refusal(self, op: str) -> dict[str, str] | None:
        if f"refuse-{op}" in self.moods:
            return {"code": "boot_failed", "message": "no such luck"}
        if op == "ctrl_alt_del" and "ignore-keys" in self.moods:
            return {"code": "guest_ignores_keys", "message": "the guest has not read them"}
        return None

    def launch(self, spec: MachineSpec, fds: tuple[int, ...]) -> None:
        self.fds = fds
        self.moods = set(spec.cmdline.split())
        ids = (*(disk.id for disk in spec.disks), *(nic.id for nic in spec.nics))
        if "old-worker" not in self.moods:
            self.status = replace(self.status, devices=ids, next_fd=len(fds))
            self.status = replace(self.status, swaps={disk.id: disk.swaps for disk in spec.disks})

    def answer(self, op: str, args: dict[str, Any]) -> dict[str, Any]:
        states = {"pause": "paused", "resume": "running", "reset": "running"}
        if op == "launch":
            self.status = replace(self.status, state="running")
        elif op in states:
            self.tell(state=states[op], resets=self.status.resets + (op == "reset"))
        elif op == "power_button" and "ignore-button" not in self.moods:
            self.end("guest_poweroff", "the guest powered itself off")
        elif op == "quit":
            self.end("killed", "ended on request")
        elif op == "stats":
            one = {"read_bytes": 7}
            return {"vcpu_exits": {"hlt": 1}, "disks": {"root": one}, "nics": {}} | {
                "console_dropped_bytes": 3,
                "console_lost_bytes": "many" if "bad-stats" in self.moods else 4,
            }
        elif op == "console_write":
            data = base64.b64decode(args["data"])
            taken = len(data) // 2 if "slow-console" in self.moods else len(data)
            os.write(self.console, data[:taken])
            return {"taken": taken}
        elif op == "resize_disk":
            return {"size_bytes": os.fstat(self.fds[2]).st_size}
        return self.status.encode()

    def plug(self, op: str, args: dict[str, Any], fds: tuple[int, ...]) -> None:
        devices = list(self.status.devices or ())
        if op == "attach":
            assert args["first_fd"] == len(self.fds)
            self.fds += fds
            for device in (*args.get("disks", ()), *args.get("nics", ())):
                for index in (*device.get("tap_fds", ()), device.get("fd", len(self.fds) - 1)):
                    assert args["first_fd"] <= index < len(self.fds)
                devices.append(device["id"])
        elif not self.moods & {"keep-devices", "late-eject"} or args.get("force"):
            devices = [name for name in devices if name != args["device"]]
        elif op == "keep" and "late-eject" in self.moods:
            devices.remove(args["device"])
        self.tell(devices=tuple(devices), next_fd=len(self.fds))

    def swap(self, op: str, args: dict[str, Any], fds: tuple[int, ...]) -> None:
        if self.late:
            self.tell(swaps=self.late)
        if op == "swap_disk":
            protocol.close_all(self.swapped)
            self.swapped = fds
            swaps = {**self.status.swaps, args["disk"]: args["swaps"]}
            if "late-swap" in self.moods:
                self.late = swaps
                self.moods.add("mute-swap_disk")
            else:
                self.tell(swaps=swaps)

    def live(self) -> None:
        """Do what the guest does after its start."""
        for mood in self.moods:
            if mood.startswith("lie="):
                self.status = replace(self.status, pid=int(mood.removeprefix("lie=")))
        for mood, news in AFTER_LAUNCH.items():
            if mood in self.moods:
                self.tell(**news)
        if self.status.state == "crashed":
            self.write_last_words()
        if "exit-3" in self.moods:
            os.write(self.log, b"first line\nout of luck\n")
            os._exit(3)

    def tell(self, **news: Any) -> None:  # noqa: ANN401  fields of Status
        self.status = replace(self.status, **news)
        self.send({"notice": "state", "data": self.status.encode()})

    def end(self, code: str, message: str) -> None:
        self.tell(state="stopped", reason={"code": code, "message": message, "detail": {}})
        self.write_last_words()
        os._exit(0)

    def write_last_words(self) -> None:
        os.pwrite(self.words_fd, json.dumps(self.status.encode()).encode(), 0)

    def send(self, body: dict[str, Any]) -> None:
        if self.peer is not None:
            protocol.send(self.peer, body)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    fake = types.ModuleType("daemon.worker.process")
    fake.run = lambda vm_id, fds, *_: FakeWorker(vm_id, fds).run()  # type: ignore[attr-defined]
    fake.prepare = lambda image, learned: None  # type: ignore[attr-defined]
    fake.warm_up = lambda: None  # type: ignore[attr-defined]
    sys.modules["daemon.worker.process"] = sys.modules["daemon.worker.warm_up"] = fake
    zygote.Zygote(socket.socket(fileno=parser.parse_args().fd)).run()


if __name__ == "__main__":
    main()
