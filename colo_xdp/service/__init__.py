# SPDX-License-Identifier: GPL-2.0-or-later
"""One process: signals, systemd, control socket, wiring."""
