#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Builds what tests, demo and benchmarks boot: `python3 guest/build.py OUTDIR`.

    vmlinuz        Debian's linux-image-cloud-amd64, as it is
    initrd.img     busybox, the drivers for virtio and ext4, guest/init.sh
    initrd-min.img guest/init.c alone: for measuring how soon user space runs
    initrd-load.img guest/blkload.c and the drivers for a disk: load on it, and data that is checked
    disk.raw       a small ext4 root disk with busybox as init and a shell on the console
    manifest.json  versions, sizes and SHA-256 of all these

Needs no privilege and no package beyond Debian's. A second run finds all in place.
"""

import argparse
import fcntl
import hashlib
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

if __name__ == "__main__":
    # Replaced, not extended: this folder must not shadow standard modules.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from lab import cpio, tools
from lab.debian import KernelTree, kernel_tree
from lab.errors import LAB_FAILED, LabError
from lab.layout import default_cache

HERE: Final = Path(__file__).resolve().parent
KERNEL_PACKAGE: Final = "linux-image-cloud-amd64"
# In the initramfs: what a guest needs to find its root disk, and its network and entropy early.
INITRD_MODULES: Final = ("virtio_pci", "virtio_blk", "virtio_net", "virtio_rng", "ext4")
# On the root disk, for the devices that a guest may have besides; loaded by /etc/rc.
DISK_MODULES: Final = (
    *INITRD_MODULES,
    "button",
    "evdev",
    "virtio_console",
    "virtio_balloon",
    "virtio_mem",
    "virtio_input",
    "pvpanic-mmio",
    "wdat_wdt",
    "vmw_vsock_virtio_transport",
    "fuse",
    "virtiofs",
    "virtio_pmem",
    "nd_pmem",
)
DISK_MIB: Final = 64
# Fixed, so that the same sources give the same disk.
DISK_UUID: Final = "6f73746c-0000-4000-8000-000000000001"
LOAD_MODULES: Final = ("virtio_pci", "virtio_blk")
FILES: Final = ("vmlinuz", "initrd.img", "initrd-min.img", "initrd-load.img", "disk.raw")


@dataclass(frozen=True)
class Sources:
    """All that the artifacts are made from."""

    kernel: KernelTree
    busybox: Path

    def stamp(self) -> str:
        """Return a digest that changes whenever the artifacts would."""
        digest = hashlib.sha256(self.kernel.version.encode())
        for path in [self.busybox, *sorted(p for p in HERE.rglob("*") if _is_source(p))]:
            digest.update(f"\0{path.name}\0{path.stat().st_mode}\0".encode())
            digest.update(path.read_bytes())
        return digest.hexdigest()


def _is_source(path: Path) -> bool:
    return path.is_file() and "__pycache__" not in path.parts


def build(out: Path) -> dict[str, Any]:
    """Bring `out` up to date and return its manifest.

    Args:
        out: Directory to fill; replaced as a whole, so that it never holds a mixture.

    Raises:
        LabError: a package is missing, a tool failed, or `out` holds something else.
    """
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with (out.parent / f".{out.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kernel = kernel_tree(KERNEL_PACKAGE, default_cache() / "kernels")
        sources = Sources(kernel, tools.static_busybox())
        stamp = sources.stamp()
        manifest = read_manifest(out)
        if manifest is not None and manifest["stamp"] == stamp:
            return manifest
        if manifest is None and out.exists() and any(out.iterdir()):
            raise LabError(f"{out}: not empty, and nothing that this program has built")
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
            fresh = Path(scratch) / "fresh"
            fresh.mkdir()
            manifest = _fill(fresh, Path(scratch), sources, stamp)
            if out.exists():
                out.rename(Path(scratch) / "old")
            fresh.rename(out)
    return manifest


def read_manifest(out: Path) -> dict[str, Any] | None:
    """Return the manifest in `out`, without its stamp if a file that it names is not there in full.

    Returns:
        None if there is no manifest.

    Raises:
        LabError: it is not readable.
    """
    try:
        manifest: dict[str, Any] = json.loads((out / "manifest.json").read_text())
        expected = {name: entry["size_bytes"] for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise LabError(f"{out / 'manifest.json'}: not readable ({err}): remove {out}") from err
    # Another version of this program may have made other files.
    files = [out / name for name in FILES]
    sizes = {path.name: path.stat().st_size for path in files if path.is_file()}
    return manifest if sizes == expected else manifest | {"stamp": ""}


def _fill(out: Path, scratch: Path, sources: Sources, stamp: str) -> dict[str, Any]:
    timer, load = _compile("init.c", scratch), _compile("blkload.c", scratch)
    vsock = _compile("vsock.c", scratch)
    busybox = sources.busybox.read_bytes()
    shutil.copyfile(sources.kernel.vmlinuz, out / "vmlinuz")
    initrd = _initrd(sources.kernel, busybox, timer)
    (out / "initrd.img").write_bytes(initrd)
    (out / "initrd-min.img").write_bytes(_initrd_min(timer))
    (out / "initrd-load.img").write_bytes(_initrd_load(sources.kernel, load))
    _make_disk(
        out / "disk.raw", scratch / "root", sources.kernel, {"busybox": busybox, "vsock": vsock}
    )
    manifest: dict[str, Any] = {
        "stamp": stamp,
        "kernel": {
            "package": sources.kernel.package,
            "version": sources.kernel.version,
            "release": sources.kernel.release,
        },
        "boot_timer": {"port": 0x5B0, "byte": 123, "console_line": "hostel: boot-timer"},
        "ready_line": "hostel guest ready",
        "files": {name: _describe(out / name) for name in FILES},
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def _compile(name: str, scratch: Path) -> bytes:
    program = scratch / name.removesuffix(".c")
    flags = ("-Os", "-s", "-static", "-Wall", "-Wextra", "-Werror")
    tools.run(["gcc", *flags, "-o", program, HERE / name], what=f"building guest/{name}")
    return program.read_bytes()


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return {"size_bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _initrd(kernel: KernelTree, busybox: bytes, timer: bytes) -> bytes:
    archive = cpio.Archive()
    archive.char_device("dev/console", 5, 1)
    archive.file("bin/busybox", busybox, 0o755)
    archive.file("bin/boot-timer", timer, 0o755)
    archive.file("init", (HERE / "init.sh").read_bytes(), 0o755)
    _add_modules(archive, kernel, INITRD_MODULES)
    # Not compressed: unpacking costs a guest more time than reading costs its host.
    return archive.to_bytes()


def _initrd_load(kernel: KernelTree, load: bytes) -> bytes:
    archive = cpio.Archive()
    archive.char_device("dev/console", 5, 1)
    archive.file("init", load, 0o755)
    _add_modules(archive, kernel, LOAD_MODULES)
    return archive.to_bytes()


def _add_modules(archive: cpio.Archive, kernel: KernelTree, names: tuple[str, ...]) -> None:
    order = kernel.load_order(names)
    for module in order:
        archive.file(f"modules/{module.name}", module.read_bytes())
    archive.file("modules/order", "".join(f"{m.name}\n" for m in order).encode())


def _initrd_min(timer: bytes) -> bytes:
    archive = cpio.Archive()
    archive.char_device("dev/console", 5, 1)
    archive.directory("proc")
    archive.file("init", timer, 0o755)
    return archive.to_bytes()


def _make_disk(disk: Path, root: Path, kernel: KernelTree, programs: dict[str, bytes]) -> None:
    shutil.copytree(HERE / "root", root)
    for name in ("bin", "sbin", "usr/bin", "usr/sbin", "proc", "sys", "dev", "run", "tmp", "root"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name, program in programs.items():
        (root / "bin" / name).write_bytes(program)
        (root / "bin" / name).chmod(0o755)
    for applet in tools.run(["busybox", "--list-full"], what="listing busybox").split():
        link = root / applet
        if not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to("/bin/busybox")
    for name in ("sbin/init", "bin/cttyhack"):
        if not (root / name).is_symlink():
            (root / name).symlink_to("/bin/busybox")
    for module in kernel.load_order(DISK_MODULES):
        target = root / module.relative_to(kernel.root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(module, target)
    for index in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        shutil.copyfile(kernel.modules / index, root / f"lib/modules/{kernel.release}" / index)
    tools.run(["depmod", "-b", root, kernel.release], what="depmod for the root disk")
    with disk.open("wb") as file:
        file.truncate(DISK_MIB << 20)
    identity = ["-U", DISK_UUID, "-L", "hostel-root", "-E", f"root_owner=0:0,hash_seed={DISK_UUID}"]
    tools.run(
        ["mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", *identity, "-d", root, disk],
        what="making the root disk",
    )


def main() -> int:
    """Build, and print where the result is."""
    parser = argparse.ArgumentParser(description="Build the kernel, initramfs and disk for guests.")
    parser.add_argument("out", type=Path, metavar="OUTDIR")
    out: Path = parser.parse_args().out
    try:
        manifest = build(out)
    except LabError as err:
        print(f"guest: {err}", file=sys.stderr)
        return LAB_FAILED
    except OSError as err:
        print(f"guest: {err.filename}: {err.strerror}", file=sys.stderr)
        return LAB_FAILED
    print(f"{out}: {manifest['kernel']['package']} {manifest['kernel']['version']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
