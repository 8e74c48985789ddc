"""A picture of a search: the losses of the trials in their order, and against every value that was searched for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from yeam.recipe.settings import Scalar
from yeam.report.files import save_picture
from yeam.searching.space import Dimension
from yeam.searching.trial import Trial

_MOST = 15  # values with a panel of their own; the first ones of the recipe


def draw(path: Path, title: str, dimensions: Sequence[Dimension], trials: Sequence[Trial]) -> None:
    """Write the picture. Raises OutputError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = dimensions[:_MOST]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    drawing = Figure(figsize=(max(6.4, 3.2 * columns), 2.8 + 2.3 * rows), layout="constrained")
    FigureCanvasAgg(drawing)
    grid = drawing.add_gridspec(1 + rows, columns, height_ratios=[1.3, *[1.0] * rows])
    _draw_course(drawing.add_subplot(grid[0, :]), title, trials)
    done = [trial for trial in trials if trial.loss is not None]
    for number, dimension in enumerate(shown):
        axes: Any = drawing.add_subplot(grid[1 + number // columns, number % columns])
        found = [(trial.values[number], trial.loss) for trial in done]
        _draw_values(axes, dimension, found)
        if number % columns == 0:
            axes.set_ylabel("tuning loss", fontsize=8)
    save_picture(drawing, path)


def _draw_course(axes: Any, title: str, trials: Sequence[Trial]) -> None:
    done = [trial for trial in trials if trial.measured is not None]
    numbers = [trial.number for trial in done]
    tuning = [trial.measured.tuning.value for trial in done if trial.measured is not None]
    held_out = [trial.measured.held_out.value for trial in done if trial.measured is not None]
    least = [min(tuning[: count + 1]) for count in range(len(tuning))]
    axes.plot(numbers, tuning, ".", color="C0", label="tuning part")
    axes.plot(numbers, held_out, ".", color="C1", label="held-out part")
    axes.step(numbers, least, where="post", color="C0", linewidth=1, label="best so far")
    axes.axhline(tuning[0], color="0.6", linewidth=0.8, linestyle="--", label="baseline")
    # one bad trial must not flatten all others
    together = sorted([*tuning, *held_out])
    low, high = together[0], together[min(len(together) - 1, int(0.95 * len(together)))]
    if high > low:
        axes.set_ylim(low - 0.08 * (high - low), high + 0.15 * (high - low))
    axes.set_xlabel("trial", fontsize=8)
    axes.set_ylabel("nats a token", fontsize=8)
    axes.set_title(_literal(title), fontsize=9)
    axes.legend(frameon=False, fontsize=7, ncols=4)
    axes.tick_params(labelsize=7)


def _draw_values(axes: Any, dimension: Dimension, found: Sequence[tuple[Scalar, float | None]]) -> None:
    choices = dimension.range.choices
    values: list[Any] = [value for value, _ in found]
    if choices:
        values = [
            next(n for n, choice in enumerate(choices) if choice == v and type(choice) is type(v)) for v in values
        ]
        axes.set_xticks(range(len(choices)), [_literal(str(choice)) for choice in choices])
    elif dimension.range.log:
        axes.set_xscale("log")
    axes.scatter(values, [loss for _, loss in found], c=range(len(found)), cmap="viridis", s=12)
    axes.set_title(_literal(dimension.name), fontsize=7)
    axes.tick_params(labelsize=7)


def _literal(text: str) -> str:
    """Names may hold `$`, which would be mathematics, and be long."""
    short = text if len(text) <= 60 else "…" + text[-59:]
    return short.replace("$", r"\$")
