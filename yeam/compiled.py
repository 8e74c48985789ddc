"""Which tensors the compiled loops take: `yeam.geometry.kernels` and `yeam.methods.kernels` serve them, torch serves all others."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def is_compiled(x: Tensor) -> bool:
    """Whether it is float32 on the CPU."""
    import torch

    return x.device.type == "cpu" and x.dtype == torch.float32
