# SPDX-License-Identifier: GPL-2.0-or-later
"""The status document, its builder, metrics and health paths."""
