# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The directories: made private, checked, locked."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from daemon.supervisor import dirs
from daemon.supervisor.config import ConfigError


def test_directories_are_made_for_their_owner_alone(tmp_path: Path) -> None:
    layout = dirs.Layout(tmp_path / "a" / "state", tmp_path / "run")
    dirs.prepare(layout)
    private = [layout.state, layout.kernels, layout.images, layout.runtime / "vms"]
    assert [stat.S_IMODE(path.stat().st_mode) for path in private] == [0o700] * 4


def test_a_directory_that_others_may_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state").chmod(0o777)
    with pytest.raises(ConfigError, match="chmod go-w"):
        dirs.prepare(dirs.Layout(tmp_path / "state", tmp_path / "run"))


def test_a_link_in_place_of_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "run").symlink_to(tmp_path / "real")
    with pytest.raises(ConfigError, match="is not a directory"):
        dirs.prepare(dirs.Layout(tmp_path / "state", tmp_path / "run"))


def test_a_file_in_place_of_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    with pytest.raises(ConfigError, match="cannot be made"):
        dirs.prepare(dirs.Layout(tmp_path / "state", tmp_path / "run"))


def test_a_second_daemon_is_told_the_pid_of_the_first(tmp_path: Path) -> None:
    fd = dirs.lock(tmp_path)
    try:
        with pytest.raises(dirs.DirectoryInUse, match=f"pid {os.getpid()} runs on it already"):
            dirs.lock(tmp_path)
    finally:
        os.close(fd)


def test_the_lock_ends_with_its_descriptor(tmp_path: Path) -> None:
    os.close(dirs.lock(tmp_path))
    os.close(dirs.lock(tmp_path))


def test_the_systems_runtime_directory_can_be_entered_by_all_whatever_the_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = dirs.Layout(tmp_path / "state", tmp_path / "run")
    monkeypatch.setattr("daemon.supervisor.dirs._SYSTEM_UIDS", {os.geteuid()})
    mask = os.umask(0o077)
    try:
        dirs.prepare(layout)
    finally:
        os.umask(mask)
    assert layout.runtime.stat().st_mode & 0o777 == 0o755
    assert (layout.runtime / "vms").stat().st_mode & 0o777 == 0o700
    assert layout.state.stat().st_mode & 0o777 == 0o700


def test_an_empty_note_of_the_state_directory_is_none(tmp_path: Path) -> None:
    layout = dirs.Layout(tmp_path / "state", tmp_path / "run")
    dirs.prepare(layout)
    (layout.runtime / "vms" / "some-vm").mkdir()
    (layout.runtime / "state_dir").write_text("")
    dirs.claim_runtime(layout)
    assert (layout.runtime / "state_dir").read_text() == str(layout.state)
