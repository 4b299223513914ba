# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""hosteld's configuration: defaults, one TOML file over them, the command line over both.

Imports little on purpose: the zygote is forked from a process that has loaded this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

LOG_LEVELS: Final = ("debug", "info", "warning", "error")
# Shorter ones could be guessed over the loopback interface.
MIN_TOKEN_CHARS: Final = 16


class ConfigError(Exception):
    """The configuration cannot be used; the text names the key, the value and what is allowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What the operator can set; docs/operations.md describes every key.

    Attributes:
        state_dir: database, kernels, images, disks and console logs; survives a reboot.
        runtime_dir: sockets of hosteld and of the workers; belongs to one boot.
        socket: path of the API's Unix socket, empty for ``<runtime_dir>/hostel.sock``.
        socket_mode: octal permission bits of that socket.
        socket_group: group that owns the socket, empty for hosteld's own.
        listen: loopback ``address:port`` for TCP, empty for none; needs token_file.
        token_file: file with the bearer token for TCP.
        log_level: debug, info, warning or error.
        kvm_device: the KVM device node.
        launch_timeout_s: how long a worker may take to build its machine.
        request_timeout_s: how long a worker may take to answer anything else.
        sync_timeout_s: how long a disk's file may take to become durable when it is swapped.
        stop_grace_s: how long a stopping hosteld waits for running requests.
        events_kept: how many events stay in the database.
        operations_kept: how many ended operations stay in the database.
        idempotency_hours: how long a reply stays under its Idempotency-Key.
    """

    state_dir: str
    runtime_dir: str
    socket: str = ""
    socket_mode: str = "0660"
    socket_group: str = ""
    listen: str = ""
    token_file: str = ""
    log_level: str = "info"
    kvm_device: str = "/dev/kvm"
    launch_timeout_s: float = 60.0
    request_timeout_s: float = 10.0
    sync_timeout_s: float = 30.0
    stop_grace_s: float = 10.0
    events_kept: int = 100_000
    operations_kept: int = 1_000
    idempotency_hours: float = 24.0

    @property
    def socket_path(self) -> str:
        """Path of the API's Unix socket."""
        return self.socket or f"{self.runtime_dir}/hostel.sock"


_RANGES: Final[dict[str, tuple[float, float]]] = {
    "launch_timeout_s": (1, 3600),
    "request_timeout_s": (0.1, 600),
    "sync_timeout_s": (0.1, 3600),
    "stop_grace_s": (0, 600),
    "events_kept": (1_000, 100_000_000),
    "operations_kept": (10, 1_000_000),
    "idempotency_hours": (0.01, 24 * 30),
}
_ABSOLUTE_PATHS: Final = ("state_dir", "runtime_dir", "socket", "token_file", "kvm_device")


def default_dirs(uid: int, environ: Mapping[str, str]) -> tuple[str, str]:
    """Return (state_dir, runtime_dir) for a user: the system's for root, the user's own otherwise.

    Args:
        uid: effective user id.
        environ: looked up for HOME and the XDG variables; a relative value is ignored, as the XDG
            base directory specification asks.
    """
    if uid == 0:
        return "/var/lib/hostel", "/run/hostel"
    home = environ.get("HOME", "")
    state_home = environ.get("XDG_STATE_HOME", "")
    if not state_home.startswith("/"):
        if not home.startswith("/"):
            raise ConfigError("no state directory: set HOME, or state_dir in the configuration")
        state_home = f"{home}/.local/state"
    runtime_home = environ.get("XDG_RUNTIME_DIR", "")
    runtime = f"{runtime_home}/hostel" if runtime_home.startswith("/") else f"/tmp/hostel-{uid}"  # noqa: S108 - made 0700 and its owner is checked, dirs.py
    return f"{state_home}/hostel", runtime


def load(
    path: str | None, overrides: Mapping[str, Any], *, uid: int, environ: Mapping[str, str]
) -> Config:
    """Build the configuration.

    Args:
        path: a TOML file, or None.
        overrides: keys from the command line; a None value is no override.
        uid: effective user id, for the default directories.
        environ: the environment, for the default directories.

    Raises:
        ConfigError: the file cannot be read or parsed, a key is unknown, a value has the wrong
            type or is out of range.
    """
    values = read_toml(path) if path is not None else {}
    values.update({key: value for key, value in overrides.items() if value is not None})
    if "state_dir" not in values or "runtime_dir" not in values:
        state_dir, runtime_dir = default_dirs(uid, environ)
        values.setdefault("state_dir", state_dir)
        values.setdefault("runtime_dir", runtime_dir)
    return check(values)


