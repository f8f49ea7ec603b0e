"""The page of a comparison: its table and plots in one HTML file. matplotlib comes with the extra `plots`."""

from __future__ import annotations

import html
import importlib.util
import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from tinyld.records import settings
from tinyld.report import RESULT_COLUMNS, Cell, Runs, base_name, evaluated, own_cells, result_rows, seconds
from tinyld.statistics import interval, mean_of
from tinyld.tables import show

Record = Mapping[str, Any]
Series = dict[str, list[tuple[float, float, float, float]]]  # name -> points (x, accuracy, low, high), in percent

STYLE = """body { font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-size: 12px; display: block; overflow-x: auto }
th, td { padding: 3px 8px; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap }
figure { display: inline-block; margin: 1em 1em 0 0 } svg { max-width: 100%; height: auto }"""


def can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def name_of(record: Record) -> str:
    """A method with its options, as a legend has it."""
    about = settings(record)
    return record["method"]["name"] + ("" if about == "-" else f" ({about})")


def points(cells: Mapping[Cell, Runs], x: Callable[[Runs], float]) -> Series:
    """A point for all seeds of a row of the results table, with its interval; they share their place on the x axis."""
    series: Series = {}
    for runs in cells.values():
        found = [f["accuracy"] for _, f in runs]
        low, high = interval(found, runs[0][1]["n"])
        series.setdefault(name_of(runs[0][0]), []).append((x(runs), 100 * mean_of(found), 100 * low, 100 * high))
    return {name: sorted(found) for name, found in series.items()}


def num_rows(runs: Runs) -> int:
    return runs[0][0]["data"]["rows"]


def with_most_rows(cells: Mapping[Cell, Runs]) -> dict[Cell, Runs]:
    most = max((num_rows(runs) for runs in cells.values()), default=0)
    return {cell: runs for cell, runs in cells.items() if num_rows(runs) == most}


def curves(cells: Mapping[Cell, Runs]) -> Series:
    """Dev accuracy against seconds of training, one run a method: the first seed's."""
    series: Series = {}
    for runs in cells.values():
        record, _ = runs[0]
        wait = record["results"]["finetune"].get("cache_seconds", 0.0)
        line = [(wait + s, 100 * a, 100 * a, 100 * a) for s, a in record.get("curve", [])]
        if line:
            series.setdefault(name_of(record), line)
    return series


def by_noise(cells: Mapping[Cell, Runs]) -> Series:
    """Token accuracy at masked positions along the reverse process, from all masked to little; the first seed's."""
    series: Series = {}
    for runs in cells.values():
        record, found = runs[0]
        levels = found.get("masked_acc_by_noise", [])
        if len(levels) > 1:
            series.setdefault(name_of(record), [(100 * share, *[100 * a] * 3) for share, a in levels])
    return series


def draw(
    axes: Any, x_label: str, series: Series, log: bool, lines: bool, colours: Mapping[str, str] | None = None
) -> None:
    """The points of every series with their intervals."""
    for name, found in series.items():
        x, y, low, high = zip(*found, strict=True)
        errors = [[b - a for a, b in zip(low, y, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]
        shown = None if lines and low == high else errors
        style = {"fmt": "o-" if lines else "o", "markersize": 4, "capsize": 2, "color": (colours or {}).get(name)}
        axes.errorbar(x, y, yerr=shown, label=name, **style)
    log = log and all(x > 0 for found in series.values() for x, *_ in found)
    axes.set(xlabel=x_label, xscale="log" if log else "linear")
    if log:
        from matplotlib.ticker import LogFormatter

        axes.xaxis.set_major_formatter(LogFormatter())
        axes.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.6)))
    axes.grid(alpha=0.3)


def as_svg(figure: Any) -> str:
    """The figure as an SVG element whose text is text."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tinyld"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def drawn(
    title: str,
    x_label: str,
    series: Series,
    log: bool,
    lines: bool,
    y_label: str = "decoded accuracy %",
    bands: bool = False,
) -> str:
    """One plot as an element. `bands`: x is a noise level in percent, drawn from high to low over the bands."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    draw(axes, x_label, series, log, lines)
    axes.set(title=title, ylabel=y_label)
    if bands:
        from tinyld.methods.bands import BAND_EDGES, BAND_NAMES

        axes.invert_xaxis()
        for name, (hi, lo), shade in zip(BAND_NAMES, pairwise(BAND_EDGES), ("0.8", "0.88", "0.96"), strict=True):
            axes.axvspan(100 * hi, 100 * lo, color=shade, zorder=0, label=f"band: {name} noise")
    axes.legend(fontsize=7)
    return f"<figure>{as_svg(figure)}</figure>"


