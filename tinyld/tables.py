"""Tables, on a terminal or in a pipe, by rich. The only way a table is shown."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tinyld.errors import plain

WIDTH = 80  # where stdout is no terminal
FOLDED = 12  # letters of a word, from which on it may be broken
MISREAD = 0.05  # share of answers that are no label's word, above which it is said
NUMBERS = re.compile(r"[-+\d.,%± ]|to")  # what a cell that must never be broken is made of


def show(value: Any) -> str:
    """A number or text as a table shows it."""
    if value is None or isinstance(value, bool):
        return {None: "-", True: "yes", False: "no"}[value]
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {show(each)}" for name, each in value.items())
    return ", ".join(map(show, value)) if isinstance(value, list | tuple) else str(value)


def percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f}"


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], wide: bool = False) -> None:
    """A table on stdout, numbers right-aligned, within the terminal's width (80 in a pipe) unless `wide`. Text is
    broken between words only. Rows that do not fit so are shown one below the other, a line a column."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [[plain(show(value)) for value in row] for row in rows]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, show_header=any(columns), padding=(0, 1), pad_edge=False)
    slack = 0  # by which columns of text may be narrower
    for i, column in enumerate(columns):
        number = all(not NUMBERS.sub("", row[i]) for row in cells)
        justify = "right" if number and any(columns) else "left"
        table.add_column(Text(plain(column)), justify=justify, overflow="fold", no_wrap=number)
        texts = [] if number else [column, *(row[i] for row in cells)]
        words = [min(len(word), FOLDED) for text in texts for word in text.split()]
        slack += max(map(len, texts), default=0) - max(words, default=0)
    for row in cells:
        table.add_row(*map(Text, row))  # in which nothing is markup
    console, needed = Console(), Console(width=1 << 20).measure(table)
    width = console.width if console.is_terminal else WIDTH
    console = Console(width=max(width, needed.maximum) if wide else width)
    console.print(Text(plain(title), style="bold"), soft_wrap=True)  # broken by nobody
    if any(columns) and needed.maximum - slack > console.width:
        for row in cells:
            print_table("", ("", ""), list(zip(columns, row, strict=True)))
    else:
        console.print(table)


def print_record(title: str, record: Mapping[str, Any]) -> None:
    """One record, a line a field."""
    print_table(title, ("", ""), [(name.replace("_", " "), show(value)) for name, value in record.items()])
