# SPDX-License-Identifier: GPL-2.0-or-later
"""The wire formats of QEMU's own COLO proxy: its packet streams and its notify_dev. Pure."""
