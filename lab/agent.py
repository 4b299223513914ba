# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Runs inside the lab: starts commands for `lab exec`, and relays forwarded ports.

One TCP connection is one request, and starts with a line of JSON that carries the token. The
network card that this comes in by lives in a network namespace of its own, where only this
program's sockets are: the lab's root namespace is as empty as on a machine without a network,
and no firewall rule or link that a test makes there can cut the lab off.

A command's connection then carries frames: one byte of kind, the length, the payload.
To the agent: `i` standard input (empty: its end), or `n`, which means nothing. From it: `o` and
`e` output, `x` the exit status, or `f` why there is none. If the other side goes away, the
command's process group ends.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

DIRECTORY: Final = Path("/run/lab")
BUSYBOX: Final = DIRECTORY / "busybox"
ADDRESS: Final = "10.0.2.15"  # what QEMU's user network forwards to
AGENT_PORT: Final = 1
HEADER: Final = struct.Struct("!cI")
STATUS: Final = struct.Struct("!i")
CHUNK_BYTES: Final = 1 << 16
MAX_FRAME_BYTES: Final = 1 << 20
CLONE_NEWNET: Final = 0x40000000
GRACE_S: Final = 2.0  # between asking a process group to end and ending it
LINGER_S: Final = 10.0  # how long the other side may take to see that a command has ended
OPEN_FILES: Final = 65536
POLL_S: Final = 0.02
# <linux/kvm.h>; written out because the lab runs before anything of the project is built.
KVM_CREATE_VM: Final = 0xAE01
KVM_CREATE_VCPU: Final = 0xAE41
KVM_CREATE_IRQCHIP: Final = 0xAE60


def enter_private_network(card: str) -> int:
    """Move this thread and the network card `card` to a new network namespace.

    Returns:
        A file descriptor of the namespace that the thread was in.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    # Started before we leave, this one stays behind and can still see the card.
    script = f"read _; {BUSYBOX} ip link set {card} netns {os.getpid()}"
    with subprocess.Popen([BUSYBOX, "sh", "-c", script], stdin=subprocess.PIPE) as mover:
        if libc.unshare(CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "unshare")
        mover.communicate(b"\n", timeout=30)
    for words in (f"link set {card} up", f"addr add {ADDRESS}/24 dev {card}", "link set lo up"):
        subprocess.run([BUSYBOX, "ip", *words.split()], check=True)
    return home


def return_to_network(home: int) -> None:
    """Bring this thread back to the namespace `home`; its sockets stay where they were made."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(home, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")
    os.close(home)


