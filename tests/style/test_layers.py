# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Who may import whom: DESIGN section 10, and what a worker must never load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT: dict[str, set[str]] = {
    "kvm_ffi": set(),
    "devices": {"kvm_ffi"},
    "api": set(),
    "daemon": {"api", "devices", "kvm_ffi"},
}
# A worker holds none of these: they are hosteld's, and each would cost every VM some MiB.
NEVER_IN_A_WORKER = {
    "api", "fastapi", "starlette", "uvicorn", "pydantic", "sqlite3", "pyroute2", "asyncio",
    "httpx", "typer", "rich", "prometheus_client", "zstandard", "lz4", "lzma", "ctypes",
    "daemon.supervisor", "daemon.images.importer",
}  # fmt: skip


def imported_folders(path: Path) -> set[str]:
    """Return the top-level names that a file imports absolutely."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT))
def test_folder_imports_only_downwards(folder: str) -> None:
    forbidden = set(MAY_IMPORT) - MAY_IMPORT[folder] - {folder}
    bad = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name in sorted(imported_folders(path) & forbidden)
    ]
    assert not bad, "\n".join(bad)


def test_only_kvm_ffi_touches_the_c_module() -> None:
    bad = [
        str(path.relative_to(ROOT))
        for folder in ("devices", "api", "daemon")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if "kvm_ffi._kvm" in path.read_text()
    ]
    assert not bad, "\n".join(bad)


def test_worker_loads_nothing_of_hosteld() -> None:
    code = "import sys, daemon.zygote, daemon.worker.process; print('\\n'.join(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    loaded = set(run.stdout.split())
    assert not loaded & NEVER_IN_A_WORKER
