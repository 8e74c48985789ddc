"""The weighted average of the models.

Legend: K sources, T elements of a tile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from yeam.errors import ConfigError
from yeam.methods.registry import PerSource, merge_method

if TYPE_CHECKING:
    from torch import Tensor


@merge_method("linear", base="unused")
def linear(x_KT: Tensor, *, weight: PerSource[float], normalize: bool = True) -> Tensor:
    """Weighted average of the models (model soup, Wortsman et al. 2022).

    x_KT: [K, T]. Returns Σ_k weight_k · x_k, divided by Σ_k weight_k when `normalize`. In half precision (`math: exact`) every
    operation rounds to that dtype, as mergekit's does; in float32 the weights are divided first.
    Raises ConfigError when the weights to normalise by sum to zero.
    """
    import torch

    if normalize and sum(weight) == 0:
        raise ConfigError("linear: the weights sum to 0 and cannot be normalised", "set `normalize: false`")
    if x_KT.dtype in (torch.float32, torch.float64):
        total = sum(weight) if normalize else 1.0
        result_T = x_KT[0].mul_(weight[0] / total)  # the tile is ours to change
        for k in range(1, len(weight)):
            result_T.add_(x_KT[k], alpha=weight[k] / total)
        return result_T
    weight_K1 = torch.tensor(weight, dtype=x_KT.dtype, device=x_KT.device)[:, None]
    result_T = (weight_K1 * x_KT).sum(dim=0)
    return result_T / weight_K1.sum() if normalize else result_T
