# SPDX-License-Identifier: GPL-2.0-or-later
"""Make the files of a pair for both hosts out of a few answers, and put them in place."""
