# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The zygote: a small, warm, single-threaded process that forks one worker per VM.

It has imported all that a worker needs and nothing else, so a fork costs about 2 ms and shares its
pages. hosteld starts it before it imports anything large; when hosteld dies the zygote ends, and
the workers live on.
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
from typing import Any

from . import protocol
from .errors import ProtocolError

log = logging.getLogger(__name__)

WORKER_FDS = 4  # listener, console, log, last_words: the order of protocol.py


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


class Zygote:
    """Serves fork requests until hosteld's end of the socket closes."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._wake_read, self._wake_write = socket.socketpair()

    def run(self) -> None:
        """Import the worker, freeze the heap, then serve."""
        from kvm_ffi.heap_image import HeapImage
        from kvm_ffi.host_process import keep_heap_small

        from .worker import main as worker_main
        from .worker.warm_up import warm_up

        self._worker_main = worker_main.run
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
        try:
            self._image: HeapImage | None = HeapImage()
        except OSError as err:
            log.warning("workers will use more memory: no heap image: %s", err)
            self._image = None
        with selectors.DefaultSelector() as selector:
            selector.register(self._sock, selectors.EVENT_READ)
            selector.register(self._wake_read, selectors.EVENT_READ)
            self._send({"notice": "hello", "data": {}})
            while self._serve(selector):
                pass

    def _serve(self, selector: selectors.BaseSelector) -> bool:
        """Wait for one round of events; False when hosteld has gone."""
        for key, _ in selector.select():
            if key.fileobj is self._wake_read:
                self._wake_read.recv(4096)
                self._reap()
                continue
            try:
                message = protocol.receive(self._sock)
            except ConnectionResetError:
                return False  # hosteld died with an answer of ours unread
            if message is None:
                return False
            try:
                self._answer(message, selector)
            finally:
                protocol.close_all(message.fds)
        return True

    def _answer(self, message: protocol.Message, selector: selectors.BaseSelector) -> None:
        request_id = message.body.get("id")
        if message.body.get("op") != "fork" or len(message.fds) != WORKER_FDS:
            self._refuse(request_id, "bad_request", "the zygote knows only fork, with four fds")
            return
        try:
            pid = os.fork()
        except OSError as err:
            self._refuse(request_id, "fork_failed", f"fork: {err.strerror}")
            return
        if pid == 0:
            args = message.body.get("args", {})
            self._become_worker(str(args.get("vm", "")), message.fds, selector)
        try:
            # Safe against pid reuse: this process is the parent and has not reaped it yet.
            pidfd = os.pidfd_open(pid)
        except OSError as err:
            os.kill(pid, signal.SIGKILL)  # nobody could watch it
            self._refuse(request_id, "fork_failed", f"pidfd_open: {err.strerror}")
            return
        self._send({"id": request_id, "ok": {"pid": pid}}, (pidfd,))
        os.close(pidfd)

    def _refuse(self, request_id: object, code: str, message: str) -> None:
        self._send({"id": request_id, "error": {"code": code, "message": message}})

    def _send(self, body: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        try:
            protocol.send(self._sock, body, fds)
        except OSError as err:
            # hosteld has gone: the next receive says so, and the zygote ends.
            log.info("message to hosteld lost: %s", err)

    def _become_worker(
        self, vm_id: str, fds: tuple[int, ...], selector: selectors.BaseSelector
    ) -> None:
        """Drop all that is the zygote's, run the worker, and leave by os._exit."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            selector.close()
            for sock in (self._sock, self._wake_read, self._wake_write):
                sock.close()
            status = self._worker_main(vm_id, fds, self._facts, self._image)
        except Exception:
            # The border of the process: the traceback goes to the worker's own log.
            logging.getLogger("daemon.worker").exception("worker failed vm=%s", vm_id)
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
            self._send({"notice": "exited", "data": {"pid": pid, "status": status}})


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
