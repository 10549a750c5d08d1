# SPDX-License-Identifier: GPL-2.0-or-later
"""One TOML file becomes one frozen Config. Pure."""
