# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The configuration: defaults, files and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from daemon.supervisor.config import (
    ConfigError,
    check,
    default_dirs,
    listen_address,
    load,
    read_token,
)

DIRS = {"state_dir": "/s", "runtime_dir": "/r"}


def test_root_gets_the_directories_of_the_system() -> None:
    assert default_dirs(0, {"HOME": "/root"}) == ("/var/lib/hostel", "/run/hostel")


def test_a_user_gets_directories_of_their_own() -> None:
    environ = {"HOME": "/home/u", "XDG_RUNTIME_DIR": "/run/user/7"}
    assert default_dirs(7, environ) == ("/home/u/.local/state/hostel", "/run/user/7/hostel")


def test_a_user_without_runtime_directory_gets_one_below_tmp_with_their_uid() -> None:
    assert default_dirs(7, {"HOME": "/home/u"})[1] == "/tmp/hostel-7"


def test_a_relative_xdg_variable_is_ignored() -> None:
    environ = {"HOME": "/home/u", "XDG_STATE_HOME": "here", "XDG_RUNTIME_DIR": "there"}
    assert default_dirs(7, environ) == ("/home/u/.local/state/hostel", "/tmp/hostel-7")


def test_no_home_is_an_error_that_says_what_to_set() -> None:
    with pytest.raises(ConfigError, match="set HOME"):
        default_dirs(7, {})


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "hosteld.toml"
    path.write_text('log_level = "debug"\nevents_kept = 5000\n')
    config = load(str(path), {"log_level": "error", "socket": None}, uid=0, environ={})
    assert (config.log_level, config.events_kept) == ("error", 5000)
    assert config.socket_path == "/run/hostel/hostel.sock"


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown key 'log_levle'; did you mean 'log_level'"):
        check({**DIRS, "log_levle": "info"})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("events_kept", "many", "must be a int"),
        ("events_kept", True, "must be a int"),
        ("events_kept", 1, "must be 1000 to"),
        ("request_timeout_s", 0, "must be 0.1 to"),
        ("state_dir", "here", "must be an absolute path"),
        ("log_level", "loud", "must be one of"),
        ("socket_mode", "rw", "must be octal"),
        ("socket_mode", "0666", "must be within 0770"),
        ("listen", "127.0.0.1:80", "needs token_file"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check({**DIRS, key: value})


@pytest.mark.parametrize("listen", ["0.0.0.0:80", "192.0.2.1:80", "[::]:80"])
def test_tcp_beyond_loopback_is_refused_with_the_reason(listen: str) -> None:
    with pytest.raises(ConfigError, match="speaks no TLS"):
        listen_address(listen)


@pytest.mark.parametrize("listen", ["80", "127.0.0.1", "127.0.0.1:x", "127.0.0.1:65536", "host:1"])
def test_a_malformed_listen_address_is_refused(listen: str) -> None:
    with pytest.raises(ConfigError, match="must be"):
        listen_address(listen)


@pytest.mark.parametrize(
    ("listen", "address"),
    [
        ("127.0.0.1:80", ("127.0.0.1", 80)),
        ("localhost:0", ("127.0.0.1", 0)),
        ("[::1]:8080", ("::1", 8080)),
    ],
)
def test_a_loopback_address_is_taken(listen: str, address: tuple[str, int]) -> None:
    assert listen_address(listen) == address


def test_a_broken_file_is_an_error_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "hosteld.toml"
    path.write_text("log_level = \n")
    with pytest.raises(ConfigError, match="line 1"):
        load(str(path), {}, uid=0, environ={})


def test_a_missing_file_is_an_error_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: No such file"):
        load(str(tmp_path / "none.toml"), {}, uid=0, environ={})


def _token(tmp_path: Path, text: str, mode: int) -> str:
    path = tmp_path / "token"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_a_token_loses_its_line_end(tmp_path: Path) -> None:
    assert read_token(_token(tmp_path, "0123456789abcdef\n", 0o600)) == "0123456789abcdef"


def test_a_token_that_others_may_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="chmod 0600"):
        read_token(_token(tmp_path, "0123456789abcdef", 0o644))


def test_a_short_token_is_refused_without_telling_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds 6 characters") as caught:
        read_token(_token(tmp_path, "secret", 0o600))
    assert "secret" not in str(caught.value)


def test_a_loopback_address_that_the_api_would_refuse_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"must be 127\.0\.0\.1, ::1 or localhost"):
        listen_address("127.0.0.2:80")
