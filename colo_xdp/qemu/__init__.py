# SPDX-License-Identifier: GPL-2.0-or-later
"""Control one QEMU over QMP: commands, events, devices."""
