# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from lab import cli
from lab.layout import Layout, default_cache, path_key, venv_base
from lab.qemu import Forward

LAYOUT = Layout(
    checkout=Path("/src/hostel"),
    venv=Path("/src/hostel/.venv"),
    interpreter=Path("/usr/bin/python3.11"),
    stdlib=Path("/usr/lib/python3.11"),
    cache=Path("/cache"),
)


def test_base_python_is_read_from_pyvenv_cfg() -> None:
    text = "home = /usr/bin\ninclude-system-site-packages = false\nversion = 3.11.7\n"
    assert venv_base(text) == (Path("/usr/bin"), "3.11")


def test_pyvenv_cfg_of_other_makers_names_its_version_differently() -> None:
    assert venv_base("home = /opt/bin\nversion_info = 3.13.1.final.0\n") == (
        Path("/opt/bin"),
        "3.13",
    )


def test_pyvenv_cfg_without_a_home_tells_nothing() -> None:
    assert venv_base("version = 3.11.7\n") is None


def test_two_checkouts_have_two_run_directories() -> None:
    assert path_key(Path("/a")) != path_key(Path("/b"))
    assert LAYOUT.run_dir.parent == Path("/cache/run")


def test_cache_directory_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_CACHE", "/elsewhere")
    assert default_cache() == Path("/elsewhere")


@pytest.mark.parametrize("text", ["8080:80", "127.0.0.1:8080:80"])
def test_forward_is_read_with_or_without_the_loopback_address(text: str) -> None:
    assert cli.forward(text) == Forward(8080, 80)


@pytest.mark.parametrize("text", ["80", "0.0.0.0:80:80", "a:b", "0:80", "80:1", "80:65536", ""])
def test_any_other_forward_is_refused(text: str) -> None:
    with pytest.raises(ArgumentTypeError):
        cli.forward(text)


def test_commands_find_the_venv_first_and_no_secrets() -> None:
    ours = {"PATH": "/bin", "HOME": "/h", "API_KEY": "secret", "HOSTEL_X": "1"}

    env = cli.environment(LAYOUT, ours)

    assert env["PATH"].startswith("/src/hostel/.venv/bin:/bin:")
    assert env["LAB"] == "1"
    assert env["HOSTEL_X"] == "1"
    assert "API_KEY" not in env


@pytest.mark.parametrize(
    "arguments",
    [["run"], ["exec", "--"], ["status", "--", "true"], ["run", "-m", "1", "--", "true"]],
)
def test_wrong_command_lines_are_failures_of_the_lab(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LAB_CACHE", str(tmp_path))
    monkeypatch.setattr("signal.signal", lambda *_: None)

    assert cli.main(arguments) == 125


def test_unknown_options_are_failures_of_the_lab() -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["run", "--bogus", "--", "true"])
    assert caught.value.code == 125
