# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Builds ``kvm_ffi._kvm``: the cffi binding of <linux/kvm.h> and of the C core in csrc/.

Every ``*.cdef`` here and every ``csrc/*.c`` is part of the build, so a new unit of C is two new
files and no edit of this one.
"""

from __future__ import annotations

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

# cffi wants a type declared before it is used by value; these define types that the others embed.
CDEFS_FIRST = ("kvm.cdef", "guest_mem.cdef", "virtqueue.cdef")

COMPILE_ARGS = [
    "-std=gnu11",
    "-O2",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wconversion",
    "-fstack-protector-strong",
    # Some interpreters put their own level into CFLAGS; a second definition would be an error.
    "-U_FORTIFY_SOURCE",
    "-D_FORTIFY_SOURCE=2",
    "-fvisibility=hidden",
    "-pthread",
]


def _cdef_paths() -> list[Path]:
    """The declaration files, those that others embed first."""
    first = [HERE / name for name in CDEFS_FIRST if (HERE / name).exists()]
    return first + sorted(path for path in HERE.glob("*.cdef") if path not in first)


def _relative(paths: list[Path]) -> list[str]:
    """Paths as setuptools wants them: relative to setup.py."""
    return [str(path.relative_to(ROOT)) for path in paths]


def _make_builder() -> FFI:
    headers = sorted((HERE / "csrc").glob("*.h"), key=lambda path: (path.name != "compat.h", path))
    builder = FFI()
    for path in _cdef_paths():
        builder.cdef(path.read_text())
    builder.set_source(
        "kvm_ffi._kvm",
        "".join(f'#include "{header.name}"\n' for header in headers),
        sources=_relative(sorted((HERE / "csrc").glob("*.c"))),
        include_dirs=["kvm_ffi/csrc"],
        depends=_relative(headers),
        extra_compile_args=COMPILE_ARGS,
        extra_link_args=["-pthread"],
        py_limited_api=True,
    )
    return builder


ffibuilder = _make_builder()

if __name__ == "__main__":
    ffibuilder.compile(tmpdir=str(ROOT), verbose=True)
