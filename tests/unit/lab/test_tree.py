# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
import os
from pathlib import Path

from lab.session import start_ticks
from lab.tree import Entry, difference, scan, stamp


def test_scan_lists_files_below_and_leaves_out_what_is_to_be_skipped(tmp_path: Path) -> None:
    (tmp_path / "pkg/__pycache__").mkdir(parents=True)
    (tmp_path / "pkg/a.py").write_text("a")
    (tmp_path / "pkg/__pycache__/a.pyc").write_text("b")

    assert list(scan(tmp_path, {"__pycache__"})) == ["pkg/a.py"]


def test_scan_does_not_follow_symlinks(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path)
    assert list(scan(tmp_path, ())) == ["loop"]


def test_scan_of_nothing_is_empty(tmp_path: Path) -> None:
    assert scan(tmp_path / "gone", ()) == {}


def test_stamp_changes_with_time_size_and_name() -> None:
    base = stamp({"a": Entry(1, 2, 3)})

    others = {
        stamp({"a": Entry(9, 2, 3)}),
        stamp({"a": Entry(1, 9, 3)}),
        stamp({"b": Entry(1, 2, 3)}),
        stamp({}),
    }

    assert len(others - {base}) == 4


def test_difference_tells_changed_from_gone() -> None:
    old = {"same": Entry(1, 1, 1), "edited": Entry(1, 1, 1), "gone": Entry(1, 1, 1)}
    new = {"same": Entry(1, 1, 1), "edited": Entry(2, 1, 1), "added": Entry(1, 1, 1)}

    assert difference(old, new) == (["edited", "added"], ["gone"])


def test_start_ticks_tell_this_process_from_none() -> None:
    assert start_ticks(os.getpid()) is not None
    assert start_ticks(2**22 + 1) is None