# file name -> title, label of the x axis, and place of a row of the results table on it
FRONTS: dict[str, tuple[str, str, Callable[[Runs], float]]] = {
    "size": (
        "Accuracy against stored size",
        "stored, % of the base",
        lambda runs: runs[0][0]["parameters"]["stored_percent"],
    ),
    "time": ("Accuracy against training time", "seconds of training", seconds),
    "rows": ("Data efficiency", "training rows", num_rows),
}


def front(name: str, cells: Mapping[Cell, Runs]) -> Series:
    """The points of one of FRONTS: of the cells with the most training rows, or along them where they are unlike."""
    _, _, x = FRONTS[name]
    if name != "rows":
        return points(with_most_rows(cells), x)
    return points(cells, x) if len({num_rows(runs) for runs in cells.values()}) > 1 else {}


def fronts(records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Accuracy against stored size, training time and training rows as SVG files, a panel a base and task.

    Where runs of one task had unlike numbers of rows, the first two are of those with the most, and there is a third.
    """
    from matplotlib.figure import Figure

    panels: dict[tuple[str, str, str], dict[Cell, Runs]] = {}
    for cell, runs in own_cells(evaluated(records)).items():
        record = runs[0][0]
        panels.setdefault((cell[0], base_name(record), str(record["base"].get("fingerprint"))), {})[cell] = runs
    names = sorted({name_of(runs[0][0]) for cells in panels.values() for runs in cells.values()})
    colours = {method: f"C{n % 10}" if n < 10 else f"{0.2 + 0.1 * (n % 7):.1f}" for n, method in enumerate(names)}
    found = {}
    for name, (title, x_label, _) in FRONTS.items():
        shown = {key: series for key, cells in sorted(panels.items()) if (series := front(name, cells))}
        if not shown:
            continue
        columns = min(len(shown), 2)
        lines = -(-len(shown) // columns)
        figure = Figure(figsize=(6.0 * columns, 3.6 * lines + 0.22 * len(names)), layout="constrained")
        labels: dict[str, Any] = {}
        for i, ((task, base, _), series) in enumerate(shown.items()):
            axes = figure.add_subplot(lines, columns, i + 1)
            draw(axes, x_label, series, log=True, lines=name == "rows", colours=colours)
            axes.set(title=f"{task} ({base})", ylabel="decoded accuracy %")
            labels |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
        figure.suptitle(title)
        told = [n for n in names if n in labels]
        legend = [textwrap.fill(n, 60 * columns) for n in told]
        figure.legend([labels[n] for n in told], legend, loc="outside lower center", fontsize=8)
        found[f"{name}.svg"] = as_svg(figure) + "\n"
    return found


def page(records: Sequence[dict[str, Any]], command: str) -> str:
    """The whole page: a self-contained HTML document."""
    table = [f"<tr>{''.join(f'<th>{html.escape(c)}</th>' for c in RESULT_COLUMNS)}</tr>"]
    for row in result_rows(records):
        table.append(f"<tr>{''.join(f'<td>{html.escape(show(value))}</td>' for value in row)}</tr>")
    body = [f"<h1>tinyld compare</h1><p><code>{html.escape(command)}</code></p><table>{''.join(table)}</table>"]
    for task in dict.fromkeys(r["task"] for r in records):
        cells = evaluated([r for r in records if r["task"] == task])
        own, most = own_cells(cells), with_most_rows(cells)
        body.append(f"<h2>{html.escape(task)}</h2>")
        for name, (title, x_label, _) in FRONTS.items():
            if series := front(name, own):
                body.append(drawn(title, x_label, series, log=True, lines=name == "rows"))
        if learned := curves(most):
            body.append(drawn("Learning curves (dev)", "seconds of training", learned, log=False, lines=True))
        if steps := by_noise(most):
            told = {"y_label": "masked tokens right, %", "bands": True}
            label = "answer tokens still masked, up to %"
            body.append(drawn("Accuracy by denoising step and band", label, steps, log=False, lines=True, **told))
    head = f"<meta charset='utf-8'><title>tinyld compare</title><style>{STYLE}</style>"
    return f"<!doctype html><html><head>{head}</head><body>{''.join(body)}</body></html>\n"
