# SPDX-License-Identifier: GPL-2.0-or-later
"""The peer link in an encrypted tunnel of user space: `make test-tunnel`."""
