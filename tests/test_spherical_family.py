"""Slerp and its relatives, RAM, SCE, nearswap and fusion against their formulas on whole tensors.

The references work in the dtype of what they are given: in float64 they are the truth that float32 results are held
against, in half precision they round after every operation, as `math: exact` has to.

Legend: K sources, T elements of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from held_inputs import HeldInputs, outcome
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import yeam
from yeam.errors import ConfigError
from yeam.methods import karcher, method_named

SETTINGS = settings(max_examples=20, deadline=None)
SEED = st.integers(0, 2**31)
HALF = (torch.bfloat16, torch.float16)


def merge(
    name: str, sources: Sequence[Tensor], base: Tensor | None = None, tile: int = 1 << 18, **values: Any
) -> Tensor:
    """A registered method on tensors in memory, with its defaults unless told otherwise, as the engine runs it."""
    method = method_named(name)
    values = {p.keyword: p.default for p in method.parameters.values()} | values

    def made(stored: bool) -> Tensor:
        inputs = HeldInputs(torch.stack(list(sources)), base, tuple(sources[0].shape), tile, stored=stored)
        return outcome(method, inputs, values).view(sources[0].shape)

    with torch.inference_mode():
        result = made(stored=False)
        if result.dtype == torch.float32:  # the compiled loops say the same
            torch.testing.assert_close(made(stored=True), result, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert result.dtype == sources[0].dtype
    return result


def models(shape: tuple[int, ...], K: int, seed: int = 0, spread: float = 0.5) -> tuple[list[Tensor], Tensor]:
    """Sources around a base, float32."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    return [base + spread * torch.randn(shape, generator=generator) for _ in range(K)], base


def arc(t: float, a: Tensor, b: Tensor, dim: int) -> Tensor:
    unit_a, unit_b = (v / v.norm(dim=dim, keepdim=True).clamp(min=1e-7) for v in (a, b))
    theta = (unit_a * unit_b).sum(dim, keepdim=True).clamp(-1, 1).acos()
    curved = (torch.sin((1 - t) * theta) * a + torch.sin(t * theta) * b) / torch.sin(theta)
    return torch.where(torch.sin(theta).double().abs() < 1e-8, (1 - t) * a + t * b, curved)


def whole_slerp(sources: list[Tensor], base: Tensor, t: float) -> Tensor:
    wide = torch.promote_types(base.dtype, torch.float32)
    a, b = base.to(wide), sources[0].to(wide)
    cosine = float((a * b).sum() / a.norm() / b.norm())
    if abs(cosine) > 0.9995:
        return ((1 - t) * a + t * b).to(base.dtype)
    return arc(t, a.flatten(), b.flatten(), 0).view(a.shape).to(base.dtype)


def whole_nuslerp(
    sources: list[Tensor], base: Tensor | None, weight: tuple[float, float], flat: bool = True, first: bool = False
) -> Tensor:
    a, b = sources if base is None else [source - base for source in sources]
    t = weight[1] / sum(weight)
    if flat or a.ndim == 0:
        result = arc(t, a.flatten(), b.flatten(), 0).view(a.shape)
    else:
        result = arc(t, a, b, 0 if first else -1)
    return result if base is None else base + result


def whole_multislerp(sources: list[Tensor], base: Tensor | None, weight: Sequence[float]) -> Tensor:
    """With the step in the tangent space that the method leaves out: it is zero."""
    rows = torch.stack([(s if base is None else s - base).flatten() for s in sources])
    share = torch.tensor(weight, dtype=rows.dtype)
    share = (share / share.sum())[:, None]
    norms = rows.norm(dim=1, keepdim=True)
    units = rows / (norms + 1e-8)
    mean = (units * share).sum(0)
    mean = mean / mean.norm()
    tangent = ((units - (units * mean).sum(1, keepdim=True) * mean) * share).sum(0)
    length = tangent.norm() + 1e-8
    result = mean * torch.cos(length) + tangent * (torch.sin(length) / length)
    result = (result * (norms * share).sum()).view(sources[0].shape)
    return result if base is None else base + result


