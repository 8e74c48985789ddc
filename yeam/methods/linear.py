"""The weighted average of the models.

Legend: K sources, T elements of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from yeam.errors import ConfigError
from yeam.methods.gram import combined
from yeam.methods.inputs import Inputs
from yeam.methods.registry import PerSource, Whole, merge_method

if TYPE_CHECKING:
    from yeam.compiled import Result


def _check(shape: tuple[int, ...], values: Mapping[str, Any]) -> None:
    if values["normalize"] and sum(values["weight"]) == 0:
        raise ConfigError("linear: the weights sum to 0 and cannot be normalised", "set `normalize: false`")


@merge_method("linear", base="unused", needs=Whole, tensors=False, elementwise=True, check=_check)
def linear(inputs: Inputs, *, weight: PerSource[float], normalize: bool = True) -> Iterator[Result]:
    """Weighted average of the models (model soup, Wortsman et al. 2022).

    Yields Σ_k weight_k · x_k [T], divided by Σ_k weight_k when `normalize`. Under `math: exact`
    every operation rounds to the working dtype, as mergekit's does; otherwise the weights are divided first.
    Weights that sum to zero cannot be normalised: ConfigError at plan time.
    """
    if not inputs.exact:
        total = sum(weight) if normalize else 1.0
        yield from combined(inputs, [w / total for w in weight])
        return
    import torch

    weight_K1 = torch.tensor(weight, dtype=inputs.dtype, device=inputs.device)[:, None]
    for tile in inputs.tiles():
        result_T = tile.sources_KT.mul_(weight_K1).sum(dim=0)
        yield result_T.div_(weight_K1.sum()) if normalize else result_T
