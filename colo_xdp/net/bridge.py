# SPDX-License-Identifier: GPL-2.0-or-later
"""Names used by the kernel's bridge. Source: include/uapi/linux/if_bridge.h."""

#: names of BR_STATE_*, by number
PORT_STATES = ("disabled", "listening", "learning", "forwarding", "blocking")
