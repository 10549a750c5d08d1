# SPDX-License-Identifier: GPL-2.0-or-later
"""The status as a live view on a terminal: the only module that imports rich.

What it shows is that of status/glance.py. A colour only repeats what a word or a mark says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .glance import Glance
from .health import Level

_STYLE = {Level.OK: "green", Level.WARNING: "yellow", Level.CRITICAL: "bold red"}
_MARK = {Level.OK: " ", Level.WARNING: "!", Level.CRITICAL: "!!"}


def picture(g: Glance) -> RenderableType:
    """Return one view."""
    parts: list[RenderableType] = [
        Text(g.title, style="bold"),
        Text(f"{g.health.level}: {g.health.sentence}", style=_STYLE[g.health.level]),
    ]
    width = max(len(line.name) for line in g.lines())
    for name, lines in g.sections.items():
        table = Table.grid(padding=(0, 1))
        table.add_column(width=2)
        table.add_column(width=width)
        table.add_column(overflow="fold")
        for line in lines:
            style = "" if line.level is Level.OK else _STYLE[line.level]
            table.add_row(
                Text(_MARK[line.level], style=style),
                Text(line.name, style="dim"),
                Text(line.text, style=style),
            )
        parts.append(Panel(table, title=name, title_align="left", border_style="dim"))
    return Group(*parts)


@contextmanager
def view(console: Console | None = None) -> Iterator[Callable[[Glance, str], None]]:
    """Show what is given to show(glance, note) in place of the one before, until the end.

    note: what keeps the view from being fresh; empty: nothing.
    """
    console = console or Console()
    with Live(console=console, auto_refresh=False, vertical_overflow="ellipsis") as live:

        def show(g: Glance, note: str) -> None:
            foot = Text(note, style="bold red") if note else Text("Ctrl-C ends this", style="dim")
            live.update(Group(picture(g), foot), refresh=True)

        yield show
