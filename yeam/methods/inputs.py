"""What a method sees of one output tensor: tiles of the sources and of the base, read as often as it asks.

Legend: K sources, T elements of a tile, V and S as in `yeam.stored`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from yeam.compiled import Array


@dataclass
class Tile:
    """Elements [start, stop) of the flattened tensor: sources_KT [K, T] and base_T [T] (None without a base), in the working
    dtype on the device. A method may overwrite them, and the memory is used again for the next tile: keep copies, not views."""

    start: int
    stop: int
    sources_KT: Tensor
    base_T: Tensor | None


@dataclass
class StoredTile:
    """Elements [start, stop) as they are stored: word_VS [V, S], uint16, V sources and then the base where there is one, for the loops
    of `yeam.stored`; `kind` as there. The memory is used again for the next tile."""

    start: int
    stop: int
    word_VS: Array
    kind: int


class Inputs(Protocol):
    """The inputs of one output tensor, as the engine serves them.

    name, role: of the output tensor. depth: layers of its model. transposed: whether that stores the matrix as [in, out]. shape: of the
    tensor. K: number of sources. has_base: whether tiles carry the base. device and dtype: of the tiles (float32; float64 where an
    input is stored so; the storage dtype under `math: exact`). work: that dtype as a safetensors header names it; whoever asks for
    device or dtype imports torch. exact: whether every operation is to round to that dtype in mergekit's order, as it always does in
    half precision. rounding: for each source, the mean square error that its storage dtype has left in it, as a share of its mean
    square (`DType.rounding`). companions: further tensors of the same sources and base that a plugin gave the job, by name.
    """

    name: str
    role: str
    depth: int
    transposed: bool
    shape: tuple[int, ...]
    K: int
    has_base: bool
    work: str
    exact: bool
    rounding: tuple[float, ...]

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def companions(self) -> Mapping[str, Inputs]:
        """The job's further tensors."""

    def tiles(
        self, start: int = 0, stop: int | None = None, *, base_only: bool = False, unit: int = 1
    ) -> Iterator[Tile]:
        """The tiles of elements [start, stop) in order; may be called again for another pass.

        With `base_only` the sources are not read, and sources_KT has no rows. unit: every tile but the last is a multiple of as many
        elements long (whole rows).
        """

    def stored_tiles(
        self, start: int = 0, stop: int | None = None, *, base_only: bool = False, unit: int = 1
    ) -> Iterator[StoredTile] | None:
        """As `tiles`, not converted. None where the compiled loops do not reach: off the CPU, where operations are to round in another
        dtype than float32 or in mergekit's order, and where the inputs are not all of one storage type that the loops know."""

    def hold(self, *shape: int) -> Tensor:
        """Uninitialised memory of that shape in the working dtype on the device, for the method's own use until the tensor is done.

        There is one such block: asking again gives the same memory. What is asked for here belongs in the method's `resident`.
        """

    def hold_array(self, *shape: int) -> Array:
        """The same as an array of float32, where `stored_tiles` serve."""

    def tensors(self) -> None:
        """To be called before the method makes tensors without having asked for any here: sets torch up for the thread."""

    def over_model(self, measure: Callable[[Inputs], Sequence[float]]) -> list[float]:
        """The sum of measure(inputs) over all tensors that the same method merges from the same models; computed once for all.

        measure: one function for all tensors, which returns as many numbers for each of them. To be asked for before a pass is
        begun: what a tile held is lost.
        """

    def record(self, **facts: Any) -> None:
        """Note JSON-serialisable facts about this tensor for the report (norms, agreement, gates)."""


def is_stored(inputs: Inputs) -> bool:
    """Whether `stored_tiles` serve."""
    return inputs.stored_tiles() is not None


def parts(
    inputs: Inputs, start: int = 0, stop: int | None = None, *, base_only: bool = False, unit: int = 1
) -> Iterator[Tile] | Iterator[StoredTile]:
    """The tiles of elements [start, stop), as they are stored where that can be."""
    stored = inputs.stored_tiles(start, stop, base_only=base_only, unit=unit)
    return inputs.tiles(start, stop, base_only=base_only, unit=unit) if stored is None else stored
