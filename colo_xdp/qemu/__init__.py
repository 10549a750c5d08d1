# SPDX-License-Identifier: GPL-2.0-or-later
"""One QEMU over QMP: commands, events, devices."""
