# SPDX-License-Identifier: GPL-2.0-or-later
"""The only code that touches the kernel: bcc in a child, bpf(2), netlink, rings, taps."""
