# SPDX-License-Identifier: GPL-2.0-or-later
"""Run one controller as a service: daemon, systemd, control socket, start limit."""
