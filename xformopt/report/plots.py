"""Owns the plots of the HTML report: SVG that takes its colors and font from the page around it."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from xformopt.report.schema import Run
from xformopt.report.sweep import Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["latency_plot", "length_plot", "roofline_plot", "run_color"]

# stand-ins that the page's own colors replace, so that one file serves a light and a dark screen
_INK, _MUTED, _GRID = "#010203", "#040506", "#070809"
_RUNS = tuple(f"#0a0b{index:02x}" for index in range(8))
_VARIABLES = {_INK: "ink", _MUTED: "muted", _GRID: "line"} | {
    color: f"run-{index}" for index, color in enumerate(_RUNS)
}
_POINTS = 300
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _MUTED,
    "text.color": _INK,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "grid.color": _GRID,
}


def run_color(index: int) -> str:
    """Return the CSS color of the run at `index`, the same in plots and tables."""
    return f"var(--run-{index % len(_RUNS)})"


def latency_plot(runs: Sequence[Run], key: str) -> str:
    """Draw every run's samples, quartiles and median in milliseconds; `key` makes the ids unique."""
    shown = [(index, run) for index, run in enumerate(runs) if run.samples_ms and run.latency_ms]
    if not shown:
        return ""

    def draw(axes: Axes) -> None:
        generator = np.random.default_rng(0)
        limit = 1.15 * max(run.latency_ms.p99 for _, run in shown if run.latency_ms)
        for row, (index, run) in enumerate(shown):
            samples = np.sort(np.asarray(run.samples_ms))
            kept = samples[np.linspace(0, len(samples) - 1, min(len(samples), _POINTS)).astype(int)]
            color = _RUNS[index % len(_RUNS)]
            jitter = row + 0.16 + generator.uniform(0.0, 0.2, len(kept))
            axes.plot(kept, jitter, ".", color=color, markersize=4, alpha=0.5, markeredgewidth=0)
            low, middle, high = np.percentile(samples, (25, 50, 75))
            axes.plot([samples[0], run.latency_ms.p99 if run.latency_ms else high], [row, row], color=color, lw=1)
            axes.barh(row, max(high - low, limit / 400), left=low, height=0.22, color=color)
            axes.plot([middle, middle], [row - 0.2, row + 0.2], color=_INK, lw=1.6, solid_capstyle="butt")
            axes.annotate(f"{middle:.3g} ms", (middle, row - 0.24), ha="center", va="bottom", fontsize=9, color=_INK)
        axes.set_yticks(range(len(shown)), [_short(run.name) for _, run in shown])
        axes.tick_params(axis="y", colors=_INK, length=0)
        axes.set_ylim(len(shown) - 0.45, -0.6)
        axes.set_xlim(0, limit)
        axes.set_xlabel("milliseconds per run")
        axes.grid(axis="x", linewidth=0.6)

    return _svg(draw, key, height=0.75 + 0.62 * len(shown))


def roofline_plot(runs: Sequence[Run], key: str) -> str:
    """Draw the measured roof of the machine and where each run stands under it."""
    shown = [(index, run) for index, run in enumerate(runs) if run.roofline is not None]
    if not shown:
        return ""

    def draw(axes: Axes) -> None:
        roofs = [run.roofline for _, run in shown if run.roofline]
        gflops, gbytes_s = roofs[0].peak_gflops, roofs[0].peak_gbytes_s
        ridge = gflops / gbytes_s
        intensities = [roof.intensity for roof in roofs]
        low, high = min([ridge, *intensities]) / 6, max([ridge, *intensities]) * 6
        axes.plot([low, ridge, high], [low * gbytes_s, gflops, gflops], color=_INK, lw=1.4)
        labels: dict[str, Any] = {"fontsize": 9, "color": _MUTED, "textcoords": "offset points"}
        axes.annotate(f"{gflops:.0f} GFLOP/s, fp32", (high, gflops), xytext=(0, 3), ha="right", **labels)
        axes.annotate(f"{gbytes_s:.1f} GB/s, copy", (low, low * gbytes_s), xytext=(14, 0), va="top", **labels)
        for index, run in shown:
            roof = run.roofline
            assert roof is not None
            color = _RUNS[index % len(_RUNS)]
            axes.plot(roof.intensity, roof.gflops, "o", color=color, markersize=8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(lambda value, position: "")
        lowest = min([low * gbytes_s, *(roof.gflops for roof in roofs)])
        axes.set_xlim(low, high)
        axes.set_ylim(lowest / 2, max([gflops, *(roof.gflops for roof in roofs)]) * 2)
        axes.set_xlabel("operations per byte")
        axes.set_ylabel("GFLOP/s")
        axes.grid(linewidth=0.6)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)

    return _svg(draw, key, height=3.4, keep_spines=True)


