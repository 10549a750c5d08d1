# SPDX-License-Identifier: GPL-2.0-or-later
"""A laboratory for one machine: namespaces as hosts, QEMU guests, clients that check each byte.

Used by `colo-xdp demo` and the end-to-end tests. The product itself imports nothing from here.
"""
