"""The output's config.json: the donor's, made true to the tensors that are written."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from yeam.checkpoint.dtypes import dtype_named
from yeam.families import config_updates
from yeam.planning.jobs import Job
from yeam.planning.members import Member
from yeam.planning.outline import Outline
from yeam.recipe import LoadedRecipe


def output_config(
    loaded: LoadedRecipe, donor: Member, jobs: Sequence[Job], result: Outline, notes: list[str]
) -> dict[str, Any] | None:
    """The donor's config with layer counts, per-layer lists, dtype and the tie flag set as the output has them.

    None where the donor has no config.json. Adds to `notes` what could not be kept true.
    """
    if not donor.checkpoint.config:
        return None
    config = copy.deepcopy(donor.checkpoint.config)
    if result.layers:
        update = config_updates(config, donor.anatomy, result.layers, result.origins)
        config = update.config
        notes.extend(update.notes)
    chosen = loaded.recipe.out_dtype or loaded.recipe.dtype
    if chosen:
        _set_dtype(config, dtype_named(chosen).torch_name)
    written = {job.name for job in jobs}
    untied = [name for name in donor.duplicates if name in written]
    if untied:
        notes.append(f"{untied[0]} is written as a tensor of its own: not all models tie it")
        _set_untied(config)
    return config


def _set_dtype(config: dict[str, Any], name: str) -> None:
    """`dtype` as transformers 5 writes it or `torch_dtype` as older ones do, whichever is there, here and in nested configs."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    for key in keys:
        config[key] = name
    for value in config.values():
        if isinstance(value, dict) and ("dtype" in value or "torch_dtype" in value):
            _set_dtype(value, name)


def _set_untied(config: dict[str, Any]) -> None:
    config["tie_word_embeddings"] = False
    for value in config.values():
        if isinstance(value, dict) and "tie_word_embeddings" in value:
            value["tie_word_embeddings"] = False
