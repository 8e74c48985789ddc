"""Compiled loops (numba) and the tensors that they take: `yeam.geometry.kernels`, `yeam.methods.kernels`,
`yeam.stored`; torch serves all others.

A loop is compiled when it is first called, some ten seconds for all of them, and kept for later processes beside the package or in the
user's cache folder; where neither may be written, every process compiles for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


KINDS = {"BF16": 0, "F16": 1, "F32": 2}
"""How the loops of `yeam.stored` know a storage type, by its name in a safetensors header."""


def is_compiled(x: Tensor) -> bool:
    """Whether it is float32 on the CPU."""
    import torch

    return x.device.type == "cpu" and x.dtype == torch.float32


def words(rows_VT: Tensor) -> np.ndarray[Any, Any]:
    """Contiguous rows [V, T] of float32, bfloat16 or float16 on the CPU as the loops of `yeam.stored` take them: uint16 [V, S]."""
    import numpy as np
    import torch

    found: np.ndarray[Any, Any] = rows_VT.view(torch.int16).numpy().view(np.uint16)
    return found


def loops(*, free: frozenset[str] = frozenset()) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: the function compiled, without the interpreter's lock, errors as numpy has them (a division by zero is Inf).

    free: LLVM's fast-math flags, the liberties that rounding allows; none by default, so that results are those of the source's order.
    """
    from numba import njit

    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": set(free) or False}

    def compiled(function: Callable[..., Any]) -> Any:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # no folder for the cache may be written
            return njit(**options)(function)

    return compiled
