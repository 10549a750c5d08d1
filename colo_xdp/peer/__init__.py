# SPDX-License-Identifier: GPL-2.0-or-later
"""Talk to the other host: control channel, TLS, heartbeats."""
