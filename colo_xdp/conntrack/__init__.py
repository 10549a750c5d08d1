# SPDX-License-Identifier: GPL-2.0-or-later
"""The rewriter's model and the table of RFC 9293's states. Pure."""
