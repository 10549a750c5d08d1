# SPDX-License-Identifier: GPL-2.0-or-later
"""Define what the timers of all parts have in common. Pure."""

TICK_S = 0.01  # minimum time between two ticks of a controller; the other timers use multiples
