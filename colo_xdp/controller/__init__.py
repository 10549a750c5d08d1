# SPDX-License-Identifier: GPL-2.0-or-later
"""Acts on one host: the loop, checkpoints, takeover, operator commands."""
