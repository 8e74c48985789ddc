"""What mergekit's recipes say in vain: parameters that it knows, where its method does not read them. It ignores them, and so do we.

Published recipes have many (`int8_mask` for `linear`, `density` for `slerp`, `lambda` below a model), and they have to run as they are.
What mergekit does not know either is a misspelling, and an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from yeam.methods import Method
from yeam.recipe import KeyPath, LoadedRecipe, MergeRecipe, ModuleEntry, mentioned_parameters

METHODS = frozenset((
    "linear", "slerp", "nuslerp", "multislerp", "karcher", "task_arithmetic", "ties", "dare_linear", "dare_ties",
    "breadcrumbs", "breadcrumbs_ties", "della", "della_linear", "sce", "ram", "ramplus_tl", "model_stock", "nearswap",
    "arcee_fusion", "passthrough",
))  # fmt: skip
PARAMETERS = frozenset((
    "weight", "density", "gamma", "epsilon", "normalize", "rescale", "lambda", "int8_mask", "t", "scale", "nuslerp_flatten",
    "nuslerp_row_wise", "normalize_weights", "eps", "max_iter", "tol", "select_topk", "r", "alpha", "filter_wise",
    "embed_slerp", "consensus_method",  # of old versions, and still in recipes
))  # fmt: skip
KEYS = frozenset(("dtype", "out_dtype"))
"""Keys of a recipe that people write among the parameters."""


def tolerated(loaded: LoadedRecipe, method: Method) -> tuple[LoadedRecipe, list[str]]:
    """The recipe without what mergekit ignores, and a note for each name that was left out."""
    places: dict[tuple[str, str], list[str]] = {}
    recipe = loaded.recipe
    for mention in mentioned_parameters(recipe) if method.name in METHODS else ():
        parameter = method.parameters.get(mention.name)
        if parameter is None and mention.name in PARAMETERS:
            why = f"method {method.name} has no such parameter"
        elif parameter is None and mention.name in KEYS:
            why = "it is no parameter, and belongs at the top level of the recipe"
        elif parameter is not None and mention.is_per_source and not parameter.per_source:
            why = f"method {method.name} does not read it from a model, but from the recipe's own `parameters:`"
        else:
            continue
        places.setdefault((mention.name, why), []).append(loaded.locate(mention.path))
        recipe = _without(recipe, mention.path)
    why = "neither mergekit nor YeAM gives it a meaning"
    for path in _residual_weights(recipe):
        places.setdefault(("residual_weight", why), []).append(loaded.locate(path))
    notes = [f"{where[0]}: {name!r} is ignored, as in mergekit: {why}" for (name, why), where in places.items()]
    return replace(loaded, recipe=recipe) if places else loaded, notes


def _residual_weights(recipe: MergeRecipe) -> Iterator[KeyPath]:
    """Where the key of a slice stands that mergekit's schema has and its code does not read."""
    blocks: list[tuple[KeyPath, MergeRecipe | ModuleEntry]] = [((), recipe)]
    blocks += [(("modules", name), module) for name, module in (recipe.modules or {}).items()]
    for path, block in blocks:
        for number, piece in enumerate(block.slices or ()):
            if piece.residual_weight is not None:
                yield (*path, "slices", number, "residual_weight")


def _without(block: Any, path: KeyPath) -> Any:
    """A copy of the block in which what lies at the path is missing; mappings only lose keys."""
    key, *rest = path
    if isinstance(block, Mapping):
        kept = {name: value for name, value in block.items() if rest or name != key}
        return {**kept, key: _without(block[key], tuple(rest))} if rest else kept
    if isinstance(block, tuple):
        return (*block[: int(key)], _without(block[int(key)], tuple(rest)), *block[int(key) + 1 :])
    return block.model_copy(update={str(key): _without(getattr(block, str(key)), tuple(rest))})