def whole_karcher(sources: list[Tensor], max_iter: int = 10, tol: float = 1e-5) -> Tensor:
    dtype, wide, share = sources[0].dtype, torch.promote_types(sources[0].dtype, torch.float32), 1 / len(sources)

    def norm(x: Tensor) -> Tensor:
        return x.to(wide).norm()

    rows = [source.flatten() for source in sources]
    units = [(row / norm(row)).to(dtype) for row in rows]
    mean = torch.zeros_like(rows[0])
    for unit in units:
        mean += share * unit
    mean = mean / norm(mean).item()
    for _ in range(max_iter):
        tangent = torch.zeros_like(mean)
        for unit in units:
            cosine = (mean.to(wide) * unit.to(wide)).sum().to(dtype).clamp(-1, 1)
            if cosine.acos().item() >= tol:
                tangent += share * (cosine.acos() / cosine.acos().sin()) * (unit - cosine * mean)
        step = norm(tangent)
        if step.item() < tol:
            break
        mean = step.cos() * mean + step.sin() * (tangent / step)
        mean = mean / norm(mean)
    return (sum(share * norm(row).item() for row in rows) * mean).view(sources[0].shape)


def whole_model_stock(sources: list[Tensor], base: Tensor, rows: bool = False) -> Tensor:
    shape = base.shape if rows and base.ndim > 1 else (1, base.numel())
    deltas = [(source - base).view(shape) for source in sources]
    cosines = []
    for a, b in combinations(deltas, 2):
        lengths = (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=1e-6)
        cosines.append(((a * b).sum(-1) / lengths).clamp(-1, 1))
    cosine, K = torch.stack(cosines).mean(0)[..., None], len(sources)
    divisor = 1 + (K - 1) * cosine
    t = torch.where(divisor.abs() < 1e-6, 0.0, (K * cosine) / divisor)
    mean = sources[0].clone()
    for source in sources[1:]:
        mean += source
    return (t * (mean / K).view(shape) + (1 - t) * base.view(shape)).view(base.shape)


def whole_sce(sources: list[Tensor], base: Tensor, topk: float = 1.0) -> Tensor:
    delta = torch.stack([source - base for source in sources])
    if topk < 1:
        variance = delta.double().var(0, unbiased=False).to(delta.dtype).flatten()
        kept = int(torch.count_nonzero(variance) * topk)
        order = variance.sort(descending=True, stable=True).indices[:kept]
        delta = delta * torch.zeros_like(variance).index_fill(0, order, 1.0).view(base.shape)
    energy = (delta * delta).view(len(delta), -1).double().mean(1).to(base.dtype)
    energy = energy / energy.sum().item() if energy.sum() >= 1e-6 else torch.ones_like(energy) / len(energy)
    majority = torch.where(delta.sum(0) >= 0, 1.0, -1.0)
    share = energy.view(-1, *[1] * base.ndim) * (delta.sign() == majority)
    return base + (delta * share).sum(0) / share.sum(0).clamp(min=1e-6)


def whole_ram(sources: list[Tensor], base: Tensor, epsilon: float, plus: tuple[float, float] | None = None) -> Tensor:
    delta = torch.stack([source - base for source in sources])
    changed = delta.abs() > epsilon
    count = changed.sum(0)
    alone, shared = changed & (count == 1), changed & (count > 1)
    factor = torch.ones(len(delta))
    if plus is not None:
        numbers = [part.view(len(delta), -1).sum(1) for part in (shared, alone)]
        ratio = numbers[0] / numbers[1].clamp(min=epsilon)
        factor = 1 + plus[0] * ratio.clamp(0, plus[1])
    factor = factor.view(-1, *[1] * base.ndim) if plus is not None else 1.0
    return (base + (delta * alone * factor + delta * shared / count.clamp(min=1)).sum(0)).to(base.dtype)


