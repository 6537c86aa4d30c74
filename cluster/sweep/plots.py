"""Plots of a sweep: each parameter against CIDEr, parallel coordinates, CIDEr over the epochs."""

import io
import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cluster.sweep.results import SettingResult

COLOURS = "viridis"
#: Of an axis' length.
TICK_DISTANCE = 0.08


def plots(ranked: Sequence["SettingResult"], *, params: Sequence[str]) -> dict[str, bytes]:
    """PNG files by name, of the settings that have a result; none where there is no such setting."""
    scored = [setting for setting in ranked if not math.isnan(setting.mean)]
    if not scored:
        return {}
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    figures = {f"{name}.png": _against(scored, name) for name in params}
    figures["epochs.png"] = _epochs(scored)
    if len(params) > 1:
        figures["parallel_coordinates.png"] = _parallel(scored, params)
    return {name: _png(figure) for name, figure in figures.items()}


def _figure(width: float, height: float) -> tuple["Figure", "Axes"]:
    # Not pyplot: it keeps figures and chooses a window system.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _against(scored: Sequence["SettingResult"], name: str) -> "Figure":
    """CIDEr of every setting over one parameter; bars are the standard deviation over seeds."""
    figure, axes = _figure(5, 3.5)
    values = [setting.settings[name] for setting in scored]
    positions, scale = axis_positions(values)
    axes.errorbar(
        positions,
        [setting.mean for setting in scored],
        yerr=None if any(math.isnan(setting.spread) for setting in scored) else [setting.spread for setting in scored],
        fmt="o",
        capsize=3,
        alpha=0.8,
    )
    _scale(axes, values, positions, scale)
    axes.set_xlabel(name)
    axes.set_ylabel("CIDEr")
    axes.grid(alpha=0.3)
    return figure


def _parallel(scored: Sequence["SettingResult"], params: Sequence[str]) -> "Figure":
    """One axis a parameter and CIDEr last, one line a setting, the best on top."""
    from matplotlib import colormaps

    figure, axes = _figure(2 + 1.4 * len(params), 4.2)
    columns: list[list[float]] = []
    for name in params:
        values = [setting.settings[name] for setting in scored]
        positions, scale = axis_positions(values)
        if scale == "log":
            positions = [math.log(position) for position in positions]
        columns.append(to_unit(positions))
        for value, place in {_label(value): place for value, place in _ends(values, columns[-1])}.items():
            axes.annotate(value, (len(columns) - 1, place), textcoords="offset points", xytext=(5, 2), fontsize=8)
    means = [setting.mean for setting in scored]
    columns.append(to_unit(means))
    for mean, place in _ends(means, columns[-1]):
        axes.annotate(f"{mean:.3f}", (len(params), place), textcoords="offset points", xytext=(5, 2), fontsize=8)
    colours = colormaps[COLOURS]
    for row in reversed(range(len(scored))):
        places = [column[row] for column in columns]
        axes.plot(
            range(len(columns)), places, color=colours(columns[-1][row]), alpha=0.8, linewidth=2 if row == 0 else 1
        )
    axes.set_xticks(range(len(columns)), [*params, "CIDEr"], rotation=20, ha="right")
    axes.set_yticks([])
    axes.set_xlim(-0.2, len(columns) - 0.4)
    axes.grid(axis="x")
    return figure


def _epochs(scored: Sequence["SettingResult"]) -> "Figure":
    """CIDEr over the epochs of every trial, the best setting's in colour."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(5, 3.5)
    for rank in reversed(range(len(scored))):
        for trial in scored[rank].trials:
            rows = [row for row in trial.history if not row.get("reason")]
            style: dict[str, Any] = {"color": "C3", "linewidth": 2} if rank == 0 else {"color": "0.6", "linewidth": 1}
            axes.plot([row["epoch"] for row in rows], [row["CIDEr"] for row in rows], marker=".", **style)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch (red: best setting)")
    axes.set_ylabel("CIDEr")
    axes.grid(alpha=0.3)
    return figure


def axis_positions(values: Sequence[Any]) -> tuple[list[float], str]:
    """Where values lie on an axis, and its kind: log where they span decades, names where they are no numbers."""
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        names = sorted({str(value) for value in values})
        return [float(names.index(str(value))) for value in values], "names"
    numbers = [float(value) for value in values]
    return numbers, "log" if min(numbers) > 0 and max(numbers) / min(numbers) >= 20 else "linear"


def _scale(axes: "Axes", values: Sequence[Any], positions: Sequence[float], scale: str) -> None:
    if scale == "log":
        axes.set_xscale("log")
    elif scale == "names":
        places = dict(zip(map(str, values), positions, strict=True))
        axes.set_xticks(list(places.values()), list(places))
    elif min(np.diff(ticks := sorted(set(positions))), default=1.0) >= TICK_DISTANCE * (ticks[-1] - ticks[0]):
        axes.set_xticks(ticks)  # the values themselves, where they leave each other room


def to_unit(numbers: Sequence[float]) -> list[float]:
    low, high = min(numbers), max(numbers)
    return [0.5 if high == low else (number - low) / (high - low) for number in numbers]


def _ends(values: Sequence[Any], places: Sequence[float]) -> list[tuple[Any, float]]:
    """The values at the lower and the upper end of an axis."""
    pairs = sorted(zip(places, range(len(values)), strict=True))
    return [(values[index], place) for place, index in (pairs[0], pairs[-1])]


def _label(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
