"""PCB-Merging: every element is weighed by its competition inside its own update and with the other updates.

Legend: K sources, T elements of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt, Le, Lt

from yeam.methods.derived import Derived
from yeam.methods.gram import deltas
from yeam.methods.inputs import Inputs, Tile
from yeam.methods.registry import PerSource, Whole, merge_method
from yeam.methods.selection import largest

if TYPE_CHECKING:
    from torch import Tensor

LEAST_DIVISOR = 1e-12
LARGEST_TILE = 1 << 20  # elements, on the CPU: the scores of a tile stand beside it

Span = tuple[float, float]
"""(low, high): the quantiles between which the numbers of a source are clamped."""


def _resident(shape: tuple[int, ...], K: int, values: Mapping[str, Any]) -> int:
    return 4 * K * min(math.prod(shape), LARGEST_TILE)


@merge_method("pcb", base="required", needs=Whole, resident=_resident, exact=False)
def pcb(
    inputs: Inputs,
    *,
    weight: PerSource[float] = (1.0,),
    pcb_ratio: Annotated[float, Gt(0), Le(1)] = 0.1,
    min_ratio: Annotated[float, Ge(0), Lt(1)] = 1e-4,
    max_ratio: Annotated[float, Ge(0), Lt(1)] = 1e-4,
    lambda_: float = 1.2,
) -> Iterator[Tensor]:
    """Updates weighed element by element by how they compete within a model and between models (PCB-Merging, Du et al. 2024).

    With v̄_k the update whose magnitudes are clamped to their quantiles min_ratio and 1 − max_ratio, and |v̄_k|₀₁ these magnitudes
    stretched to [0, 1], the score of an element is exp(K |v̄_k|₀₁²) · tanh(v_k Σ_j v_j): intra-balancing times
    inter-balancing (arXiv:2410.02396, as released). Scores below the quantile 1 − pcb_ratio are raised to it and all are
    stretched to [0, 1], which drops those: s_k. The result is base + λ Σ_k s_k v̄_k / Σ_k s_k.
    The quantiles are exact, of each tensor; the authors take those of the whole model as one vector.
    weight: of each source's update. lambda: strength, 1.2 where the authors start from. Where a source's highest scores are
    equal, the elements that have them count fully, if they are positive. Yields [T], float32 (float64 for float64 inputs).
    """
    spans = _magnitude_spans(inputs, weight, min_ratio, max_ratio)
    scores = _Scores(inputs, weight, spans) if spans is not None else None
    ranges = _score_spans(scores, pcb_ratio) if scores is not None else None
    for tile in inputs.tiles():
        assert tile.base_T is not None
        delta_KT = _weighted(tile, weight)
        if scores is None or ranges is None:  # NaN or Inf (`allow_nan`): the mean, each element on its own
            yield tile.base_T.add_(delta_KT.mean(dim=0), alpha=lambda_)
            continue
        share_KT = scores.of(delta_KT)
        for k, (span, range_) in enumerate(zip(scores.spans, ranges)):
            sign_T = delta_KT[k].sign()
            delta_KT[k].abs_().clamp_(*span).mul_(sign_T)
            _stretch_(share_KT[k], range_)
        mixed_T = delta_KT.mul_(share_KT).sum(dim=0).div_(share_KT.sum(dim=0).clamp_(min=LEAST_DIVISOR))
        yield tile.base_T.add_(mixed_T, alpha=lambda_)


def _weighted(tile: Tile, weight: Sequence[float]) -> Tensor:
    """w_k · (source_k − base) in place of the sources."""
    delta_KT = deltas(tile)
    for delta_T, factor in zip(delta_KT, weight):
        delta_T.mul_(factor)
    return delta_KT


def _stretch_(score_T: Tensor, range_: Span) -> None:
    low, high = range_
    if high > low:
        score_T.clamp_(min=low).sub_(low).div_(high - low)
    else:
        score_T.copy_((score_T >= high) & (score_T > 0))


def _magnitude_spans(inputs: Inputs, weight: Sequence[float], min_ratio: float, max_ratio: float) -> list[Span] | None:
    """The two quantiles of each source's weighted magnitudes, as elements of the sorted ones; None where not all are finite."""
    size = math.prod(inputs.shape)
    extremes = _extremes((deltas(tile).abs_() for tile in inputs.tiles()), inputs.K)
    if extremes is None:
        return None
    low, high = (min(max(int(place), 0), size - 1) for place in (size * min_ratio, size * (1 - max_ratio) - 1))
    cuts = largest(inputs, [[size - low, size - high]] * inputs.K)
    spans = []
    for factor, (least, _), row in zip(weight, extremes, cuts):
        values = [cut.value if place else least for place, cut in zip((low, high), row)]
        spans.append((abs(factor) * values[0], abs(factor) * values[1]))
    return spans


