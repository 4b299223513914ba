# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The lab's own kernel, first-stage file system and modules, made once per kernel version."""

import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lab import bzimage, cpio, images, tools
from lab.debian import KernelTree, kernel_tree

# What init.sh needs to reach the rest. All other modules are in an image of their own.
EARLY_MODULES: Final = (
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_rng",
    "9pnet_virtio",
    "9p",
    "overlay",
    "squashfs",
)
INIT: Final = Path(__file__).with_name("init.sh")


@dataclass(frozen=True)
class LabKernel:
    """What the emulated host boots from."""

    image: Path  # an ELF, or the bzImage where that could not be unpacked
    initrd: Path
    modules: images.Image


def prepare(cache: Path) -> LabKernel:
    """Return the lab's kernel, fetching and building what is not in the cache."""
    tree = kernel_tree("linux-image-amd64", cache / "kernels")
    busybox = tools.static_busybox()
    inputs = [
        tree.version.encode(),
        INIT.read_bytes(),
        busybox.read_bytes(),
        repr(EARLY_MODULES).encode(),
    ]
    stamp = hashlib.sha256(b"\0".join(inputs)).hexdigest()[:16]
    initrd = cache / "kernels" / f"lab-{stamp}.cpio.gz"
    if not initrd.exists():
        for old in initrd.parent.glob("lab-*.cpio.gz"):
            old.unlink(missing_ok=True)
        part = initrd.with_suffix(".part")
        part.write_bytes(gzip.compress(_initramfs(tree, busybox), 1, mtime=0))
        part.rename(initrd)
    packed = images.pack("modules", tree.modules, cache / "images", (), tree.version)
    target = Path("/lib/modules") / tree.release
    return LabKernel(_elf(tree), initrd, images.Image(packed.name, packed.file, target))


def _elf(tree: KernelTree) -> Path:
    elf = tree.root / "boot" / "vmlinux"
    if not elf.exists():
        kernel = bzimage.unpack(tree.vmlinuz.read_bytes())
        if kernel is None or "CONFIG_PVH=y" not in tree.config.read_text():
            return tree.vmlinuz
        part = elf.with_suffix(".part")
        part.write_bytes(kernel)
        part.rename(elf)
    return elf


def _initramfs(tree: KernelTree, busybox: Path) -> bytes:
    archive = cpio.Archive()
    archive.char_device("dev/console", 5, 1)
    archive.file("bin/busybox", busybox.read_bytes(), 0o755)
    archive.file("init", INIT.read_bytes(), 0o755)
    order = tree.load_order(EARLY_MODULES)
    for module in order:
        archive.file(f"modules/{module.name}", module.read_bytes())
    archive.file("modules/order", "".join(f"{m.name}\n" for m in order).encode())
    return archive.to_bytes()
