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
import select
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
        self._warm_up = warm_up
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
        if self._facts is None:
            return
        try:
            self._learned = self._send_scout(self._image)
        except OSError as err:
            log.warning("launches will be slower: no scout: %s", err)

    def _send_scout(self, image: HeapImage) -> bytes:
        """Have a fork live a worker's life; return the pages that this took, b"" if it failed.

        Raises:
            OSError: no pipe, or no process, to be had.
        """
        read_end, write_end = os.pipe()
        with open(read_end, "rb") as pipe:
            try:
                pid = os.fork()
                if pid == 0:
                    self._be_scout(image, write_end)
            finally:
                os.close(write_end)
            if not select.select([pipe], [], [], SCOUT_TIMEOUT_S)[0]:
                log.warning("launches will be slower: the scout hangs, killed")
                os.kill(pid, signal.SIGKILL)
            learned = pipe.read()
        os.waitpid(pid, 0)
        return learned

    def _be_scout(self, image: HeapImage, write_end: int) -> None:
        try:
            self._leave()
            image.attach()
            if self._warm_up(rounds=1) is not None:
                os.write(write_end, image.learn())
        except Exception:
            # The border of the process: nothing depends on what it finds out.
            log.exception("launches will be slower: the scout failed")
        finally:
            os._exit(0)

    def _leave(self) -> None:
        """In a fork: drop what is the zygote's."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for end in (self._sock, self._wake_read, self._wake_write):
            end.close()

    def _serve(self, selector: selectors.BaseSelector) -> bool:
        """Wait for one round of events; False when hosteld has gone."""
        events = selector.select(0 if self._wants_spare else None)
        if not events:
            # Not again by itself if this fails: the next request tries.
            self._wants_spare = False
            try:
                self._spare = self._spare or self._fork(selector)
            except OSError as err:
                log.warning("no worker ahead: %s", err)
        for key, _ in events:
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

    def _fork(self, selector: selectors.BaseSelector, not_its: tuple[int, ...] = ()) -> _Spare:
        """Make a worker that waits for its VM; it closes the descriptors ``not_its``.

        Raises:
            OSError: no socket pair, or no process, to be had.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                pid = os.fork()
            except OSError:
                ours.close()
                raise
            if pid == 0:
                ours.close()
                protocol.close_all(not_its)
                self._become_worker(theirs, selector)
        return _Spare(pid, ours)

    def _answer(self, message: protocol.Message, selector: selectors.BaseSelector) -> None:
        request_id = message.body.get("id")
        if message.body.get("op") != "fork" or len(message.fds) != WORKER_FDS:
            self._refuse(request_id, "bad_request", "the zygote knows only fork, with four fds")
            return
        vm_id = str(message.body.get("args", {}).get("vm", ""))
        self._reap()  # a spare that has just died is none
        spare, self._spare = self._spare, None
        self._wants_spare = True
        try:
            if spare is None or not _hand_over(spare, vm_id, message.fds):
                spare = self._fork(selector, message.fds)
                if not _hand_over(spare, vm_id, message.fds):
                    raise BrokenPipeError("a new worker ended at once")
            # Safe against pid reuse: this process is the parent and has not reaped it yet.
            pidfd = os.pidfd_open(spare.pid)
        except OSError as err:
            if spare is not None:
                os.kill(spare.pid, signal.SIGKILL)  # nobody could watch it
            self._refuse(request_id, "fork_failed", f"fork: {err}")
            return
        self._send({"id": request_id, "ok": {"pid": spare.pid}}, (pidfd,))
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
            selector.close()
            self._leave()
            message = protocol.receive(sock)
            sock.close()
            if message is None:
                status = 0  # the zygote has gone, and this worker was never needed
            else:
                vm_id = str(message.body["vm"])
                status = self._worker.run(vm_id, message.fds, self._facts, image)
        except Exception:
            # The border of the process: the traceback goes to the worker's own log.
            logging.getLogger("daemon.worker").exception("worker failed")
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


def _hand_over(spare: _Spare, vm_id: str, fds: tuple[int, ...]) -> bool:
    """Give a waiting worker its VM; False if it has ended."""
    with spare.sock:
        try:
            protocol.send(spare.sock, {"vm": vm_id}, fds)
        except (BrokenPipeError, ConnectionResetError):
            return False
    return True


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
