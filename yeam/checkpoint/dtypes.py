"""The storage types of safetensors, by their names in its header; torch is imported only when a tensor is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from yeam.errors import CheckpointError, suggest

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DType:
    """One storage type: `code` as in a safetensors header, `torch_name` as in `torch.<name>`, size in bytes."""

    code: str
    torch_name: str
    itemsize: int
    is_float: bool

    @property
    def rounding(self) -> float:
        """The mean square of what rounding to this type changes, as a share of the mean square of the numbers; 0 from 32 bits on.

        0.154 · 4^(−p) for p bits of significand, where all mantissas are equally likely on a logarithmic scale: a twelfth of the
        squared unit in the last place, 4^(1−p), over the mean square of such a mantissa, 1.5 / ln 2.
        """
        bits = {"BF16": 8, "F16": 11}.get(self.code)
        return 0.0 if bits is None else 0.154 * 4.0**-bits

    @property
    def largest(self) -> float:
        """The largest finite number of a floating-point type."""
        return _LARGEST[self.code]

    @property
    def torch(self) -> torch.dtype:
        """The torch dtype; raises CheckpointError where the installed torch lacks it."""
        import torch

        dtype = getattr(torch, self.torch_name, None)
        if dtype is None:
            raise CheckpointError(
                f"the installed torch {torch.__version__} has no dtype {self.torch_name}", "upgrade torch"
            )
        assert isinstance(dtype, torch.dtype)
        return dtype


_LARGEST = {
    "F64": (2 - 2.0**-52) * 2.0**1023,
    "F32": (2 - 2.0**-23) * 2.0**127,
    "F16": 65504.0,
    "BF16": (2 - 2.0**-7) * 2.0**127,
    "F8_E4M3": 448.0,
    "F8_E5M2": 57344.0,
    "F8_E8M0": 2.0**127,
}

DTYPES: dict[str, DType] = {
    d.code: d
    for d in (
        DType("F64", "float64", 8, True),
        DType("F32", "float32", 4, True),
        DType("F16", "float16", 2, True),
        DType("BF16", "bfloat16", 2, True),
        DType("F8_E4M3", "float8_e4m3fn", 1, True),
        DType("F8_E5M2", "float8_e5m2", 1, True),
        DType("F8_E8M0", "float8_e8m0fnu", 1, True),
        DType("C64", "complex64", 8, False),
        DType("I64", "int64", 8, False),
        DType("I32", "int32", 4, False),
        DType("I16", "int16", 2, False),
        DType("I8", "int8", 1, False),
        DType("U64", "uint64", 8, False),
        DType("U32", "uint32", 4, False),
        DType("U16", "uint16", 2, False),
        DType("U8", "uint8", 1, False),
        DType("BOOL", "bool", 1, False),
    )
}
_BY_TORCH_NAME = {d.torch_name: d for d in DTYPES.values()}


def dtype_named(name: str) -> DType:
    """A type by its torch name, with or without `torch.`: `bfloat16`, `torch.float32`. Raises CheckpointError."""
    plain = name.removeprefix("torch.")
    if plain not in _BY_TORCH_NAME:
        raise CheckpointError(f"unknown dtype {name!r}{suggest(plain, _BY_TORCH_NAME)}")
    return _BY_TORCH_NAME[plain]
