"""The page of a comparison: its table and plots in one HTML file. matplotlib comes with the extra `plots`."""

from __future__ import annotations

import html
import importlib.util
import io
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from tinyld.records import identity, settings
from tinyld.report import RESULT_COLUMNS, result_rows
from tinyld.statistics import interval
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


def tested(record: Record) -> Mapping[str, Any] | None:
    """The record's evaluation: on test where there is one, else on dev."""
    found = record["results"].get("eval", {})
    keys = sorted((k for k in found if "rows_per_second" in found[k]), key=lambda k: k.endswith("/dev"))
    return found[keys[0]] if keys else None


def points(records: Sequence[Record], x: Callable[[Record], float]) -> Series:
    """A point for all seeds of a row of the results table, with its interval; `x` is averaged."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        if "accuracy" in (tested(record) or {}):
            groups.setdefault(identity(record), []).append(record)
    series: Series = {}
    for runs in groups.values():
        found = [tested(r) or {} for r in runs]
        accuracies = [f["accuracy"] for f in found]
        low, high = interval(accuracies, found[0]["n"])
        mean, place = sum(accuracies) / len(runs), sum(x(r) for r in runs) / len(runs)
        series.setdefault(name_of(runs[0]), []).append((place, 100 * mean, 100 * low, 100 * high))
    return {name: sorted(found) for name, found in series.items()}


def curves(records: Sequence[Record]) -> Series:
    """Dev accuracy against seconds of training, one run a method: the first seed's."""
    series: Series = {}
    for record in records:
        wait = record["results"]["finetune"].get("cache_seconds", 0.0)
        line = [(wait + s, 100 * a, 100 * a, 100 * a) for s, a in record.get("curve", [])]
        if line:
            series.setdefault(name_of(record), line)
    return series


def by_noise(records: Sequence[Record]) -> Series:
    """Token accuracy at masked positions along the reverse process, from all masked to little; the first seed's."""
    series: Series = {}
    for record in records:
        levels = (tested(record) or {}).get("masked_acc_by_noise", [])
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


FRONTS: dict[str, tuple[str, Callable[[Record], float]]] = {
    "size": ("stored, % of the base", lambda r: r["parameters"]["stored_percent"]),
    "time": ("seconds of training", lambda r: r["results"]["finetune"]["seconds"]),
    "rows": ("training rows", lambda r: r["data"]["rows"]),
}


def fronts(records: Sequence[Record]) -> dict[str, str]:
    """Accuracy against stored size, training time and training rows as SVG files, a panel a base and task.

    Where runs of one task had unlike numbers of rows, the first two are of those with the most, and there is a third.
    """
    from matplotlib.figure import Figure

    found = {}
    panels: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if "accuracy" in (tested(record) or {}):
            panels.setdefault((record["base"]["path"].rpartition("/")[2], record["task"]), []).append(record)
    for name, (x_label, x) in FRONTS.items():
        shown: dict[tuple[str, str], Series] = {}
        for key, mine in panels.items():
            counts = {r["data"]["rows"] for r in mine}
            if name != "rows":
                shown[key] = points([r for r in mine if r["data"]["rows"] == max(counts)], x)
            elif len(counts) > 1:
                shown[key] = points(mine, x)
        if not shown:
            continue
        names = sorted({method for series in shown.values() for method in series})
        colours = {method: f"C{n % 10}" if n < 10 else f"{0.2 + 0.1 * (n % 7):.1f}" for n, method in enumerate(names)}
        columns = min(len(shown), 2)
        lines = -(-len(shown) // columns)
        figure = Figure(figsize=(6.0 * columns, 3.6 * lines + 0.25 * len(names)), layout="constrained")
        labels: dict[str, Any] = {}
        for i, ((base, task), series) in enumerate(sorted(shown.items())):
            axes = figure.add_subplot(lines, columns, i + 1)
            draw(axes, x_label, series, log=True, lines=name == "rows", colours=colours)
            axes.set(title=f"{task} ({base})", ylabel="decoded accuracy %")
            labels |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
        figure.legend([labels[n] for n in names], names, loc="outside lower center", fontsize=8)
        found[f"{name}.svg"] = as_svg(figure) + "\n"
    return found


def page(records: Sequence[Record], command: str) -> str:
    """The whole page: a self-contained HTML document."""
    table = [f"<tr>{''.join(f'<th>{html.escape(c)}</th>' for c in RESULT_COLUMNS)}</tr>"]
    for row in result_rows(records):  # type: ignore[arg-type]
        table.append(f"<tr>{''.join(f'<td>{html.escape(show(value))}</td>' for value in row)}</tr>")
    body = [f"<h1>tinyld compare</h1><p><code>{html.escape(command)}</code></p><table>{''.join(table)}</table>"]
    for task in dict.fromkeys(r["task"] for r in records):
        mine = [r for r in records if r["task"] == task]
        body.append(f"<h2>{html.escape(task)}</h2>")
        most = [r for r in mine if r["data"]["rows"] == max(m["data"]["rows"] for m in mine)]
        size = points(most, lambda r: r["parameters"]["stored_percent"])
        seconds = points(most, lambda r: r["results"]["finetune"]["seconds"])
        if size:
            body.append(drawn("Accuracy against stored size", "stored, % of the base", size, log=True, lines=False))
            body.append(drawn("Accuracy against training time", "seconds", seconds, log=True, lines=False))
        if learned := curves(most):
            body.append(drawn("Learning curves (dev)", "seconds of training", learned, log=False, lines=True))
        if steps := by_noise(most):
            told = {"y_label": "masked tokens right, %", "bands": True}
            label = "answer tokens still masked, up to %"
            body.append(drawn("Accuracy by denoising step and band", label, steps, log=False, lines=True, **told))
        if len({r["data"]["rows"] for r in mine}) > 1:
            rows = points(mine, lambda r: r["data"]["rows"])
            body.append(drawn("Data efficiency", "training rows", rows, log=True, lines=True))
    head = f"<meta charset='utf-8'><title>tinyld compare</title><style>{STYLE}</style>"
    return f"<!doctype html><html><head>{head}</head><body>{''.join(body)}</body></html>\n"
