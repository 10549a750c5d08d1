# SPDX-License-Identifier: GPL-2.0-or-later
"""Build and export the status document."""
