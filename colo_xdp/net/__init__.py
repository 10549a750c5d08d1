# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames, headers, sequence numbers, addresses: bytes only. Pure."""
