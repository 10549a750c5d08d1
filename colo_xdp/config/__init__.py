# SPDX-License-Identifier: GPL-2.0-or-later
"""Read one TOML file into one frozen Config. Pure."""
