"""Sums over numbers as they are stored, against float64; and methods through the engine, in every storage type.

Legend: V rows, T elements.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import yeam
from yeam.compiled import KINDS
from yeam.stored import STEP, add_products, combine, move, narrow

STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def words(rows_VT: Tensor, spare: int = 0) -> np.ndarray[Any, Any]:
    """The rows as the loops take them, with `spare` elements behind each row."""
    padded = torch.nn.functional.pad(rows_VT, (0, spare))
    return padded.view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("code", ["BF16", "F16"])
def test_every_number_is_widened_exactly(code: str) -> None:
    """All 65,536 of them: subnormal, infinite and not a number too."""
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(STORED[code])
    out = torch.empty(1 << 16)
    combine(words(x[None]), KINDS[code], np.ones(1, np.float32), out.numpy().view(np.uint16), 2)
    torch.testing.assert_close(out, x.float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(out.signbit(), x.float().signbit() | (out.isnan() & out.signbit()))


@given(
    code=st.sampled_from([*STORED]),
    V=st.integers(1, 5),
    T=st.sampled_from([0, 1, 31, STEP - 1, STEP, STEP + 1, 3 * STEP + 17]),
    spare=st.sampled_from([0, 2, 32]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_sums_and_products(code: str, V: int, T: int, spare: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows_VT = torch.randn(V, T, generator=generator).to(STORED[code])
    factors = torch.randn(V, generator=generator)
    wide_VT, kind, word_VS = rows_VT.double(), KINDS[code], words(rows_VT, spare)
    out = torch.empty(T)

    combine(word_VS, kind, factors.numpy(), out.numpy().view(np.uint16), 2)
    torch.testing.assert_close(out.double(), factors.double() @ wide_VT, rtol=0, atol=5e-6)

    delta_KT = wide_VT[:-1] - wide_VT[-1]
    if V > 1:
        move(word_VS, kind, factors[:-1].numpy(), out.numpy().view(np.uint16), 2)
        torch.testing.assert_close(out.double(), wide_VT[-1] + factors[:-1].double() @ delta_KT, rtol=0, atol=5e-6)

    for vectors, relative in ((wide_VT, False), (delta_KT, True)):
        products = np.ones((len(vectors), len(vectors)))
        add_products(word_VS, kind, T, relative, products)
        expected = (1 + vectors @ vectors.T).tril() + torch.ones(len(vectors), len(vectors)).triu(1)
        torch.testing.assert_close(torch.from_numpy(products), expected.double(), rtol=1e-6, atol=1e-3)


METHODS: dict[str, dict[str, Any]] = {
    "linear": {}, "task_arithmetic": {"weight": 0.6, "lambda": 0.8}, "slerp": {"t": 0.3}, "nuslerp": {},
    "multislerp": {}, "karcher": {}, "model_stock": {},
}  # fmt: skip


@pytest.mark.parametrize("code", [*STORED, "mixed"])
def test_methods_on_stored_numbers(tmp_path: Path, code: str) -> None:
    """What a merge of files gives is what the methods give on the same numbers in float32, rounded once."""
    generator = torch.Generator().manual_seed(7)
    kinds = [STORED.get(code, each) for each in (torch.float32, torch.bfloat16, torch.float16)]
    models, plain = [tmp_path / name for name in ("base", "a", "b")], [tmp_path / name for name in ("p", "q", "r")]
    base = torch.randn(70, 41, generator=generator)
    for folder, wide, dtype in zip(models, plain, kinds):
        tensors = {"w": (base + 0.3 * torch.randn(70, 41, generator=generator)).to(dtype), "b": base[0, :7].to(dtype)}
        for place, found in ((folder, tensors), (wide, {name: x.float() for name, x in tensors.items()})):
            place.mkdir()
            save_file(found, place / "model.safetensors")
            (place / "config.json").write_text("{}")

    for name, parameters in METHODS.items():
        results = []
        for folders in (models, plain):
            recipe: dict[str, Any] = {"merge_method": name, "parameters": parameters, "out_dtype": "float32"}
            if name in ("linear", "karcher"):
                inputs = folders
            else:
                inputs, recipe["base_model"] = folders[1:2] if name == "slerp" else folders[1:], str(folders[0])
            recipe["models"] = [{"model": str(folder), "parameters": {"weight": 0.6}} for folder in inputs]
            yeam.merge(recipe, tmp_path / "out", overwrite=True)
            results.append(load_file(tmp_path / "out" / "model.safetensors"))
        for tensor, expected in results[1].items():
            torch.testing.assert_close(results[0][tensor], expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("code", [*STORED])
def test_numbers_are_narrowed_as_torch_does_it(code: str) -> None:
    """To the nearest, ties to even, over the whole range of exponents; Inf stays, NaN stays one; and the sum of squares."""
    generator = np.random.default_rng(5)
    bits = generator.integers(0, 1 << 32, 5 * STEP + 3, dtype=np.uint32)
    halves = (bits[:STEP] & np.uint32(0xFFFF0000)) | np.uint32(0x8000)  # between two numbers of bfloat16
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 65504, 65520, 3.4e38, 1e-45, 6e-8], np.float32)
    x_T = np.concatenate([bits.view(np.float32), halves.view(np.float32), special])
    dtype = STORED[code]
    word_S = np.empty(len(x_T) * dtype.itemsize // 2, np.uint16)
    narrow(x_T, KINDS[code], word_S)
    found = torch.from_numpy(word_S.view(np.int16)).view(dtype)
    wanted = torch.from_numpy(x_T).to(dtype)
    torch.testing.assert_close(found.float(), wanted.float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.signbit()[~wanted.isnan()], wanted.signbit()[~wanted.isnan()])

    small_T = generator.standard_normal(3 * STEP + 5).astype(np.float32)
    total = narrow(small_T, KINDS[code], word_S[: len(small_T) * dtype.itemsize // 2])
    assert total == pytest.approx(float((small_T.astype(np.float64) ** 2).sum()), rel=1e-6)
