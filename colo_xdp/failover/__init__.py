# SPDX-License-Identifier: GPL-2.0-or-later
"""Which guest may be live: the decision table and the arbiters."""
