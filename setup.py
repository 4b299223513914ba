# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Builds the cffi extension; everything else is in pyproject.toml."""

from setuptools import setup

setup(
    cffi_modules=["kvm_ffi/build_kvm.py:ffibuilder"],
    # The C core uses the stable ABI only (cffi): one wheel serves every Python from this one on.
    # Not in pyproject.toml, since a setuptools without this command complains of that in a build.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
