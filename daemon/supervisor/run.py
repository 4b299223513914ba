# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""hosteld from the forked zygote to the last reply: sockets, reconciling, serving, stopping."""

from __future__ import annotations

import asyncio
import gc
import grp
import importlib
import logging
import os
import signal
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import uvloop

from api.app import create_app
from api.problem import request_id
from api.server import serve as serve_http
from api.version import hostel_version

from ..errors import WorkerError
from ..images.errors import StorageError
from ..zygote import ZygoteHandle
from . import log as logs
from . import sdnotify
from .config import Config, ConfigError, listen_address, socket_mode
from .dirs import Layout
from .service import Supervisor
from .store import StoreError, StoreFull
from .tasks import Tasks
from .zygotes import ZygoteClient

log = logging.getLogger(__name__)

BACKLOG: Final = 1024
# sockaddr_un.sun_path with its terminating NUL: unix(7).
MAX_SOCKET_PATH: Final = 107
# What hosteld cannot run without, or cannot run with: told in one line.
_FATAL: Final = (
    ConfigError,
    StoreError,
    StoreFull,
    StorageError,
    WorkerError,
    OSError,
    sqlite3.Error,
)


@dataclass(frozen=True, slots=True)
class Served:
    """How a run of hosteld ended."""

    is_clean: bool


def serve(
    config: Config,
    layout: Layout,
    handle: ZygoteHandle,
    token: str | None,
    inherited: tuple[int, ...],
) -> Served:
    """Run until SIGTERM or SIGINT.

    Args:
        config: the configuration.
        layout: its directories, made and locked.
        handle: the zygote, just forked.
        token: the bearer token of TCP, None without TCP.
        inherited: listening sockets from systemd; owned from here on.
    """
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(config, layout, handle, token, inherited))
    except _FATAL as err:
        log.critical("hosteld cannot run: %s", err)
        return Served(is_clean=False)
    return Served(is_clean=True)


async def _serve(
    config: Config,
    layout: Layout,
    handle: ZygoteHandle,
    token: str | None,
    inherited: tuple[int, ...],
) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    tasks = Tasks()
    zygote = ZygoteClient(handle.sock, handle.pid, tasks)
    logs.tell("request", request_id)
    # Now, and not with the first request: it brings the KVM binding along.
    importlib.import_module("daemon.worker.boot")
    with _sockets(config, inherited) as (unix_socket, tcp_socket):
        supervisor = Supervisor(config, layout, zygote, tasks, hostel_version())
        try:
            sdnotify.notify("STATUS=looking for workers")
            report = await supervisor.start()
            await zygote.wait_hello()
            app = create_app(supervisor, token=token, version=hostel_version())
            # What is here stays: the collector need not look at it again.
            gc.collect()
            gc.freeze()
            log.info(
                "hosteld ready pid=%d socket=%s adopted=%d ended=%d silent=%d leftovers=%d",
                os.getpid(),
                config.socket_path,
                len(report.adopted),
                len(report.ended),
                len(report.silent),
                len(report.leftovers),
            )
            sdnotify.notify(f"READY=1\nSTATUS=serving, {len(report.adopted)} workers adopted")
            tasks.spawn(_feed_watchdog(), "watchdog")
            await serve_http(app, socket=unix_socket, tcp_socket=tcp_socket, stop=stop)
        finally:
            sdnotify.notify("STOPPING=1\nSTATUS=stopping, guests run on")
            log.info("hosteld stopping, guests run on")
            await supervisor.stop()


async def _feed_watchdog() -> None:
    interval_s = sdnotify.watchdog_interval_s()
    while interval_s is not None:
        sdnotify.notify("WATCHDOG=1")
        await asyncio.sleep(interval_s)


@contextmanager
def _sockets(
    config: Config, inherited: tuple[int, ...]
) -> Iterator[tuple[socket.socket, socket.socket | None]]:
    """Yield the API's sockets; the Unix socket's file goes with us, unless systemd owns it."""
    taken = [socket.socket(fileno=fd) for fd in inherited]
    unix = next((sock for sock in taken if sock.family == socket.AF_UNIX), None)
    is_ours = unix is None
    unix = unix or bind_unix(config)
    tcp = None
    try:
        tcp = bind_tcp(config.listen) if config.listen else None
        yield unix, tcp
    finally:
        for sock in (unix, tcp):
            if sock is not None:
                sock.close()
        if is_ours:
            Path(config.socket_path).unlink(missing_ok=True)


def bind_unix(config: Config) -> socket.socket:
    """Bind and listen on the API's Unix socket.

    Raises:
        ConfigError: someone listens there, the path is too long, or the group is unknown.
        OSError: as bind(2).
    """
    path = config.socket_path
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise ConfigError(
            f"socket {path}: {len(os.fsencode(path))} bytes, a socket's path has at most"
            f" {MAX_SOCKET_PATH}; choose a shorter one with --socket"
        )
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        # Nobody may connect before the mode and the group are what they are to be.
        mask = os.umask(0o777)
        try:
            sock.bind(path)
        finally:
            os.umask(mask)
        if config.socket_group:
            os.chown(path, -1, _group_id(config.socket_group))
        Path(path).chmod(socket_mode(config))
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _remove_stale(path: str) -> None:
    """Remove the socket file of a hosteld that was killed.

    Raises:
        ConfigError: somebody listens on it, or it is no socket.
    """
    if not os.path.lexists(path):
        return
    if not Path(path).is_socket():
        raise ConfigError(f"socket {path}: is there and is no socket; remove it, or choose another")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.connect(path)
        except OSError:
            Path(path).unlink(missing_ok=True)
            return
    raise ConfigError(f"socket {path}: another program listens on it")


def _group_id(name: str) -> int:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError as err:
        raise ConfigError(f"socket_group = {name!r}: no such group") from err


def bind_tcp(listen: str) -> socket.socket:
    """Bind and listen on a loopback address.

    Raises:
        ConfigError: not a loopback address, or it is taken.
    """
    host, port = listen_address(listen)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(BACKLOG)
    except OSError as err:
        sock.close()
        raise ConfigError(f"listen = {listen!r}: {err.strerror}") from err
    log.info("listening on tcp address=%s port=%d", host, sock.getsockname()[1])
    return sock
