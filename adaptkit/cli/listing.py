"""Lines and tables on a console that may hold anything: names from users and files are shown, never interpreted."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from adaptkit.cli.console import StreamConsole
from adaptkit.cli.failure import one_line

LEAST_REST = 20  # columns of the terminal for what stands beside a name


def line(console: StreamConsole, text: str, style: str = "", wrap: bool = False) -> None:
    """A line of text that may hold anything; unless `wrap`, it is left whole for copying."""
    console.print(Text(one_line(text) if text.strip() == text else "    " + one_line(text), style), soft_wrap=not wrap)


def table(console: StreamConsole, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns under bold titles (none when all are empty), and an empty line."""
    drawn = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold", show_header=any(header))
    names = [row[0] for row in rows]
    has_room = max(map(len, names), default=0) + LEAST_REST <= console.width
    longest = max((len(word) for name in names for word in name.split()), default=0)
    width = None if has_room else min(longest, console.width - LEAST_REST)
    for number, title in enumerate(header):  # a number is never cut, a name split at spaces alone
        is_name = number == 0
        drawn.add_column(title, overflow="fold", no_wrap=is_name and has_room, width=width if is_name else None)
    for row in rows:
        drawn.add_row(*(Text(one_line(cell)) for cell in row))
    console.print(drawn)
    line(console, "")
