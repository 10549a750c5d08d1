# SPDX-License-Identifier: GPL-2.0-or-later
"""Real applications on a Debian guest, used by their own clients, in five arms."""