class _Scores(Derived):
    """Inputs whose sources are the scores of the elements, or a part of them, and whose base is zero."""

    def __init__(
        self,
        inputs: Inputs,
        weight: Sequence[float],
        spans: Sequence[Span],
        part: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(inputs, self.of_tile)
        self.K = inputs.K
        self.spans = spans
        self._weight = weight
        self._part = part

    def of(self, delta_KT: Tensor) -> Tensor:
        """The scores of weighted updates, [K, T]."""
        score_KT = delta_KT * delta_KT.sum(dim=0)
        score_KT.tanh_()
        for delta_T, score_T, (low, high) in zip(delta_KT, score_KT, self.spans):
            if high > low:
                unit_T = delta_T.abs().clamp_(low, high).sub_(low).div_(high - low)
                score_T.mul_(unit_T.square_().mul_(len(delta_KT)).exp_())
        return score_KT

    def parts(self, part: Callable[[Tensor], Tensor]) -> _Scores:
        """The same with part(scores) in place of the scores."""
        return _Scores(self._inputs, self._weight, self.spans, part)

    def of_tile(self, tile: Tile) -> Tensor:
        score_KT = self.of(_weighted(tile, self._weight))
        return score_KT if self._part is None else self._part(score_KT)

    def tiles(
        self, start: int = 0, stop: int | None = None, *, base_only: bool = False, unit: int = 1
    ) -> Iterator[Tile]:
        for tile in super().tiles(start, stop, base_only=base_only, unit=unit):
            yield Tile(tile.start, tile.stop, tile.sources_KT[0], tile.base_T)


def _score_spans(scores: _Scores, ratio: float) -> list[Span] | None:
    """From the quantile 1 − ratio of each source's scores, an element of the sorted ones, to the highest; None where not finite.

    Selection ranks magnitudes, so it looks into the positive scores, or into the negative ones where those do not suffice.
    """
    import torch

    size = math.prod(scores.shape)
    signs_2K = torch.zeros(2, scores.K, dtype=torch.int64, device=scores.device)

    def counted() -> Iterator[Tensor]:
        for tile in scores.tiles():
            signs_2K[0] += (tile.sources_KT > 0).sum(dim=1)
            signs_2K[1] += (tile.sources_KT < 0).sum(dim=1)
            yield tile.sources_KT

    extremes = _extremes(counted(), scores.K)
    if extremes is None:
        return None
    place = min(int(size * (1 - ratio)), size - 1)
    above, below = [], []
    for positive, negative in signs_2K.T.tolist():
        above.append(size - place if size > size - place <= positive else 0)
        below.append(place + 1 if 0 < place < negative else 0)
    high = largest(scores.parts(lambda score_KT: score_KT.relu_()), [[count] for count in above])
    low = largest(scores.parts(lambda score_KT: score_KT.neg_().relu_()), [[count] for count in below])
    spans = []
    for k, (least, most) in enumerate(extremes):
        bound = high[k][0].value if above[k] else -low[k][0].value if below[k] else 0.0
        spans.append((bound if place else least, most))
    return spans


def _extremes(values: Iterable[Tensor], K: int) -> list[Span] | None:
    """The least and the largest of each row of [K, T] tensors; None where not all are finite."""
    import torch

    least, most = [math.inf] * K, [-math.inf] * K
    finite = True
    for value_KT in values:
        low_K, high_K = torch.aminmax(value_KT, dim=1)
        finite = finite and bool((low_K.isfinite() & high_K.isfinite()).all())
        least = [min(pair) for pair in zip(least, low_K.tolist())]
        most = [max(pair) for pair in zip(most, high_K.tolist())]
    return list(zip(least, most)) if finite else None