def read_toml(path: str) -> dict[str, Any]:
    """Parse a TOML file.

    Raises:
        ConfigError: as in load().
    """
    import tomllib

    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as err:
        raise ConfigError(f"{path}: {err.strerror}") from err
    except tomllib.TOMLDecodeError as err:
        raise ConfigError(f"{path}: {err}") from err


def check(values: Mapping[str, Any]) -> Config:
    """Turn keys and values into a Config.

    Raises:
        ConfigError: as in load().
    """
    known = {field.name: field.type for field in fields(Config)}
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(_unknown_key(key, sorted(known)))
        checked[key] = _typed(key, value, str(known[key]))
    for key, (low, high) in _RANGES.items():
        if key in checked and not low <= checked[key] <= high:
            raise ConfigError(f"{key} = {checked[key]}: must be {low:g} to {high:g}")
    for key in _ABSOLUTE_PATHS:
        if checked.get(key) and not checked[key].startswith("/"):
            raise ConfigError(f"{key} = {checked[key]!r}: must be an absolute path")
    config = Config(**checked)
    if config.log_level not in LOG_LEVELS:
        raise ConfigError(f"log_level = {config.log_level!r}: must be one of {LOG_LEVELS}")
    socket_mode(config)
    if config.listen:
        listen_address(config.listen)
        if not config.token_file:
            raise ConfigError(f"listen = {config.listen!r} needs token_file: TCP has no peer user")
    return config


def _typed(key: str, value: object, kind: str) -> object:
    wanted: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float)}
    if isinstance(value, bool) or not isinstance(value, wanted[kind]):
        raise ConfigError(f"{key} = {value!r}: must be a {kind}")
    return float(value) if kind == "float" and isinstance(value, int) else value


def _unknown_key(key: str, known: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
    return f"unknown key {key!r}{hint}"


def socket_mode(config: Config) -> int:
    """Return the permission bits of the API's Unix socket.

    Raises:
        ConfigError: not an octal number, or open to everyone.
    """
    try:
        mode = int(config.socket_mode, 8)
    except ValueError as err:
        raise ConfigError(f"socket_mode = {config.socket_mode!r}: must be octal") from err
    if mode & ~0o770:
        raise ConfigError(
            f"socket_mode = {config.socket_mode!r}: must be within 0770, since whoever may connect"
            " controls every VM; use socket_group to let people in"
        )
    return mode


def listen_address(listen: str) -> tuple[str, int]:
    """Split ``address:port`` and hold it to the loopback interface.

    Raises:
        ConfigError: malformed, or not a loopback address.
    """
    import ipaddress

    host, colon, port_text = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    host = "127.0.0.1" if host == "localhost" else host
    try:
        address = ipaddress.ip_address(host)
        port = int(port_text)
    except ValueError as err:
        raise ConfigError(
            f"listen = {listen!r}: must be ADDRESS:PORT such as 127.0.0.1:8080"
        ) from err
    if not colon or not 0 <= port <= 65535:
        raise ConfigError(f"listen = {listen!r}: the port must be 0 to 65535")
    if address.is_loopback and str(address) not in ("127.0.0.1", "::1"):
        raise ConfigError(
            f"listen = {listen!r}: must be 127.0.0.1, ::1 or localhost; the API refuses requests"
            " for any other host, as a defence against DNS rebinding"
        )
    if not address.is_loopback:
        raise ConfigError(
            f"listen = {listen!r}: must be a loopback address, since this version speaks no TLS and"
            " a token in clear text must not leave the host; forward the port by ssh instead"
        )
    return host, port


def read_token(path: str) -> str:
    """Read the bearer token for TCP.

    Raises:
        ConfigError: unreadable, readable by others, or too short.
    """
    import os
    import stat

    try:
        with open(path, encoding="ascii") as file:
            mode = os.fstat(file.fileno()).st_mode
            token = file.read(4096).strip()
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"token_file {path}: {err}") from err
    if mode & stat.S_IRWXO:
        raise ConfigError(
            f"token_file {path}: mode {stat.S_IMODE(mode):04o} lets every user of the host at it;"
            " run chmod 0600 on it"
        )
    if len(token) < MIN_TOKEN_CHARS:
        raise ConfigError(
            f"token_file {path}: holds {len(token)} characters, needs {MIN_TOKEN_CHARS} or more;"
            " make one with: openssl rand -hex 32"
        )
    return token
