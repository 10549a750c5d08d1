# SPDX-License-Identifier: GPL-2.0-or-later
"""Model of the rewriter, and the table of RFC 9293's connection states. Pure."""
