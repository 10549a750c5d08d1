# SPDX-License-Identifier: GPL-2.0-or-later
"""What the timers of all parts have in common. Pure."""

TICK_S = 0.01  # between two ticks of a controller at least; others wait in multiples of it
