"""Tables: on a terminal or in a pipe by rich, in a file as Markdown. The only way a table is made."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH = 80  # where stdout is no terminal
GAP = 3  # spaces between two columns
NUMBERS = re.compile(r"[-+\d.,%± ]|to")  # what a cell that must never be broken is made of


def show(value: Any) -> str:
    """A number or text as a table shows it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f}"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], wide: bool = False) -> None:
    """A table on stdout, numbers right-aligned, within the terminal's width (80 in a pipe) unless `wide`.

    Text is broken between words only. Rows that do not fit so are shown one below the other, a line a column.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    cells = [[clean(show(value)) for value in row] for row in rows]
    console = Console()
    if wide:
        console = Console(width=max(console.width, sum(widths(columns, cells, str.splitlines)) + GAP * len(columns)))
    elif not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(clean(title), style="bold", highlight=False, markup=False, soft_wrap=True)  # broken by nobody
    if any(columns) and sum(widths(columns, cells, str.split)) + GAP * (len(columns) - 1) > console.width:
        for row in cells:
            print_table("", ("", ""), list(zip(columns, row, strict=True)))
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, show_header=any(columns), padding=(0, 1), pad_edge=False)
    for i, column in enumerate(columns):
        number = is_number(cells, i)
        table.add_column(
            column, justify="right" if number and any(columns) else "left", overflow="fold", no_wrap=number
        )
    for row in cells:
        table.add_row(*map(escape, row))
    console.print(table)


def widths(columns: Sequence[str], cells: Sequence[Sequence[str]], split: Any) -> list[int]:
    """Of each column: its longest part that `split` leaves whole, or number."""
    from rich.cells import cell_len

    found = []
    for i, column in enumerate(columns):
        number = is_number(cells, i)
        parts = [part for row in cells for part in ([row[i]] if number else split(row[i]))]
        found.append(max(map(cell_len, [*split(column), *parts]), default=0))
    return found


def is_number(cells: Sequence[Sequence[str]], column: int) -> bool:
    """Whether a column holds numbers, ranges of them and gaps only."""
    return all(not NUMBERS.sub("", row[column]) for row in cells)


def clean(text: str) -> str:
    """Text without control characters, safe to print whatever file it came from."""
    return "".join(c if c.isprintable() else "?" for c in text)


def escape(text: str) -> str:
    """Clean text that rich does not read as markup."""
    from rich.markup import escape as escape_markup

    return escape_markup(clean(text))


def print_record(title: str, record: Mapping[str, Any]) -> None:
    """One record, a line a field."""
    print_table(title, ("", ""), [(name.replace("_", " "), show(value)) for name, value in record.items()])


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """The table as Markdown."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(clean(show(v)).replace("|", "\\|") for v in row) + " |" for row in rows]
    return "\n".join(lines)
