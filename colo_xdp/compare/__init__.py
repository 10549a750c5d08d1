# SPDX-License-Identifier: GPL-2.0-or-later
"""One flow: may the PVM's next frame leave? Pure."""
