# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Fetches a stock Debian kernel package and unpacks it, once, into a cache."""

import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lab import tools
from lab.errors import LabError


@dataclass(frozen=True)
class KernelTree:
    """An unpacked kernel package: `root`/boot/vmlinuz-`release`, `root`/lib/modules/`release`."""

    root: Path
    package: str
    version: str  # of the Debian package, such as 6.1.158-1
    release: str  # as `uname -r` says it

    @property
    def vmlinuz(self) -> Path:
        """The bzImage, as Debian ships it."""
        return self.root / "boot" / f"vmlinuz-{self.release}"

    @property
    def config(self) -> Path:
        """The kernel's build configuration."""
        return self.root / "boot" / f"config-{self.release}"

    @property
    def modules(self) -> Path:
        """The modules directory, after depmod."""
        return self.root / "lib" / "modules" / self.release

    def load_order(self, names: tuple[str, ...]) -> list[Path]:
        """Return the module files to insert, dependencies first, each once.

        Modules that are built into the kernel need no file and are left out.

        Raises:
            LabError: a name is neither a module of this kernel nor built in.
        """
        order: dict[Path, None] = {}
        for name in names:
            lines = tools.run(
                ["modprobe", "-d", self.root, "-S", self.release, "--show-depends", name],
                what=f"module {name} of {self.package}",
            )
            order |= {Path(p): None for p in re.findall(r"^insmod (\S+)", lines, re.M)}
        return list(order)


def kernel_tree(metapackage: str, cache: Path) -> KernelTree:
    """Return the kernel that `metapackage` depends on, fetching it the first time.

    A tree already in the cache is used without asking apt, so that the second use is quick and
    works offline; remove the cache directory to take up a newer kernel.

    Args:
        metapackage: linux-image-amd64 or linux-image-cloud-amd64.
        cache: Directory that keeps one unpacked tree per metapackage.

    Raises:
        LabError: apt does not know the package, or the download failed.
    """
    final = cache / metapackage
    if not final.is_dir():
        tools.need("apt-cache", "apt-get", "dpkg-deb", "depmod")
        cache.mkdir(parents=True, exist_ok=True)
        package = _depends(metapackage)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as scratch:
            tree = _fetch(package, Path(scratch))
            # Two builders at once: the first rename wins, and both results are the same.
            if not final.is_dir():
                tree.rename(final)
    package, version = (final / "package").read_text().split()
    return KernelTree(final, package, version, package.removeprefix("linux-image-"))


def _depends(metapackage: str) -> str:
    out = tools.run(["apt-cache", "depends", metapackage], what=f"looking up {metapackage}")
    found = re.search(r"Depends: (linux-image-\S+)", out)
    if found is None:
        raise LabError(
            f"apt does not know {metapackage}: run apt-get update (Debian main is needed)"
        )
    return found[1]


def _fetch(package: str, scratch: Path) -> Path:
    # As root, apt would warn that its unprivileged user may not enter the scratch directory.
    sandbox = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
    tools.run(
        ["apt-get", "-qq", *sandbox, "download", package],
        what=f"downloading {package} (run apt-get update if apt's lists are old)",
        cwd=scratch,
    )
    deb = next(scratch.glob("*.deb"), None)
    if deb is None:
        raise LabError(f"apt-get download {package} left no .deb file")
    version = tools.run(["dpkg-deb", "-f", deb, "Version"], what=f"reading {deb.name}").strip()
    tree = scratch / "tree"
    tools.run(["dpkg-deb", "-x", deb, tree], what=f"unpacking {deb.name}")
    shutil.rmtree(tree / "usr", ignore_errors=True)
    tools.run(["depmod", "-b", tree, package.removeprefix("linux-image-")], what="depmod")
    (tree / "package").write_text(f"{package} {version}\n")
    return tree
