"""Tables: on a terminal by rich, in a file as Markdown. The only way a table is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


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


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on stdout; numbers right-aligned."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, show_header=any(columns))
    for i, column in enumerate(columns):
        numeric = any(isinstance(row[i], int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(show(value)) for value in row))
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    # printed by itself: a table breaks its own title to its width
    console.print(escape(title), style="bold", highlight=False, soft_wrap=True)
    console.print(table)


def escape(text: str) -> str:
    """Text without control characters or rich markup, safe to print whatever file it came from."""
    from rich.markup import escape as escape_markup

    return escape_markup("".join(c if c.isprintable() else "?" for c in text))


def print_record(title: str, record: Mapping[str, Any]) -> None:
    """One record, a line a field."""
    print_table(title, ("", ""), [(name.replace("_", " "), show(value)) for name, value in record.items()])


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """The table as Markdown."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(show(v).replace("|", "\\|") for v in row) + " |" for row in rows]
    return "\n".join(lines)