def find_card() -> str:
    """Return the name of the one network card that the lab has."""
    for path in Path("/sys/class/net").iterdir():
        if (path / "device").exists():
            return path.name
    raise RuntimeError("no network card")


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data` to a blocking file descriptor."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def refusal(err: OSError, program: str, directory: str) -> bytes:
    """Return the frame that says why a program did not start, with the usual status for it."""
    status = 127 if isinstance(err, FileNotFoundError) else 126
    if err.filename == directory:
        status = 125
    message = f"{err.filename or program}: {err.strerror}".encode()
    return HEADER.pack(b"f", STATUS.size + len(message)) + STATUS.pack(status) + message


def hold_kvm_branches() -> list[int]:
    """Keep two idle VMs for as long as the returned file descriptors are open.

    KVM patches branches in its own code and in the scheduler's when the first VM comes, when the
    last goes, and when a vCPU is first seen without a local APIC or with one that is not enabled
    yet. A CPU meets a breakpoint there meanwhile. QEMU 7.2 may keep its translation of
    that breakpoint if another emulated CPU writes the final instruction at the same moment, and
    the kernel then takes the breakpoint again for ever ("soft lockup" in __apic_accept_irq). With
    one idle vCPU of each kind, nothing is patched when VMs start and stop.
    """
    held = [os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)]
    for has_apic in (True, False):
        vm = fcntl.ioctl(held[0], KVM_CREATE_VM, 0)
        held.append(vm)
        if has_apic:
            fcntl.ioctl(vm, KVM_CREATE_IRQCHIP, 0)
        held.append(fcntl.ioctl(vm, KVM_CREATE_VCPU, 0))
    return held


class Command:
    """One running command and the connection that asked for it."""

    def __init__(self, connection: socket.socket, process: "subprocess.Popen[bytes]") -> None:
        self.connection = connection
        self.process = process
        self.has_ended = False

    def kill(self, number: int) -> None:
        """Send a signal to the command's process group, if any of it is left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def end(self) -> None:
        """End the process group: asked first, then made to.

        Not after the command has ended by itself: what it left in the background may live on.
        """
        if self.has_ended:
            return
        self.kill(signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        while self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        self.kill(signal.SIGKILL)

    def feed(self, stream: BinaryIO) -> None:
        """Copy standard input from the connection; end the command if the connection ends."""
        pipe = self.process.stdin
        while head := stream.read(HEADER.size):
            kind, length = HEADER.unpack(head) if len(head) == HEADER.size else (b"i", 0)
            if kind == b"n":
                continue
            data = stream.read(min(length, MAX_FRAME_BYTES))
            # A command need not read its input; what is left over is dropped.
            with contextlib.suppress(BrokenPipeError, ValueError):
                if pipe is not None and data:
                    write_all(pipe.fileno(), data)
                elif pipe is not None:
                    pipe.close()
        self.end()
        if pipe is not None:
            pipe.close()

    def drop_output(self) -> None:
        """Close our ends of the output pipes; who still writes to them gets SIGPIPE."""
        for pipe in (self.process.stdout, self.process.stderr):
            cast(BinaryIO, pipe).close()

    def send(self, kind: bytes, payload: bytes) -> None:
        """Send one frame. Raises OSError when the other side is gone."""
        self.connection.sendall(HEADER.pack(kind, len(payload)) + payload)

    def pump(self) -> None:
        """Copy output to the connection until the command has ended, then say how.

        Output that is in the pipes when the command ends is still sent; what a background
        process of it writes later is not waited for.
        """
        kinds = {cast(BinaryIO, self.process.stdout).fileno(): b"o"}
        kinds[cast(BinaryIO, self.process.stderr).fileno()] = b"e"
        poll = select.poll()
        for fd in kinds:
            poll.register(fd, select.POLLIN)
        ended = os.pidfd_open(self.process.pid)
        poll.register(ended, select.POLLIN)
        try:
            while kinds:
                ready = {fd for fd, _ in poll.poll()}
                for fd in ready & kinds.keys():
                    if data := os.read(fd, CHUNK_BYTES):
                        self.send(kinds[fd], data)
                    else:
                        poll.unregister(fd)
                        del kinds[fd]
                if ready == {ended}:
                    break
        finally:
            os.close(ended)
        self.has_ended = True
        status = self.process.wait()
        self.send(b"x", STATUS.pack(status if status >= 0 else 128 - status))


class Agent:
    """Serves the agent's port until told to stop, or until nobody has used it for long."""

    def __init__(self, config: dict[str, Any], listener: socket.socket) -> None:
        self.config = config
        self.listener = listener
        self.commands: dict[str, Command] = {}
        self.stopping = threading.Event()

    def serve(self) -> None:
        """Accept requests, each in a thread of its own."""
        idle_s: float = self.config["idle_s"]
        last_use = time.monotonic()
        self.listener.settimeout(0.25)
        while not self.stopping.is_set():
            if self.commands:
                last_use = time.monotonic()
            if idle_s and time.monotonic() - last_use > idle_s:
                print("lab: nobody used it, stopping", flush=True)
                return
            with contextlib.suppress(TimeoutError):
                connection, _ = self.listener.accept()
                connection.settimeout(None)
                last_use = time.monotonic()
                threading.Thread(target=self.answer, args=(connection,), daemon=True).start()

    def answer(self, connection: socket.socket) -> None:
        """Serve one connection; whatever goes wrong with it stays with it."""
        with connection, connection.makefile("rb") as stream:
            try:
                request = json.loads(stream.readline(MAX_FRAME_BYTES))
                if request.get("token") != self.config["token"]:
                    return
                getattr(self, "do_" + request["do"])(request, connection, stream)
            except OSError:
                return
            except (ValueError, KeyError, AttributeError) as err:
                print(f"lab: bad request: {err!r}", flush=True)

    def do_ping(self, request: dict[str, Any], connection: socket.socket, stream: BinaryIO) -> None:
        """Say that the agent is there."""
        connection.sendall(HEADER.pack(b"x", STATUS.size) + STATUS.pack(0))

    def do_stop(self, request: dict[str, Any], connection: socket.socket, stream: BinaryIO) -> None:
        """Power the lab off."""
        self.do_ping(request, connection, stream)
        self.stopping.set()

    def do_signal(
        self, request: dict[str, Any], connection: socket.socket, stream: BinaryIO
    ) -> None:
        """Send a signal to a running command's process group."""
        command = self.commands.get(request["id"])
        if command is not None:
            command.kill(int(request["signal"]))
        self.do_ping(request, connection, stream)

    def do_exec(self, request: dict[str, Any], connection: socket.socket, stream: BinaryIO) -> None:
        """Run a command and stay with it to its end."""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            process = subprocess.Popen(
                request["argv"],
                bufsize=0,
                stdin=subprocess.PIPE if request["stdin"] else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=request["cwd"],
                env=request["env"],
                start_new_session=True,
            )
        except OSError as err:
            connection.sendall(refusal(err, request["argv"][0], request["cwd"]))
            return
        command = Command(connection, process)
        self.commands[request["id"]] = command
        feeder = threading.Thread(target=command.feed, args=(stream,), daemon=True)
        try:
            feeder.start()
            command.pump()
        finally:
            del self.commands[request["id"]]
            command.drop_output()
        # Closing with input unread would reset the connection and lose the exit status: the
        # other side closes first, and until then the feeder drops what still comes.
        connection.shutdown(socket.SHUT_WR)
        feeder.join(LINGER_S)


def relay(listener: socket.socket, port: int) -> None:
    """Connect each caller of `listener` to `port` on the lab's loopback."""
    while True:
        caller, _ = listener.accept()
        try:
            callee = socket.create_connection(("127.0.0.1", port), timeout=10)
        except OSError:
            caller.close()
            continue
        callee.settimeout(None)
        for source, sink in ((caller, callee), (callee, caller)):
            threading.Thread(target=copy, args=(source, sink), daemon=True).start()


def copy(source: socket.socket, sink: socket.socket) -> None:
    """Copy one direction of a connection, then close that direction."""
    with contextlib.suppress(OSError):
        while data := source.recv(CHUNK_BYTES):
            sink.sendall(data)
    for side, how in ((sink, socket.SHUT_WR), (source, socket.SHUT_RD)):
        with contextlib.suppress(OSError):
            side.shutdown(how)


def main() -> None:
    """Set up, say that the lab is ready on the console, and serve."""
    config = json.loads((DIRECTORY / "config.json").read_text())
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
    home = enter_private_network(find_card())
    listener = socket.create_server((ADDRESS, AGENT_PORT), backlog=64)
    relays = [(socket.create_server((ADDRESS, p), backlog=64), p) for p in config["forwards"]]
    return_to_network(home)
    for pair in relays:
        threading.Thread(target=relay, args=pair, daemon=True).start()
    # By main.sh, beside us: /dev/kvm and the like.
    while not (DIRECTORY / "prepared").exists():
        time.sleep(POLL_S)
    held = hold_kvm_branches()
    print("lab: ready", flush=True)
    Agent(config, listener).serve()
    for fd in reversed(held):
        os.close(fd)


if __name__ == "__main__":
    main()
