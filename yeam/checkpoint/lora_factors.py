"""The two factors of a LoRA delta, laid out like the base tensor that they change.

Shape suffixes: E experts, R rows and C columns of the base tensor as it is stored, K rank of the factors,
O outputs and I inputs of the layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from yeam.checkpoint.base import TensorInfo
from yeam.errors import CheckpointError

if TYPE_CHECKING:
    import torch

# The projections that a fused expert parameter stacks row-wise, by the names that checkpoints per expert give them.
FUSED_EXPERTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}


@dataclass(frozen=True)
class Factors:
    """Which adapter tensors make a delta, and how: `delta = scale * lhs @ rhs`, per expert.

    `transposed`: the base stores (inputs, outputs). `experts`: how many the factors hold, side by side. For a base that
    stores its experts one by one, `expert` picks one and `rows` its part [begin, end) of the fused rows.
    """

    a: str
    b: str
    scale: float
    transposed: bool = False
    experts: int = 1
    expert: int | None = None
    rows: tuple[int, int] | None = None

    def lay_out(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(lhs_ERK, rhs_EKC) from PEFT's lora_A (E*K, I) and lora_B (O, K*E); a convolution's A has more dimensions."""
        inputs, outputs = a.numel() // a.shape[0], b.shape[0]
        a_EKI = a.reshape(self.experts, -1, inputs)
        b_EOK = b.reshape(outputs, -1, self.experts).permute(2, 0, 1)
        if self.transposed:
            lhs_ERK, rhs_EKC = a_EKI.transpose(1, 2), b_EOK.transpose(1, 2)
        else:
            lhs_ERK, rhs_EKC = b_EOK, a_EKI
        if self.expert is not None:
            lhs_ERK, rhs_EKC = lhs_ERK[self.expert, None], rhs_EKC[self.expert, None]
        if self.rows is not None:
            lhs_ERK = lhs_ERK[:, self.rows[0] : self.rows[1]]
        return lhs_ERK, rhs_EKC


@dataclass(frozen=True)
class Wrapper:
    """One PEFT wrapper of an expert parameter: the key of its module and the infos of its lora_A and lora_B."""

    key: str
    a: TensorInfo
    b: TensorInfo


@dataclass(frozen=True)
class Parameter:
    """An expert parameter by its fused `shape` (E, R, C) and the `pieces` of the base: (name, expert, rows) each."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[tuple[str, int | None, tuple[int, int] | None], ...]


def find_parameter(tensors: Mapping[str, TensorInfo], stem: str, leaf: str) -> Parameter | None:
    """The expert parameter `stem.leaf` of a base, stored fused or expert by expert; None where it has neither."""
    whole = tensors.get(f"{stem}.{leaf}")
    if whole is not None:
        return Parameter(leaf, whole.shape, ((whole.name, None, None),)) if len(whole.shape) == 3 else None
    for parts in FUSED_EXPERTS.get(leaf, ()):
        pieces: list[tuple[str, int | None, tuple[int, int] | None]] = []
        shapes = []
        for expert in itertools.count():
            infos = [tensors.get(f"{stem}.{expert}.{part}.weight") for part in parts]
            if any(info is None or len(info.shape) != 2 for info in infos):
                break
            row = 0
            for info in infos:
                assert info is not None
                pieces.append((info.name, expert, (row, row + info.shape[0])))
                row += info.shape[0]
            shapes.append((row, *{info.shape[1] for info in infos if info is not None}))
        if shapes and len(set(shapes)) == 1 and len(shapes[0]) == 2:
            return Parameter(leaf, (len(shapes), *shapes[0]), tuple(pieces))
    return None


def assign(wrappers: list[Wrapper], parameters: list[Parameter], where: str) -> list[tuple[Wrapper, Parameter, bool]]:
    """Which wrapper belongs to which parameter, and whether its factors are `transposed`.

    PEFT's names do not say (its wrappers are nested and lie in the module's order), but the shapes do, together with
    the fact that all parameters of a module have one orientation. Raises CheckpointError where they leave a choice.
    """
    fits = [
        [(w, p, transposed) for w, p in zip(wrappers, chosen)]
        for chosen in itertools.permutations(parameters, len(wrappers))
        for transposed in (False, True)
        if all(_fits(w, p, transposed) for w, p in zip(wrappers, chosen))
    ]
    if len(fits) != 1:
        shapes = [f"{w.a.name} {list(w.a.shape)}, {w.b.name} {list(w.b.shape)}" for w in wrappers]
        found = ", ".join(f"{p.name} {list(p.shape)}" for p in parameters) or "none"
        raise CheckpointError(
            f"{where}: {'no' if not fits else 'more than one'} way to apply {'; '.join(shapes)} to the expert "
            f"parameters of the base: {found}",
            "merge the adapter into its base with PEFT, and give YeAM the result",
        )
    return fits[0]


def _fits(wrapper: Wrapper, parameter: Parameter, transposed: bool) -> bool:
    experts, rows, columns = parameter.shape
    inputs, outputs = (rows, columns) if transposed else (columns, rows)
    a, b = wrapper.a.shape, wrapper.b.shape
    return len(a) == len(b) == 2 and a[0] == b[1] and a[0] % experts == 0 and (a[1], b[0]) == (inputs, outputs)
