# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Runs the external programs that the lab and the guest artifacts are built with."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from lab.errors import LabError

# Program -> the Debian package that brings it.
PACKAGES: Final = {
    "apt-cache": "apt",
    "apt-get": "apt",
    "busybox": "busybox-static",
    "depmod": "kmod",
    "dpkg-deb": "dpkg",
    "gcc": "gcc",
    "mke2fs": "e2fsprogs",
    "mksquashfs": "squashfs-tools",
    "modprobe": "kmod",
    "qemu-system-x86_64": "qemu-system-x86",
}

# Debian keeps mke2fs, depmod and modprobe where a plain user's PATH doesn't look.
SEARCH_PATH: Final = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))


def need(*programs: str) -> None:
    """Check that every program is installed.

    Raises:
        LabError: naming all missing Debian packages and the command that installs them.
    """
    missing = sorted({PACKAGES[p] for p in programs if shutil.which(p, path=SEARCH_PATH) is None})
    if missing:
        raise LabError(
            f"missing Debian package {', '.join(missing)}: apt-get install {' '.join(missing)}"
        )


def find(program: str) -> str:
    """Return the absolute path of an installed program."""
    need(program)
    path = shutil.which(program, path=SEARCH_PATH)
    assert path is not None
    return path


def static_busybox() -> Path:
    """Return a busybox that runs without any shared library."""
    path = Path(find("busybox")).resolve()
    # A dynamic executable names its loader in the first page.
    if b"/ld-linux" in path.read_bytes()[:4096]:
        raise LabError(
            f"{path} is dynamically linked; a static one is needed: apt-get install busybox-static"
        )
    return path


def run(
    argv: Sequence[str | Path], *, what: str, timeout_s: float = 600, cwd: Path | None = None
) -> str:
    """Run a program to its end and return its standard output.

    Args:
        argv: Program and arguments; the program is looked up like `need` does.
        what: What it is for, as the start of the error message.
        timeout_s: Seconds after which it is killed.
        cwd: Its working directory.

    Raises:
        LabError: it is missing, failed or ran too long; holds the tail of its stderr.
    """
    program, *args = (str(a) for a in argv)
    try:
        done = subprocess.run(
            [find(program), *args],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            cwd=cwd,
            env=os.environ | {"LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired as err:
        raise LabError(f"{what}: {program} ran longer than {timeout_s:g} s") from err
    if done.returncode != 0:
        tail = " | ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise LabError(f"{what}: {program} failed ({done.returncode}): {tail}")
    return done.stdout
