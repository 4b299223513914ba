# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The zygote: a small, warm, single-threaded process that forks one worker per VM.

It has imported all that a worker needs and nothing else, so a fork costs about 2 ms and shares its
pages. One fork, the spare, is always made ahead and waits for its VM. hosteld starts the zygote
before it imports anything large; when hosteld dies the zygote and the spare end, and the workers
live on.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import selectors
import signal
import socket
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from . import protocol
from .errors import ProtocolError

if TYPE_CHECKING:
    from kvm_ffi.heap_image import HeapImage

log = logging.getLogger(__name__)

WORKER_FDS: Final = 4  # listener, console, log, last_words: the order of protocol.py
SCOUT_TIMEOUT_S: Final = 20


@dataclass(frozen=True, slots=True)
class ZygoteHandle:
    """hosteld's end of a zygote; closing the socket, which is hosteld's to do, ends the zygote."""

    sock: socket.socket
    pid: int


def start() -> ZygoteHandle:
    """Fork the zygote off the calling process, which must be single-threaded and still small.

    Raises:
        OSError: no socket pair, or no process, to be had.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        _close_inherited(theirs)
        _enter(theirs)
    theirs.close()
    return ZygoteHandle(ours, pid)


def _close_inherited(keep: socket.socket) -> None:
    """Close what hosteld has open, such as systemd's sockets: no worker may hold any of it."""
    os.closerange(3, keep.fileno())
    os.closerange(keep.fileno() + 1, os.sysconf("SC_OPEN_MAX"))


def _enter(sock: socket.socket) -> None:
    """Run the zygote in this process and never return."""
    status = 1
    try:
        Zygote(sock).run()
        status = 0
    except Exception:
        # The border of the process: told in the log, and by the exit status.
        logging.getLogger(__name__).exception("zygote failed")
    finally:
        # Not sys.exit: a fork must not run hosteld's exit handlers.
        os._exit(status)


@dataclass(frozen=True, slots=True)
class _Spare:
    """A worker that waits on a socket for its VM."""

    pid: int
    sock: socket.socket


