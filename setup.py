# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Builds the cffi extension; everything else is in pyproject.toml."""

from setuptools import setup

setup(cffi_modules=["kvm_ffi/build_kvm.py:ffibuilder"])
