# SPDX-License-Identifier: GPL-2.0-or-later
"""A flow to the kernel's fast path and back: codecs and schedule. Pure."""
