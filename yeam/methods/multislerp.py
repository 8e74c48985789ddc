"""Spherical interpolation of several models.

Legend: K sources, T elements of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from yeam.errors import ConfigError
from yeam.methods.derived import joined
from yeam.methods.gram import NOISE, delta_gram, deltas, moved
from yeam.methods.inputs import Inputs
from yeam.methods.registry import PerSource, Whole, merge_method
from yeam.methods.vectors import at_least_float32, vector_norm

if TYPE_CHECKING:
    from torch import Tensor

    from yeam.compiled import Result


def _check(shape: tuple[int, ...], values: Mapping[str, Any]) -> None:
    if values["normalize_weights"] and len(values["weight"]) > 1 and sum(values["weight"]) == 0:
        raise ConfigError("multislerp: the weights sum to 0 and cannot be normalised", "set `normalize_weights: false`")


@merge_method("multislerp", base="optional", needs=Whole, tensors=False, check=_check)
def multislerp(
    inputs: Inputs, *, weight: PerSource[float], normalize_weights: bool = True, eps: Annotated[float, Ge(0)] = 1e-8
) -> Iterator[Result]:
    """Weighted mean direction of the models, or of their differences from a base, times the mean of their norms.

    Each tensor is one vector. The published step in the tangent space at the mean direction μ (Goddard, Multi-SLERP)
    adds Σ w_k (û_k − ⟨û_k, μ⟩ μ), which is zero for this μ: what remains is base + (Σ w_k ‖x_k‖) μ. normalize_weights:
    divide weights by their sum. eps: added to norms; directions whose weighted sum is shorter have no mean, then two
    models are interpolated linearly. Yields [T] in the working dtype. Raises ConfigError for three or more directions that
    cancel, and at plan time for weights that sum to 0.
    """
    if inputs.K == 1:
        for tile in inputs.tiles():
            yield tile.sources_KT[0]
        return
    total = sum(weight) if normalize_weights else 1.0
    if inputs.exact:
        yield from _rounded(joined(inputs), list(weight), normalize_weights, eps)
        return
    share = [w / total for w in weight]
    coefficients = _coefficients(inputs, share, eps)
    yield from moved(inputs, coefficients)


def _coefficients(inputs: Inputs, share: list[float], eps: float) -> list[float]:
    """The result as Σ_k c_k x_k of the models, or of their differences from the base."""
    stats = delta_gram(inputs)
    norms = [stats.norm(k) for k in range(inputs.K)]
    if max(norms) == 0:
        return share
    part = [w / (norm + eps) if norm > 0 else 0.0 for w, norm in zip(share, norms)]
    square = sum(a * b * value for a, row in zip(part, stats.products) for b, value in zip(part, row))
    if not math.isfinite(square):  # NaN or Inf in a source: so is the result
        return [math.nan] * inputs.K
    length = math.sqrt(max(0.0, square))
    if length < eps or square < NOISE * sum(map(abs, share)) ** 2:
        return _straight(inputs, share)
    scale = sum(w * norm for w, norm in zip(share, norms)) / length
    return [scale * p for p in part]


def _straight(inputs: Inputs, share: list[float]) -> list[float]:
    """The straight line, which only two models have."""
    if inputs.K > 2:
        raise ConfigError(
            f"{inputs.name}: the weighted directions of the {inputs.K} models cancel: multislerp has no mean direction",
            "change the weights, or choose another method for this tensor",
        )
    return share


def _rounded(inputs: Inputs, weight: list[float], normalize: bool, eps: float) -> Iterator[Result]:
    """Every operation in the working dtype, as mergekit's: what rounding leaves of the tangent step is part of its result.

    A pass for the norms, one each for the length of μ, the cosines and the length of the tangent step, and one for the
    result.
    """
    import torch

    weight_K = torch.tensor(weight, dtype=inputs.dtype, device=inputs.device)
    if normalize:
        weight_K = weight_K / weight_K.sum()

    def norm(vector: Callable[[Tensor], Tensor]) -> Tensor:
        lengths = [vector_norm(vector(deltas(tile))).square() for tile in inputs.tiles()]
        return torch.stack(lengths).sum(dim=0).sqrt().to(inputs.dtype)

    norm_K = norm(lambda delta_KT: delta_KT)
    if not norm_K.any():
        for tile in inputs.tiles():
            yield tile.sources_KT[0] if tile.base_T is None else tile.base_T
        return

    # float16 knows no 1e-8, and what has no length has no direction
    divisor_K = norm_K + eps
    divisor_K = divisor_K.masked_fill(divisor_K == 0, 1.0)

    def weighted(x_KT: Tensor) -> Tensor:
        return (x_KT * weight_K[:, None]).sum(0)

    def units(delta_KT: Tensor) -> Tensor:
        return delta_KT / divisor_K[:, None]

    def onto(base_T: Tensor | None, result_T: Tensor) -> Tensor:
        return result_T if base_T is None else result_T + base_T

    length = norm(lambda delta_KT: weighted(units(delta_KT)))
    if float(length) < eps or float(length) == 0:
        _straight(inputs, weight)
        for tile in inputs.tiles():
            yield onto(tile.base_T, weighted(deltas(tile)))
        return

    def mean(unit_KT: Tensor) -> Tensor:
        return weighted(unit_KT) / length

    def cosines(delta_KT: Tensor) -> Tensor:
        unit_KT = units(delta_KT)
        return at_least_float32(unit_KT * mean(unit_KT))

    cosine_K = _total(inputs, cosines).to(inputs.dtype)

    def tangent(unit_KT: Tensor) -> Tensor:
        return weighted(unit_KT - cosine_K[:, None] * mean(unit_KT))

    step = norm(lambda delta_KT: tangent(units(delta_KT))) + eps
    ratio = torch.sin(step) / step if float(step) > 0 else torch.ones_like(step)
    scale = (norm_K * weight_K).sum()
    for tile in inputs.tiles():
        unit_KT = units(deltas(tile))
        turned_T = mean(unit_KT) * torch.cos(step) + tangent(unit_KT) * ratio
        yield onto(tile.base_T, turned_T * scale)


def _total(inputs: Inputs, terms: Callable[[Tensor], Tensor]) -> Tensor:
    """The sum over the tensor of terms(delta_KT) [..., T], float32 at least: one pass; float64."""
    import torch

    total = torch.zeros((), dtype=torch.float64, device=inputs.device)
    for tile in inputs.tiles():
        total = total + terms(deltas(tile)).sum(dim=-1)
    return total
