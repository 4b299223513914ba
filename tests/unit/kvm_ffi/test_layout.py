# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvm_ffi import _kvm
from kvm_ffi._kvm import ffi, lib

CDEFS = sorted(Path(_kvm.__file__).parent.glob("*.cdef"))
STRUCT = re.compile(r"^(struct \w+) \{", re.MULTILINE)
CONSTANT = re.compile(r"^#define (\w+) \.\.\.", re.MULTILINE)
STRUCTS = sorted({name for path in CDEFS for name in STRUCT.findall(path.read_text())})
CONSTANTS = sorted({name for path in CDEFS for name in CONSTANT.findall(path.read_text())})


@pytest.mark.parametrize("struct", STRUCTS)
def test_every_struct_has_the_layout_that_the_compiler_saw(struct: str) -> None:
    # cffi checks a field's width only when the struct is first used.
    assert ffi.sizeof(struct) > 0


@pytest.mark.parametrize("name", CONSTANTS)
def test_every_constant_is_built_in(name: str) -> None:
    assert isinstance(getattr(lib, name), int)


def test_no_ioctl_that_every_supported_header_has_is_missing() -> None:
    assert lib.KVM_RUN != 0
    assert lib.KVM_GET_XSAVE2 != 0


def test_public_names_are_imported_on_first_use() -> None:
    import kvm_ffi

    assert {name for name in kvm_ffi.__all__ if getattr(kvm_ffi, name) is None} == set()
    with pytest.raises(AttributeError, match="Nonsense"):
        _ = kvm_ffi.Nonsense