class Zygote:
    """Serves fork requests until hosteld's end of the socket closes."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._wake_read, self._wake_write = socket.socketpair()
        self._image: HeapImage | None = None
        self._learned = b""
        self._spare: _Spare | None = None
        self._wants_spare = True

    def run(self) -> None:
        """Import the worker, freeze the heap, then serve."""
        from kvm_ffi.host_process import keep_heap_small

        from .worker import process
        from .worker.warm_up import warm_up

        self._worker = process
        os.setsid()
        with open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)  # hosteld's standard input may be a terminal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for end in (self._wake_read, self._wake_write):
            end.setblocking(False)
        signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
        self._facts = warm_up()
        # Collected once, then out of the collector's sight: a collection in a worker would write to
        # every object's header and so unshare the zygote's pages.
        gc.collect()
        keep_heap_small()
        gc.freeze()
        self._make_image()
        with selectors.DefaultSelector() as selector:
            selector.register(self._sock, selectors.EVENT_READ)
            selector.register(self._wake_read, selectors.EVENT_READ)
            self._send({"notice": "hello", "data": {}})
            while self._serve(selector):
                pass

    def _make_image(self) -> None:
        """Make the memory an image, and send a fork ahead to learn what a launch writes to."""
        from kvm_ffi.heap_image import HeapImage

        try:
            self._image = HeapImage()
        except OSError as err:
            log.warning("workers will use more memory: no heap image: %s", err)
            return
        if self._facts is not None:
            self._learned = _send_scout(self._image)

    def _serve(self, selector: selectors.BaseSelector) -> bool:
        """Wait for one round of events; False when hosteld has gone."""
        events = selector.select(0 if self._wants_spare else None)
        if not events and (error := self._make_spare(selector)) is not None:
            log.warning("no worker ahead: fork: %s", error.strerror)
        for key, _ in events:
            if key.fileobj is self._wake_read:
                self._wake_read.recv(4096)
                self._reap()
                continue
            # Before the request is read: a fork is to inherit none of its descriptors.
            error = self._make_spare(selector)
            try:
                message = protocol.receive(self._sock)
            except ConnectionResetError:
                return False  # hosteld died with an answer of ours unread
            if message is None:
                return False
            try:
                self._answer(message, error)
            finally:
                protocol.close_all(message.fds)
        return True

    def _make_spare(self, selector: selectors.BaseSelector) -> OSError | None:
        """Have a worker wait for its VM; return why there is none."""
        # Not again by itself if this fails: the next request tries.
        self._wants_spare = False
        if self._spare is not None:
            return None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            pid = os.fork()
        except OSError as err:
            ours.close()
            theirs.close()
            return err
        if pid == 0:
            ours.close()
            self._become_worker(theirs, selector)
        theirs.close()
        self._spare = _Spare(pid, ours)
        return None

    def _answer(self, message: protocol.Message, error: OSError | None) -> None:
        request_id = message.body.get("id")
        if message.body.get("op") != "fork" or len(message.fds) != WORKER_FDS:
            self._refuse(request_id, "bad_request", "the zygote knows only fork, with four fds")
            return
        if self._spare is None:
            assert error is not None
            self._refuse(request_id, "fork_failed", f"fork: {error.strerror}")
            return
        spare, self._spare = self._spare, None
        self._wants_spare = True
        # Safe against pid reuse: this process is the parent and has not reaped it yet.
        pidfd = -1
        try:
            pidfd = os.pidfd_open(spare.pid)
            vm_id = message.body.get("args", {}).get("vm", "")
            protocol.send(spare.sock, {"vm": vm_id}, message.fds)
            self._send({"id": request_id, "ok": {"pid": spare.pid}}, (pidfd,))
        except OSError as err:
            # It ends by itself, without a VM.
            self._refuse(request_id, "fork_failed", f"no worker: {err.strerror}")
        finally:
            spare.sock.close()
            if pidfd >= 0:
                os.close(pidfd)

    def _refuse(self, request_id: object, code: str, message: str) -> None:
        self._send({"id": request_id, "error": {"code": code, "message": message}})

    def _send(self, body: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        try:
            protocol.send(self._sock, body, fds)
        except OSError as err:
            # hosteld has gone: the next receive says so, and the zygote ends.
            log.info("message to hosteld lost: %s", err)

    def _become_worker(self, sock: socket.socket, selector: selectors.BaseSelector) -> None:
        """Drop all that is the zygote's, wait for a VM, run it, and leave by os._exit."""
        status = 1
        try:
            image = self._worker.prepare(self._image, self._learned)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            selector.close()
            for end in (self._sock, self._wake_read, self._wake_write):
                end.close()
            message = protocol.receive(sock)
            sock.close()
            status = 0  # the zygote has gone, and this worker was never needed
            if message is not None:
                vm_id = str(message.body["vm"])
                status = self._worker.run(vm_id, message.fds, self._facts, image)
        except Exception:
            # The border of the process: the traceback goes to the worker's own log.
            logging.getLogger("daemon.worker").exception("worker failed")
            status = 1
        finally:
            logging.shutdown()
            os._exit(status)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if self._spare is not None and pid == self._spare.pid:
                # One that cannot start is not to be made again and again.
                log.error("spare worker ended pid=%d status=%d", pid, status)
                self._spare.sock.close()
                self._spare = None
                continue
            self._send({"notice": "exited", "data": {"pid": pid, "status": status}})


def _send_scout(image: HeapImage) -> bytes:
    """Have a fork live a worker's life; return the pages that this took, b"" if it failed."""
    from .worker.warm_up import warm_up

    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(SCOUT_TIMEOUT_S)
            image.attach()
            warm_up(rounds=1)
            os.write(write_end, image.learn())
        except OSError as err:
            log.warning("launches will be slower: nothing learned: %s", err)
        finally:
            os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        learned = pipe.read()
    os.waitpid(pid, 0)
    return learned


def main() -> None:
    """Entry of ``python -m daemon.zygote --fd N``: how a running hosteld replaces a dead zygote."""
    parser = argparse.ArgumentParser(prog="daemon.zygote")
    parser.add_argument("--fd", type=int, required=True, help="SEQPACKET socket to hosteld")
    sock = socket.socket(fileno=parser.parse_args().fd)
    if sock.type & socket.SOCK_SEQPACKET != socket.SOCK_SEQPACKET:
        sys.exit("daemon.zygote: --fd is not a SOCK_SEQPACKET socket")
    _enter(sock)


if __name__ == "__main__":
    try:
        main()
    except ProtocolError as err:
        sys.exit(f"daemon.zygote: {err}")
