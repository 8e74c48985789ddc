"""Pictures and pages on disk: HTML by ourselves, everything else by matplotlib."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yeam.errors import OutputError, UserError
from yeam.report.maps import HeatMap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PAGES = (".html", ".htm")
_PICTURES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")


def check_targets(paths: Sequence[Path]) -> None:
    """Raise UserError, before any work, for a file that could not be written in the end."""
    for path in paths:
        suffix = path.suffix.lower()
        if suffix not in (*_PAGES, *_PICTURES):
            raise UserError(
                f"{path}: is no picture that can be drawn", f"end the name with {', '.join((*_PICTURES, *_PAGES))}"
            )
        if not path.parent.is_dir():
            raise OutputError(
                f"{path}: there is no folder {path.parent}", "make the folder first, or choose another place"
            )
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise OutputError(f"{path} cannot be written", "choose another place")
        if suffix in _PICTURES and find_spec("matplotlib") is None:
            raise UserError(
                f"{path.name} needs matplotlib, which is not installed",
                "pip install 'yeam[plots]', or end the name with .html, which needs nothing",
            )


def check_picture(path: Path) -> None:
    """As `check_targets`, for what is drawn as a picture only."""
    check_targets([path])
    if path.suffix.lower() in _PAGES:
        raise UserError(f"{path}: this is drawn as a picture, not as a page", "end the name with .png, .svg or .pdf")


def save_picture(drawing: Figure, path: Path) -> None:
    """Write a figure, the same bytes whenever it is drawn. Raises OutputError."""
    try:
        drawing.savefig(path, dpi=130, metadata={"Date": None} if path.suffix.lower() in (".svg", ".pdf") else None)
    except OSError as error:
        raise _failed(path, error) from error


def write_target(path: Path, title: str, page: Callable[[], str], pictures: Callable[[], Sequence[HeatMap]]) -> None:
    """Write the page, or the pictures as one figure, as the file's suffix says. Raises OutputError."""
    if path.suffix.lower() in _PAGES:
        write_text(path, page())
        return
    drawn = pictures()
    if not drawn:
        raise UserError(f"{path}: there is nothing to draw", "write a page (.html) instead")
    save_picture(_drawn(title, drawn), path)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises OutputError."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise _failed(path, error) from error


def _failed(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{path} cannot be written: {error.strerror or error}",
        "free some space, check the folder's permissions, or choose another place",
    )


def _drawn(title: str, pictures: Sequence[HeatMap]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    widest = max(len(picture.layers) for picture in pictures)
    tallest = max(len(picture.roles) for picture in pictures)
    columns = 1 if len(pictures) == 1 else 2
    rows = -(-len(pictures) // columns)
    size = (columns * max(4.5, 1.8 + 0.17 * widest), rows * max(2.6, 1.2 + 0.22 * tallest))
    drawing = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(drawing)
    drawing.suptitle(_literal(title))
    axes: Any = drawing.subplots(rows, columns, squeeze=False)
    for ax in axes.flat[len(pictures) :]:
        ax.set_axis_off()
    for ax, picture in zip(axes.flat, pictures):
        low, colours = (-picture.top, "RdBu_r") if picture.kind == "signed" else (0.0, "viridis")
        grid = [[picture.values.get((role, n), float("nan")) for n in picture.layers] for role in picture.roles]
        image = ax.imshow(grid, vmin=low, vmax=picture.top, cmap=colours, aspect="auto", interpolation="nearest")
        every = max(1, -(-widest // 16))
        at = [i for i, n in enumerate(picture.layers) if n is None or n % every == 0]
        ax.set_xticks(at, ["–" if picture.layers[i] is None else str(picture.layers[i]) for i in at], fontsize=7)
        ax.set_yticks(range(len(picture.roles)), picture.roles, fontsize=8)
        ax.set_title(picture.title, fontsize=9)
        ax.set_xlabel("layer", fontsize=8)
        drawing.colorbar(image, ax=ax).ax.tick_params(labelsize=7)
    return drawing


def _literal(text: str) -> str:
    """A model's name may hold `$`, which would be mathematics, and be long."""
    short = text if len(text) <= 120 else text[:119] + "…"
    return short.replace("$", r"\$")
