# SPDX-License-Identifier: GPL-2.0-or-later
"""The compare engine: frames in; releases and checkpoint requests out. Pure."""
