# SPDX-License-Identifier: GPL-2.0-or-later
"""COLO proxy in eBPF: lock-stepped virtual machines that survive the death of their host."""

__version__ = "0.1.0"
