# SPDX-License-Identifier: GPL-2.0-or-later
"""Decide which guest may be on the network: decision table, arbiters, lease."""
