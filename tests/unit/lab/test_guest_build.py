# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
import json
import os
import pty
import subprocess
from pathlib import Path

import pytest

from guest import build
from lab.errors import LabError


def make_artifacts(out: Path) -> None:
    for name in build.FILES:
        (out / name).write_bytes(b"12345")
    files = {name: {"size_bytes": 5, "sha256": ""} for name in build.FILES}
    (out / "manifest.json").write_text(json.dumps({"stamp": "s", "files": files}))


def test_complete_artifacts_are_recognised(tmp_path: Path) -> None:
    make_artifacts(tmp_path)

    manifest = build.read_manifest(tmp_path)

    assert manifest is not None
    assert manifest["stamp"] == "s"


def test_a_file_cut_short_makes_them_stale(tmp_path: Path) -> None:
    make_artifacts(tmp_path)
    (tmp_path / "vmlinuz").write_bytes(b"123")

    manifest = build.read_manifest(tmp_path)

    assert manifest is not None
    assert manifest["stamp"] == ""


def test_a_missing_file_makes_them_stale(tmp_path: Path) -> None:
    make_artifacts(tmp_path)
    (tmp_path / "disk.raw").unlink()

    manifest = build.read_manifest(tmp_path)

    assert manifest is not None
    assert manifest["stamp"] == ""


def test_what_a_version_with_fewer_files_made_is_stale(tmp_path: Path) -> None:
    make_artifacts(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["files"][build.FILES[-1]]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))

    stale = build.read_manifest(tmp_path)

    assert stale is not None
    assert stale["stamp"] == ""


def test_a_directory_without_manifest_is_not_ours(tmp_path: Path) -> None:
    assert build.read_manifest(tmp_path) is None


def test_a_manifest_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")

    with pytest.raises(LabError, match="not readable"):
        build.read_manifest(tmp_path)


def test_a_login_on_a_console_without_a_size_gives_it_one_and_prints_nothing() -> None:
    profile = Path(build.__file__).with_name("root") / "etc" / "profile"
    script = 'stty() { /bin/busybox stty "$@"; }; . "$0"; stty size'
    ours, theirs = pty.openpty()  # 0 rows, 0 columns
    done = subprocess.run(
        ["/bin/busybox", "sh", "-c", script, str(profile)],
        stdin=theirs,
        capture_output=True,
        text=True,
        check=True,
    )
    os.close(ours)
    os.close(theirs)
    assert (done.stdout, done.stderr) == ("24 80\n", "")
