# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""ACPI tables and AML, built from Python."""
