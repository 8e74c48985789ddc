"""Hard cases, made from the experts of one regime: what a merge should survive.

duplicate   a source given twice
reversed    two sources and the negative of a third's update
norms       a source whose update is five times as long as the other's
eight       all eight sources
tiny        updates scaled to a length of 0.001 of the base, as preference tuning makes them, and rounded to bf16
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from quality.cells import Cell
from quality.family import Family
from quality.rows import EXPERTS

CASES = ("duplicate", "reversed", "norms", "eight", "tiny")
PAIR = ("code", "russian")
THIRD = "arithmetic"
TINY = 1e-3  # length of an update relative to the base's
LEAST = 1e-4  # nats: so small an update gains little


def cells(family: Family, regime: str, names: tuple[str, ...]) -> list[Cell]:
    """The cells of the named cases."""
    return [_cell(family, regime, name) for name in names]


def _cell(family: Family, regime: str, name: str) -> Cell:
    first, second = (family.expert(regime, domain) for domain in PAIR)
    own = dict(zip(PAIR, (first, second)))
    least = None
    if name == "duplicate":
        sources = (first, first, second)
    elif name == "reversed":
        sources = (first, second, scaled(family, family.expert(regime, THIRD), "reversed", -1.0))
    elif name == "norms":
        short = scaled(family, second, "fifth", 0.2)
        sources, own = (first, short), {**own, PAIR[1]: short}
    elif name == "eight":
        own = {domain: family.expert(regime, domain) for domain in EXPERTS}
        sources = tuple(own.values())
    elif name == "tiny":
        own = {d: scaled(family, f, "tiny", TINY / displacement(family.base, f)) for d, f in own.items()}
        sources, least = tuple(own.values()), LEAST
    else:
        raise SystemExit(f"unknown stress case {name}; known are {', '.join(CASES)}")
    return Cell(family.spec.name, family.seed, regime, name, tuple(sources), own, least)


def scaled(family: Family, expert: Path, label: str, factor: float) -> Path:
    """A model base + factor · (expert - base) in bf16, beside the expert."""
    path = expert.with_name(f"{expert.name}-{label}")
    if not (path / "config.json").is_file():
        base, tensors = (load_file(folder / "model.safetensors") for folder in (family.base, expert))
        made = {n: torch.lerp(base[n].float(), t.float(), factor).to(torch.bfloat16) for n, t in tensors.items()}
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.mkdir()
        save_file(made, partial / "model.safetensors", {"format": "pt"})
        for file in expert.iterdir():
            if file.suffix != ".safetensors":
                (partial / file.name).write_bytes(file.read_bytes())
        partial.replace(path)
    return path


def displacement(base: Path, expert: Path) -> float:
    """Length of an expert's update relative to the base, over all weights."""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (base, expert))
    moved = sum(float((theirs[n].float() - t.float()).square().sum()) for n, t in ours.items())
    return math.sqrt(moved / sum(float(t.float().square().sum()) for t in ours.values()))