def whole_fusion(sources: list[Tensor], base: Tensor) -> Tensor:
    x = sources[0]
    p, q = (v.view(x.shape or (1,)).softmax(-1) + 1e-8 for v in (x, base))
    importance = (x - base).abs() * (p * torch.log(p / q)).sum(-1, keepdim=True)
    importance = importance.view(x.shape)
    low, middle, high = (importance.flatten().sort().values[part * (x.numel() - 1) // 4] for part in (1, 2, 3))
    return torch.where(importance >= middle + 1.5 * (high - low), base + (x - base), base)


Case = tuple[str, int, bool, dict[str, Any], Callable[[list[Tensor], Any], Tensor]]
CASES: dict[str, Case] = {
    "slerp": ("slerp", 1, True, {"t": 0.3}, lambda x, b: whole_slerp(x, b, 0.3)),
    "nuslerp": ("nuslerp", 2, False, {"weight": (3.0, 1.0)}, lambda x, b: whole_nuslerp(x, b, (3.0, 1.0))),
    "nuslerp deltas": ("nuslerp", 2, True, {"weight": (0.2, 0.6)}, lambda x, b: whole_nuslerp(x, b, (0.2, 0.6))),
    "nuslerp rows": (
        "nuslerp", 2, False, {"weight": (0.5, 0.5), "nuslerp_flatten": False},
        lambda x, b: whole_nuslerp(x, b, (0.5, 0.5), flat=False),
    ),
    "nuslerp columns": (
        "nuslerp", 2, True, {"weight": (0.5, 0.7), "nuslerp_flatten": False, "nuslerp_row_wise": True},
        lambda x, b: whole_nuslerp(x, b, (0.5, 0.7), flat=False, first=True),
    ),
    "multislerp": (
        "multislerp", 3, False, {"weight": (0.5, 0.3, 0.4)}, lambda x, b: whole_multislerp(x, b, (0.5, 0.3, 0.4))
    ),
    "multislerp deltas": (
        "multislerp", 3, True, {"weight": (1.0, 2.0, 1.0)}, lambda x, b: whole_multislerp(x, b, (1.0, 2.0, 1.0))
    ),
    "karcher": ("karcher", 4, False, {}, lambda x, b: whole_karcher(x)),
    "model_stock": ("model_stock", 3, True, {}, whole_model_stock),
    "model_stock rows": (
        "model_stock", 2, True, {"filter_wise": True}, lambda x, b: whole_model_stock(x, b, rows=True)
    ),
    "sce": ("sce", 3, True, {}, whole_sce),
    "sce topk": ("sce", 3, True, {"select_topk": 0.4}, lambda x, b: whole_sce(x, b, 0.4)),
    "nearswap": (
        "nearswap", 1, True, {"t": 0.2},
        lambda x, b: (w := (0.2 / (b - x[0]).abs().clamp(min=1e-6)).clamp(0, 1)) * x[0] + (1 - w) * b,
    ),
    "ram": ("ram", 3, True, {"epsilon": 0.3}, lambda x, b: whole_ram(x, b, 0.3)),
    "ramplus_tl": ("ramplus_tl", 3, True, {"epsilon": 0.3}, lambda x, b: whole_ram(x, b, 0.3, (0.1, 0.2))),
    "arcee_fusion": ("arcee_fusion", 1, True, {}, whole_fusion),
}  # fmt: skip
SHAPES = [(24, 20), (3, 5, 7), (37,), (6, 1), (1,), ()]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_is_the_formula_however_the_tensor_is_cut(case: str, shape: tuple[int, ...]) -> None:
    name, K, has_base, values, whole = CASES[case]
    sources, base = models(shape, K)
    want = whole([source.double() for source in sources], base.double() if has_base else None)
    for tile in (1 << 18, 32, 11):
        got = merge(name, sources, base if has_base else None, tile, **values)
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("spread", [0.5, 0.02])
def test_half_precision_rounds_as_the_formula_does(case: str, dtype: torch.dtype, spread: float) -> None:
    name, K, has_base, values, whole = CASES[case]
    sources, base = models((24, 20), K, 1, spread)
    sources, base = [source.to(dtype) for source in sources], base.to(dtype)
    want = whole(list(sources), base if has_base else None)
    size = torch.stack([want, *sources, base]).abs().amax(0).double()
    ulp = torch.exp2(torch.floor(torch.log2(size))) * torch.finfo(dtype).eps
    for tile in (1 << 18, 50):
        got = merge(name, sources, base if has_base else None, tile, **values)
        assert float(((got.double() - want.double()).abs() / ulp).max()) <= 2


@pytest.mark.parametrize("case", ["nearswap", "ram", "ramplus_tl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
def test_elementwise_methods_are_equal_to_the_bit(case: str, dtype: torch.dtype) -> None:
    name, K, _, values, whole = CASES[case]
    sources, base = models((24, 20), K, 2)
    sources, base = [source.to(dtype) for source in sources], base.to(dtype)
    sources[0].view(-1)[::3] = base.view(-1)[::3]
    assert torch.equal(merge(name, sources, base, 50, **values), whole(sources, base))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_equal_models_give_the_model_and_zeros_give_zeros(case: str, dtype: torch.dtype) -> None:
    name, K, has_base, values, _ = CASES[case]
    base = models((24, 20), 1)[1].to(dtype)
    got = merge(name, [base] * K, base if has_base else None, **values)
    torch.testing.assert_close(got, base, rtol=3 * torch.finfo(dtype).eps, atol=0)
    zero = torch.zeros_like(base)
    assert torch.equal(merge(name, [zero] * K, zero if has_base else None, **values), zero)
    one = merge(name, [base] + [zero] * (K - 1), zero if has_base else None, **values)
    assert bool(one.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
def test_slerp_ends_at_the_models_to_the_bit(dtype: torch.dtype) -> None:
    (x,), base = models((24, 20), 1)
    x, base = x.to(dtype), base.to(dtype)
    assert torch.equal(merge("slerp", [x], base, t=0.0), base)
    assert torch.equal(merge("slerp", [x], base, t=1.0), x)


@given(seed=SEED, t=st.floats(0, 1), size=st.integers(2, 300))
@SETTINGS
def test_slerp_moves_along_the_arc(seed: int, t: float, size: int) -> None:
    (x,), base = models((size,), 1, seed, spread=1.0)
    x, base = x.double() / x.double().norm(), base.double() / base.double().norm()
    got = merge("slerp", [x], base, tile=64, t=t)
    theta = math.acos(max(-1.0, min(1.0, float(base @ x))))
    if math.cos(theta) ** 2 < 0.999:
        assert math.isclose(float(got.norm()), 1, abs_tol=1e-9)
        assert math.isclose(float(got @ base), math.cos(t * theta), abs_tol=1e-9)


@given(seed=SEED, size=st.integers(2, 300))
@SETTINGS
def test_relatives_meet_in_the_middle_of_the_arc(seed: int, size: int) -> None:
    (x,), y = models((size,), 1, seed, spread=1.0)
    x = x.double()
    y = y.double() / y.norm().double() * x.norm()
    if abs(float(x @ y)) > 0.99 * float(x @ x):
        return
    middle = merge("slerp", [x], y, t=0.5)
    for got in (
        merge("nuslerp", [x, y], weight=(2.0, 2.0)),
        merge("multislerp", [x, y], weight=(1.0, 1.0)),
        merge("karcher", [x, y], max_iter=50, tol=1e-9),
    ):
        torch.testing.assert_close(got, middle, rtol=1e-6, atol=1e-6)


@given(seed=SEED, K=st.integers(3, 6))
@SETTINGS
def test_karcher_mean_is_level_and_knows_no_order(seed: int, K: int) -> None:
    """At the mean the logarithms of the models cancel: what defines it."""
    sources = [source.double() for source in models((40,), K, seed)[0]]
    got = merge("karcher", sources, max_iter=200, tol=1e-12)
    mean, units = got / got.norm(), [source / source.norm() for source in sources]
    angles = [math.acos(float(unit @ mean)) for unit in units]
    pull = sum(a / math.sin(a) * (unit - math.cos(a) * mean) for a, unit in zip(angles, units))
    assert float(pull.norm()) < 1e-6
    assert math.isclose(float(got.norm()), sum(float(s.norm()) for s in sources) / K, rel_tol=1e-9)
    torch.testing.assert_close(merge("karcher", sources[::-1], max_iter=200, tol=1e-12), got)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_karcher_of_a_tensor_too_large_to_keep_is_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [source.to(dtype) for source in models((24, 20), 3)[0]]
    kept = merge("karcher", sources, tile=50, max_iter=4)
    monkeypatch.setattr(karcher, "HELD_BYTES", 0)
    assert torch.equal(merge("karcher", sources, tile=50, max_iter=4), kept)
    assert not torch.equal(merge("karcher", sources, tile=50, max_iter=0), kept)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_opposite_models(dtype: torch.dtype) -> None:
    x = models((24, 20), 1)[1].to(dtype)
    torch.testing.assert_close(merge("slerp", [-x], x, t=0.25), x * 0.5)
    assert torch.equal(merge("multislerp", [x, -x], weight=(1.0, 1.0)), torch.zeros_like(x))
    torch.testing.assert_close(merge("karcher", [x, -x]), x, rtol=0.02, atol=0)  # the first of two equally good means
    if dtype == torch.float32:
        torch.testing.assert_close(merge("nuslerp", [x, -x], weight=(3.0, 1.0)), x * 0.5)
    # two opposed updates: 1 + (K − 1) cos θ is 0, and the base stays
    torch.testing.assert_close(merge("model_stock", [x + 0.5, x - 0.5], x), x, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_multislerp_says_what_it_cannot_do(dtype: torch.dtype) -> None:
    one = torch.ones(8, dtype=dtype)
    with pytest.raises(ConfigError, match=r"model\.weight: the weighted directions of the 3 models cancel"):
        merge("multislerp", [one, one, -one], weight=(0.25, 0.25, 0.5))
    zero = torch.zeros(8, dtype=dtype)
    assert torch.equal(merge("multislerp", [one, one, one], one, weight=(1.0, 1.0, 1.0)), one)
    assert torch.equal(merge("multislerp", [zero, one, one], weight=(1.0, 1.0, 1.0)).isfinite(), one.bool())


def test_sce_selects_exactly_and_the_first_of_equals() -> None:
    base = torch.zeros(400)
    first, second = base.clone(), base.clone()
    first[100:300] = 1.0  # 200 elements of equal variance; the others have none
    got = merge("sce", [first, second], base, tile=32, select_topk=0.25)
    assert got.nonzero().flatten().tolist() == list(range(100, 150))
    assert torch.equal(merge("sce", [first], base, select_topk=0.5), base)  # one model has no variance
    assert torch.equal(merge("sce", [first, second], base, select_topk=0.0), base)


def test_sce_weights_are_equal_below_its_threshold() -> None:
    base = torch.zeros(64)
    large, small = torch.full_like(base, 0.1), torch.full_like(base, 0.05)
    torch.testing.assert_close(merge("sce", [large, small], base), torch.full_like(base, (0.1 * 0.8 + 0.05 * 0.2)))
    tiny = merge("sce", [large * 1e-4, small * 1e-4], base)
    torch.testing.assert_close(tiny, torch.full_like(base, 0.75e-5), rtol=1e-5, atol=0)


def test_nearswap_at_zero_is_the_base_in_float16_too() -> None:
    (x,), base = models((24, 20), 1)
    x, base = x.half(), base.half()
    x[0] = base[0]
    assert torch.equal(merge("nearswap", [x], base, t=0.0), base)


def test_ram_plus_strengthens_what_is_not_shared() -> None:
    base = torch.zeros(10)
    first = torch.tensor([1.0] * 5 + [0.0] * 5)
    second = torch.tensor([0.0] * 4 + [3.0] * 2 + [0.0] * 4)
    got = merge("ramplus_tl", [first, second], base, tile=4, r=0.5, alpha=0.4)
    # element 4 is shared; the first model has 4 of its own (ratio ¼), the second 1 (ratio 1, clipped to 0.4)
    torch.testing.assert_close(got, torch.tensor([1.125] * 4 + [2.0, 3.0 * 1.2] + [0.0] * 4))


def test_fusion_takes_whole_outliers_and_nothing_else() -> None:
    (x,), base = models((16, 32), 1, spread=0.01)
    x[3, 5] = base[3, 5] + 4.0
    got = merge("arcee_fusion", [x], base, tile=100)
    assert got[3, 5] == x[3, 5]
    swapped = got != base
    assert torch.equal(got[swapped], (base + (x - base))[swapped])
    assert 0 < int(swapped.sum()) < 0.2 * x.numel()


def test_parameters_and_their_defaults_are_mergekits() -> None:
    wanted = {
        "slerp": {"t": None},
        "nuslerp": {"weight": None, "nuslerp_flatten": True, "nuslerp_row_wise": False},
        "multislerp": {"weight": None, "normalize_weights": True, "eps": 1e-8},
        "karcher": {"max_iter": 10, "tol": 1e-5},
        "model_stock": {"filter_wise": False},
        "nearswap": {"t": None},
        "sce": {"select_topk": 1.0, "int8_mask": False},
        "ram": {"epsilon": 1e-5},
        "ramplus_tl": {"r": 0.1, "alpha": 0.2, "epsilon": 1e-5},
        "arcee_fusion": {},
    }
    for name, defaults in wanted.items():
        parameters = method_named(name).parameters
        assert {key: p.default for key, p in parameters.items()} == defaults
        assert all(p.required == (defaults[key] is None) for key, p in parameters.items())


@pytest.mark.parametrize("case", CASES)
def test_through_the_engine(case: str, llama: Callable[..., Path], recipe: Callable[..., Path], tmp_path: Path) -> None:
    name, K, has_base, values, _ = CASES[case]
    folders = [llama(letter, dtype=torch.bfloat16) for letter in "abcd"[:K]]
    base = llama("base", dtype=torch.bfloat16) if has_base else None
    weights = values.get("weight", [None] * K)
    entries = [
        {"model": str(folder), **({"parameters": {"weight": weight}} if weight is not None else {})}
        for folder, weight in zip(folders, weights)
    ]
    keys = {"base_model": base} if base is not None else {}
    common = {key: value for key, value in values.items() if key != "weight"}
    written = recipe(*entries, merge_method=name, parameters=common, math="exact", **keys)
    yeam.merge(written, tmp_path / "out")
    loaded = [load_file(folder / "model.safetensors") for folder in [*folders, *([base] if base else [])]]
    for key, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        found = [tensors[key] for tensors in loaded]
        assert torch.equal(tensor, merge(name, found[:K], found[K] if has_base else None, **values)), key


def test_wrong_recipes_are_refused_before_weights_are_read(
    llama: Callable[..., Path], recipe: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    a, b, c = (llama(letter) for letter in "abc")
    out = tmp_path / "out"
    refused(["plan", recipe(a, b, merge_method="slerp", base_model=a, parameters={"t": 1.5})], "t = 1.5")
    refused(["merge", recipe(a, b, merge_method="slerp", parameters={"t": 0.5}), out], "needs a base model")
    refused(
        ["merge", recipe(a, b, c, merge_method="nearswap", base_model=a, parameters={"t": 1}), out], "takes 1 model"
    )
    refused(["merge", recipe(a, b, merge_method="model_stock", base_model=a), out], "'model_stock' takes 2")
    refused(["merge", recipe(a, b, merge_method="nuslerp"), out], "needs 'weight'")
    with pytest.raises(ConfigError, match="needs 't'"):
        yeam.plan(recipe(a, b, merge_method="slerp", base_model=a))
    assert not out.exists()
