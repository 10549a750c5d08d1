# SPDX-License-Identifier: GPL-2.0-or-later
"""Moves flows to the kernel's fast path and back: codecs and schedule. Pure."""