def length_plot(found: Sweep, key: str) -> str:
    """Draw medians against length, and a ring where a series becomes faster than the one compared with."""
    base = next((series for series in found.series if series.name == found.base), None)

    def draw(axes: Axes) -> None:
        for index, series in enumerate(found.series):
            medians = {length: run.latency_ms.p50 for length, run in sorted(series.runs.items()) if run.latency_ms}
            # colors come round again: the second time with broken lines
            style = "-" if index < len(_RUNS) else "--"
            color = _RUNS[index % len(_RUNS)]
            line: dict[str, Any] = {"label": series.name, "color": color, "lw": 1.6, "marker": "o", "markersize": 4}
            axes.plot(list(medians), list(medians.values()), style, **line)
            if base is not None and series.crossover is not None:
                x, y = zip(
                    *sorted((n, run.latency_ms.p50) for n, run in base.runs.items() if run.latency_ms), strict=True
                )
                height = float(np.exp(np.interp(np.log(series.crossover), np.log(x), np.log(y))))
                axes.plot(
                    series.crossover, height, "o", color=_INK, markersize=9, markerfacecolor="none", label="_ring"
                )
        axes.set_xscale("log")
        axes.set_yscale("log")
        _name_lines(axes)
        axes.set_xticks(found.lengths, [f"{length:,}" for length in found.lengths])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:,g}")
        # room at the right for the names
        axes.set_xlim(found.lengths[0] * 0.9, found.lengths[-1] * (found.lengths[-1] / found.lengths[0]) ** 0.45)
        axes.set_xlabel("tokens")
        axes.set_ylabel("milliseconds per run, median")
        axes.grid(linewidth=0.6)

    return _svg(draw, key, height=4.6)


def _name_lines(axes: Axes) -> None:
    """Write its label at the right end of every line that has one, none over another."""
    lines = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    ends = [(np.log10(np.asarray(line.get_ydata(), float)[-1]), line) for line in lines]
    low, high = np.log10(axes.get_ylim())
    above = -np.inf
    for height, line in sorted(ends, key=lambda end: end[0]):
        above = max(height, above + 0.045 * (high - low))
        place = (float(np.asarray(line.get_xdata())[-1]), 10**above)
        text: dict[str, Any] = {"fontsize": 9, "color": line.get_color(), "textcoords": "offset points", "va": "center"}
        axes.annotate(str(line.get_label()), place, xytext=(7, 0), **text)


def _svg(draw: Any, key: str, *, height: float, keep_spines: bool = False) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": key}):
        figure = Figure(figsize=(8.6, height), layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0.0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0.0)
        axes.set_axisbelow(True)
        if not keep_spines:
            axes.spines[:].set_visible(False)
        draw(axes)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return _adopted(stream.getvalue(), key)


def _adopted(svg: str, key: str) -> str:
    """Make a stand-alone SVG part of a page: page colors, ids of its own, as wide as its column."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for stand_in, variable in _VARIABLES.items():
        svg = svg.replace(stand_in, f"var(--{variable})")
    svg = re.sub(r'\bid="', f'id="{key}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{key}-", svg)
    svg = re.sub(r"font: ([0-9.]+px) [^;\"]*", r"font-size: \1", svg)
    for attribute in ("width", "height"):
        svg = re.sub(rf'(<svg[^>]*?) {attribute}="[^"]*"', r"\1", svg, count=1)
    return svg


def _short(name: str) -> str:
    return name if len(name) <= 28 else f"{name[:27]}…"
