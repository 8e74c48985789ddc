"""The output's config.json: the donor's, made true to the tensors that are written."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any

from yeam.checkpoint.dtypes import DTYPES
from yeam.families import config_updates
from yeam.planning.jobs import Job
from yeam.planning.members import Member
from yeam.planning.outline import Outline
from yeam.recipe import LoadedRecipe

_EXTRA_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers")


def output_config(
    loaded: LoadedRecipe, donor: Member, jobs: Sequence[Job], outlined: Outline
) -> tuple[dict[str, Any] | None, list[str]]:
    """The donor's config with layer counts, per-layer lists, dtype and the tie flag set as the output has them.

    None where the donor has no config.json. Also returns what to tell the user.
    """
    if not donor.checkpoint.config:
        return None, [f"{donor.ref.label} has no config.json, so the output has none"]
    config = copy.deepcopy(donor.checkpoint.config)
    notes: list[str] = []
    if outlined.layers:
        update = config_updates(config, donor.anatomy, outlined.layers, outlined.origins)
        config = update.config
        notes.extend(update.notes)
    if outlined.left_out:
        change(config, dict.fromkeys(_EXTRA_LAYERS, 0))
    _state_dtype(config, jobs, asked=bool(loaded.recipe.out_dtype or loaded.recipe.dtype))
    written = {job.name for job in jobs}
    untied = [name for name in donor.duplicates if name in written]
    if untied:
        notes.append(f"{untied[0]} is written as a tensor of its own: not all models tie it")
        config["tie_word_embeddings"] = False
        change(config, {"tie_word_embeddings": False})
    return config, notes


def _state_dtype(config: dict[str, Any], jobs: Sequence[Job], asked: bool) -> None:
    """The dtype of most of the output's numbers, as `dtype` or `torch_dtype`, whichever the config has.

    A config that names no dtype gets one only if the recipe does; nested configs keep theirs unless the recipe names
    one.
    """
    numbers: Counter[str] = Counter()
    for job in jobs:
        if DTYPES[job.dtype].is_float and job.role not in ("buffer", "scale"):
            numbers[job.dtype] += job.numel
    if not numbers:
        return
    dtype = DTYPES[max(numbers, key=lambda code: numbers[code])]
    # torch computes in no float8, and transformers loads no model as one: bfloat16 holds every number of theirs
    name = "bfloat16" if dtype.itemsize == 1 else dtype.torch_name
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or (["torch_dtype"] if asked else [])
    config.update(dict.fromkeys(keys, name))
    if asked:
        change(config, {"dtype": name, "torch_dtype": name})


def change(config: dict[str, Any], values: dict[str, Any]) -> None:
    """Set the keys where they are given, here and in nested configs."""
    for key, value in config.items():
        if isinstance(value, dict):
            change(value, values)
        elif key in values:
            config[key] = values[key]
