# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Where everything lies on this machine: checkout, virtual environment, interpreter, caches."""

import hashlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Layout:
    """All paths absolute and without symlinks, as the lab sees them at the same place."""

    checkout: Path
    venv: Path | None  # None before it is made
    interpreter: Path  # what runs the lab's agent: the base Python of the venv, or our own
    stdlib: Path  # that interpreter's lib/pythonX.Y
    cache: Path

    @property
    def run_dir(self) -> Path:
        """Directory of this checkout's lab; two checkouts have two labs."""
        return self.cache / "run" / f"{self.checkout.name}-{path_key(self.checkout)}"


def path_key(path: Path) -> str:
    """Return a short name for a path, for use in file names."""
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:8]


def default_cache() -> Path:
    """Return LAB_CACHE, or hostel-lab in the user's cache directory."""
    chosen = os.environ.get("LAB_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(chosen).resolve() if chosen else base.resolve() / "hostel-lab"


def venv_base(config: str) -> tuple[Path, str] | None:
    """Read (bin directory of the base Python, X.Y) from the text of a pyvenv.cfg."""
    values = {
        key.strip(): value.strip()
        for key, separator, value in (line.partition("=") for line in config.splitlines())
        if separator
    }
    version = values.get("version") or values.get("version_info")
    if "home" not in values or version is None:
        return None
    return Path(values["home"]), ".".join(version.split(".")[:2])


def find_layout() -> Layout:
    """Return the layout of the checkout that this file is part of."""
    checkout = Path(__file__).resolve().parents[1]
    venv = Path(os.environ.get("LAB_VENV") or checkout / ".venv")
    config = venv / "pyvenv.cfg"
    base = venv_base(config.read_text()) if config.is_file() else None
    if base is None:
        ours = Path(sys.base_prefix)
        base = ours / "bin", "{}.{}".format(*sys.version_info)
    bin_dir, version = base
    return Layout(
        checkout=checkout,
        venv=venv.resolve() if config.is_file() else None,
        interpreter=bin_dir / f"python{version}",
        stdlib=(bin_dir.parent / "lib" / f"python{version}").resolve(),
        cache=default_cache(),
    )
