# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""Legacy PC devices: UART, i8042, RTC, pvpanic, boot timer."""
