# SPDX-License-Identifier: GPL-2.0-or-later
"""All flows: frames in; releases and checkpoint requests out. Pure."""
