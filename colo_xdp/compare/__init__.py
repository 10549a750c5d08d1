# SPDX-License-Identifier: GPL-2.0-or-later
"""Comparison of single flows: whether the PVM's next frame may leave. Pure."""
