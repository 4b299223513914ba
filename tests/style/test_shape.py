# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""How large a file or a function may be, how each file starts, and what may not be in it."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
PRODUCT = ("kvm_ffi", "devices", "api", "daemon", "lab", "guest", "bench")
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
# What must not be interpreted, engines included; it shall stay small enough to be read.
MAX_C_LINES = 8000


def tracked(*suffixes: str) -> list[Path]:
    """Return the files of the product that git tracks or would track."""
    run = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    names = [name for name in run.stdout.split() if name.endswith(suffixes)]
    return [ROOT / name for name in names if (ROOT / name).exists()]


def product(*suffixes: str) -> list[Path]:
    """Return the product's own files, tests left out."""
    return [path for path in tracked(*suffixes) if path.relative_to(ROOT).parts[0] in PRODUCT]


def test_files_are_short() -> None:
    long = [
        f"{path.relative_to(ROOT)}: {lines} lines"
        for path in product(".py", ".c", ".h")
        if (lines := len(path.read_text().splitlines())) > MAX_FILE_LINES
    ]
    assert not long, "\n".join(long)


def test_functions_are_short() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {length} lines"
        for path in product(".py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if (length := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert not long, "\n".join(long)


def test_c_core_stays_small() -> None:
    core = (path for path in product(".c", ".h") if path.relative_to(ROOT).parts[0] == "kvm_ffi")
    lines = sum(len(path.read_text().splitlines()) for path in core)
    assert lines <= MAX_C_LINES


def test_every_source_file_names_its_licence() -> None:
    bad = [
        str(path.relative_to(ROOT))
        for path in tracked(".py", ".c", ".h", ".sh")
        if "SPDX-License-Identifier: Apache-2.0" not in path.read_text()[:300]
    ]
    assert not bad, "\n".join(bad)


def test_no_left_over_markers() -> None:
    marker = re.compile(r"\b(TODO|FIX" + r"ME|XXX)\b")
    bad = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in product(".py", ".c", ".h")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if marker.search(line)
    ]
    assert not bad, "\n".join(bad)


def test_guest_facing_c_says_so() -> None:
    """A function that takes guest input opens with a comment that names it: DESIGN section 3."""
    for name in (
        "virtqueue.c",
        "blk_engine.c",
        "blk_request.c",
        "net_engine.c",
        "uart16550.c",
        "vcpu_loop.c",
        "vsock_rx.c",
        "vsock_tx.c",
    ):
        source = (ROOT / "kvm_ffi" / "csrc" / name).read_text()
        assert "/* Guest-controlled:" in source, name
