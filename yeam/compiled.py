"""Compiled loops (numba) and the tensors that they take: `yeam.geometry.kernels`, `yeam.methods.kernels`,
`yeam.methods.rank_kernels`, `yeam.stored`; torch serves all others.

A loop is compiled when it is first called, some ten seconds for all of them, and kept for later processes beside the package or in the
user's cache folder; where neither may be written, every process compiles for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from yeam.alone import import_numba

if TYPE_CHECKING:
    from torch import Tensor


KINDS = {"BF16": 0, "F16": 1, "F32": 2}
"""How the loops of `yeam.stored` know a storage type, by its name in a safetensors header."""


Array: TypeAlias = "np.ndarray[Any, Any]"


Values: TypeAlias = "Tensor | Array"
"""Numbers of a method: a tensor, or float32 in an array where compiled loops do all the work, so that torch is not even imported."""


class Deferred:
    """Elements of an output that a loop has yet to make, straight into the words of a file's buffer: no float32 copy of a tile goes
    through memory. To be taken before the next ones are asked for.

    loop(out_S, to): writes them as `yeam.stored.put` does, and returns the sum of their squares; may be called again.
    """

    def __init__(self, size: int, loop: Callable[[Array, int], float]) -> None:
        self.shape = (size,)
        self._loop = loop

    def store(self, kind: int, word_S: Array) -> float:
        """As `yeam.stored.narrow`, of these elements."""
        if kind == KINDS["F16"]:
            from yeam.stored import narrow

            return narrow(self.values(), kind, word_S)
        return float(self._loop(word_S, kind))

    def values(self) -> Array:
        """The elements, float32 [T]."""
        found: Array = np.empty(self.shape, np.float32)
        self._loop(found.view(np.uint16), KINDS["F32"])
        return found


Result: TypeAlias = "Tensor | Array | Deferred"
"""What a method yields."""


def settled(x: Result) -> Values:
    """The numbers themselves."""
    return x.values() if isinstance(x, Deferred) else x


def is_compiled(x: Values) -> bool:
    """Whether the loops take it: an array, or float32 on the CPU."""
    if isinstance(x, np.ndarray):
        return True
    import torch

    return bool(x.device.type == "cpu" and x.dtype == torch.float32)


def array(x: Values) -> Array:
    """What `is_compiled` as the loops take it, the same memory."""
    return x if isinstance(x, np.ndarray) else x.numpy()


def tensor(x: Values) -> Tensor:
    """As a tensor, the same memory."""
    if not isinstance(x, np.ndarray):
        return x
    import torch

    return torch.from_numpy(x)


def clone(x: Values) -> Values:
    """In memory of its own."""
    return x.copy() if isinstance(x, np.ndarray) else x.clone()


def words(rows_VT: Tensor) -> Array:
    """Contiguous rows [V, T] of float32, bfloat16 or float16 on the CPU as the loops of `yeam.stored` take them: uint16 [V, S]."""
    import torch

    found: Array = rows_VT.view(torch.int16).numpy().view(np.uint16)
    return found


def loops(*, free: frozenset[str] = frozenset()) -> Callable[[Callable[..., Any]], Any]:
    """A decorator: the function compiled, without the interpreter's lock, errors as numpy has them (a division by zero is Inf).

    free: LLVM's fast-math flags, the liberties that rounding allows; none by default, so that results are those of the source's order.
    """
    import_numba()
    from numba import njit

    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": set(free) or False}

    def compiled(function: Callable[..., Any]) -> Any:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # no folder for the cache may be written
            return njit(**options)(function)

    return compiled
