# SPDX-License-Identifier: GPL-2.0-or-later
"""The other host: control channel, TLS, heartbeats."""
