# SPDX-License-Identifier: Apache-2.0
# Copyright the Hostel authors
"""The lab: an emulated x86-64 host with real AMD-V, on any machine, with or without KVM.

QEMU's software CPU implements SVM with nested paging, so a stock Debian kernel in it loads
kvm-amd and offers a complete /dev/kvm. It sees this machine's root file system read-only, so
whatever is installed here runs there unchanged.

Reading order: `cli` (commands) -> `session` (one emulated host and its run directory) ->
`kernel`, `images` (what it boots from) -> `qemu` (command line) -> `init.sh`, `main.sh`,
`agent` (inside the lab) -> `client` (runs a command through the agent).
Standard library only, so that it works before anything of the project is built.
"""
