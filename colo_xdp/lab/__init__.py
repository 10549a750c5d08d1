# SPDX-License-Identifier: GPL-2.0-or-later
"""Build a laboratory on one machine: namespaces as hosts, QEMU guests, clients that check each
byte.

`colo-xdp demo` and the end-to-end tests use it. The product itself imports nothing from here.
"""
