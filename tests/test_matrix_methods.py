"""TSV-M, Iso-C, Iso-CTS and WUDI against the papers' formulas on whole float64 matrices.

Legend: K sources, M rows, N columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
from yeam.errors import CheckpointError, ConfigError
from yeam.geometry import spectra
from yeam.methods import method_named

FAMILY = Path(__file__).parents[1] / "examples" / "tiny-family" / "models"
METHODS = ("tsv_m", "iso_c", "iso_cts", "wudi")
SEED = st.integers(0, 2**31)
SIDES = st.integers(8, 30)


def merge(
    name: str,
    updates: Sequence[Tensor],
    base: Tensor,
    tile: int = 1 << 18,
    role: str = "q",
    transposed: bool = False,
    **values: Any,
) -> Tensor:
    """The registered method on base + updates, with its defaults unless told otherwise, as the engine runs it."""
    method = method_named(name)
    full = {}
    for parameter in method.parameters.values():
        default = parameter.default * len(updates) if parameter.per_source else parameter.default
        full[parameter.keyword] = values.pop(parameter.name, default)
    assert not values
    sources = torch.stack([base + update for update in updates])
    inputs = HeldInputs(sources, base, tuple(base.shape), tile, role=role, transposed=transposed)
    with torch.inference_mode():
        return outcome(method, inputs, full).view(base.shape)


def models(shape: tuple[int, ...], K: int, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Updates with a decaying spectrum and something in common, and a base; float64, exact in float32."""
    generator = torch.Generator().manual_seed(seed)

    def drawn() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shared = drawn()
    decay = torch.linspace(1, 0.1, shape[-1] if shape else 1, dtype=torch.float64)
    updates = [((drawn() + 0.5 * shared) * decay * 0.2).view(shape).float().double() for _ in range(K)]
    return updates, drawn().float().double()


def polar(x_MN: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(x_MN, full_matrices=False)
    return u @ vh


# The formulas, on whole matrices, from singular value decompositions. v: the weighted updates.


def whole_tsv_m(v: Sequence[Tensor]) -> Tensor:
    rank = min(v[0].shape) // len(v)
    triplets = [torch.linalg.svd(x, full_matrices=False) for x in v]
    u = torch.cat([u[:, :rank] for u, _, _ in triplets], dim=1)
    s = torch.cat([s[:rank] for _, s, _ in triplets])
    vh = torch.cat([vh[:rank] for _, _, vh in triplets])
    return polar(u) @ torch.diag(s) @ polar(vh)


def whole_iso_c(v: Sequence[Tensor]) -> Tensor:
    u, s, vh = torch.linalg.svd(sum(v), full_matrices=False)
    return s.mean() * u @ vh


def whole_iso_cts(v: Sequence[Tensor], common_space_fraction: float = 0.8) -> Tensor:
    K, short = len(v), min(v[0].shape)
    specific = round((short - int(short * common_space_fraction)) / K) * K
    specific = specific if specific <= short else short // K * K
    common, each = short - specific, specific // K
    u, s, vh = torch.linalg.svd(sum(v), full_matrices=False)
    us, ss, vhs = [u[:, :common]], [s[:common]], [vh[:common]]
    for x in v:
        own = torch.linalg.svd(x - u[:, :common] @ u[:, :common].T @ x, full_matrices=False)
        us, ss, vhs = [*us, own[0][:, :each]], [*ss, own[1][:each]], [*vhs, own[2][:each]]
    return torch.cat(ss).mean() * polar(torch.cat(us, dim=1)) @ polar(torch.cat(vhs))


def whole_wudi(
    v: Sequence[Tensor],
    filter_type: str = "exponential",
    exp_time: float = 300.0,
    truncate_rank_ratio: float = 0.85,
    ridge: float = 0.1,
    init_mode: str | None = None,
) -> Tensor:
    grams = [x.T @ x / x.square().sum() for x in v]
    pulled, anchor = sum(x @ gram for x, gram in zip(v, grams)), sum(v)
    if (init_mode or ("mean" if filter_type == "ridge" else "sum")) == "mean":
        anchor = anchor / len(v)
    columns = v[0].shape[1]
    if filter_type == "ridge":
        e = ridge * sum(grams).trace() / columns
        return (pulled + e * anchor) @ torch.linalg.inv(sum(grams) + e * torch.eye(columns, dtype=e.dtype))
    values, q = torch.linalg.eigh(sum(grams))
    kept = torch.arange(columns) >= columns - math.ceil(columns * truncate_rank_ratio - 1e-3)
    f = kept * (1 - torch.exp(-exp_time * values) if filter_type == "exponential" else torch.ones_like(values))
    return anchor - anchor @ q @ torch.diag(f) @ q.T + pulled @ q @ torch.diag(f / values) @ q.T


WHOLE: dict[str, Callable[..., Tensor]] = {
    "tsv_m": whole_tsv_m, "iso_c": whole_iso_c, "iso_cts": whole_iso_cts, "wudi": whole_wudi,
}  # fmt: skip
ALLOWED = {
    "iso_cts": 1e-8
}  # its two decompositions magnify rounding where values are close; how much differs from one CPU to another
CASES: list[tuple[str, dict[str, Any]]] = [
    ("tsv_m", {}),
    ("iso_c", {}),
    ("iso_cts", {}),
    ("iso_cts", {"common_space_fraction": 0.3}),
    ("iso_cts", {"common_space_fraction": 0.0}),
    ("wudi", {}),
    ("wudi", {"exp_time": 20.0, "truncate_rank_ratio": 1.0, "init_mode": "mean"}),
    ("wudi", {"filter_type": "none", "truncate_rank_ratio": 1.0}),
    ("wudi", {"filter_type": "none", "truncate_rank_ratio": 0.5}),
    ("wudi", {"filter_type": "ridge"}),
    ("wudi", {"filter_type": "ridge", "ridge": 2.0, "init_mode": "sum"}),
]


@pytest.mark.parametrize(("name", "values"), CASES, ids=str)
@given(K=st.integers(2, 4), rows=SIDES, columns=SIDES, tile=st.sampled_from([1 << 18, 64, 11]), seed=SEED)
@settings(max_examples=12, deadline=None)
def test_is_the_formula_however_the_matrix_is_cut(
    name: str, values: dict[str, Any], K: int, rows: int, columns: int, tile: int, seed: int
) -> None:
    if name == "wudi" and K * rows < columns:  # the formula above divides by its eigenvalues: C has to be regular
        rows, columns = columns, rows
    updates, base = models((rows, columns), K, seed)
    weight = tuple([1.0, 0.5, 2.0, 1.5][:K])
    weighted = [factor * update for factor, update in zip(weight, updates)]
    want = base + 0.7 * WHOLE[name](weighted, **values)
    got = merge(name, updates, base, tile, weight=weight, **{"lambda": 0.7}, **values)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-7)


@pytest.mark.parametrize(("name", "values"), CASES, ids=str)
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)], ids=str)
def test_float32_is_close_to_the_formula(name: str, values: dict[str, Any], shape: tuple[int, int]) -> None:
    updates, base = models(shape, 3)
    want = WHOLE[name](updates, **values)
    got = merge(name, [update.float() for update in updates], base.float(), 50, **values) - base.float()
    assert float((got.double() - want).norm() / want.norm()) < 2e-4


@pytest.mark.parametrize(("name", "values"), CASES, ids=str)
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)], ids=str)
def test_matrices_stored_as_in_out(name: str, values: dict[str, Any], shape: tuple[int, int]) -> None:
    updates, base = models(shape, 3)
    want = merge(name, updates, base, **values)
    got = merge(name, [update.T.contiguous() for update in updates], base.T.contiguous(), 50, transposed=True, **values)
    torch.testing.assert_close(got.T, want, rtol=0, atol=2e-7)


def test_float32_flattens_a_steep_spectrum() -> None:
    """Singular values down to 1e-3 of the largest: squared, they would drown in float32."""
    generator = torch.Generator().manual_seed(1)
    u, _ = torch.linalg.qr(torch.randn(60, 40, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64))
    steep = (u * torch.logspace(0, -4, 40, dtype=torch.float64)) @ v.T
    for x, want in ((steep, u @ v.T), (steep.T, v @ u.T)):
        got = x.float().contiguous()
        rank, total = spectra.polar_(got)
        assert rank == 40
        assert total == pytest.approx(float(torch.logspace(0, -4, 40).sum()), rel=1e-5)
        assert float((got.double() - want).norm() / want.norm()) < 0.02
        assert float((got[:, :1].double() - want[:, :1]).norm()) < 0.05


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(37,), (), (5, 30), (12, 1), (16, 3, 3, 3)], ids=str)
def test_what_is_no_matrix_moves_by_the_mean(name: str, shape: tuple[int, ...]) -> None:
    updates, base = models(shape, 3)
    want = base + 0.5 * (updates[0] + 2 * updates[1] + updates[2]) / 3
    got = merge(name, updates, base, 11, weight=(1.0, 2.0, 1.0), **{"lambda": 0.5})
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_roles_that_are_no_linear_layers(name: str) -> None:
    updates, base = models((20, 12), 2)
    mean = base + (updates[0] + updates[1]) / 2
    as_matrix = base + WHOLE[name](updates)
    for role in ("embedding", "head", "bias", "conv"):
        torch.testing.assert_close(merge(name, updates, base, role=role), mean, rtol=0, atol=1e-12)
    for role in ("embedding", "head"):
        assert torch.equal(merge(name, updates, base, role=role, embeddings="base"), base)
        torch.testing.assert_close(
            merge(name, updates, base, role=role, embeddings="matrix"), as_matrix, rtol=0, atol=1e-9
        )


@pytest.mark.parametrize("name", METHODS)
def test_stacks_and_panels_are_matrices_of_their_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    updates, base = models((3, 12, 9), 2)
    want = torch.stack([base[s] + WHOLE[name]([update[s] for update in updates]) for s in range(3)])
    torch.testing.assert_close(merge(name, updates, base, 25), want, rtol=0, atol=ALLOWED.get(name, 1e-9))
    monkeypatch.setattr("yeam.methods.yeam.PANEL_ROWS", 20)
    updates, base = models((50, 9), 2)
    parts = [slice(0, 16), slice(16, 33), slice(33, 50)]
    want = torch.cat([base[rows] + WHOLE[name]([update[rows] for update in updates]) for rows in parts])
    torch.testing.assert_close(merge(name, updates, base, 100), want, rtol=0, atol=ALLOWED.get(name, 1e-9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_zero_updates_and_one_source(name: str, dtype: torch.dtype) -> None:
    (update, other), base = models((20, 12), 2)
    update, other, base = update.to(dtype), other.to(dtype), base.to(dtype)
    zero = torch.zeros_like(base)
    assert torch.equal(merge(name, [zero, zero], base), base)
    alone = merge(name, [update], base)
    if name in ("tsv_m", "wudi"):
        assert torch.equal(alone, base + update)
    else:  # a flat spectrum of the same sum, with the same vectors
        want = whole_iso_c([(base + update - base).double()])
        torch.testing.assert_close((alone - base).double(), want, rtol=0, atol=1e-4 * float(want.norm()))
    # beside a zero update the other one is merged as if by itself, with the share of singular values that K = 2 leaves
    beside = merge(name, [update, zero], base).double() - base.double()
    if name == "tsv_m":
        u, s, vh = torch.linalg.svd(update.double(), full_matrices=False)
        want = u[:, :6] @ torch.diag(s[:6]) @ vh[:6]
        assert float((beside - want).norm() / want.norm()) < 1e-4
    assert bool(beside.isfinite().all()) and 0 < float(beside.norm()) < 3 * float(update.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(24, 15), (15, 24), (16, 16)], ids=str)
def test_copies_of_a_source_are_counted_once(shape: tuple[int, int], dtype: torch.dtype) -> None:
    (update,), base = models(shape, 1)
    update, base = update.to(dtype), torch.zeros(shape, dtype=dtype)
    close = 1e-5 if dtype == torch.float64 else 1e-3
    u, s, vh = torch.linalg.svd(update.double(), full_matrices=False)

    def error(got: Tensor, want: Tensor) -> float:
        return float((got.double() - want).norm() / want.norm())

    rank = min(shape) // 3
    truncated = u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]
    assert error(merge("tsv_m", [update] * 3, base), truncated) < close
    assert error(merge("iso_c", [update] * 3, base), 3 * s.mean() * u @ vh) < close
    exact = {"filter_type": "none", "truncate_rank_ratio": 1.0}
    assert error(merge("wudi", [update] * 3, base, **exact), update.double()) < 20 * close
    assert error(merge("wudi", [update] * 3, base, filter_type="ridge"), update.double()) < close
    # the copies' own directions are the same, so they add none: what is there is orthonormal up to its length
    got = merge("iso_cts", [update] * 3, base).double()
    values = torch.linalg.svdvals(got)
    kept = values > 1e-3 * values[0]
    assert int(kept.sum()) == min(shape) - 2 * round((min(shape) - int(min(shape) * 0.8)) / 3)
    assert float(values[kept].std() / values[0]) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(30, 20), (20, 30)], ids=str)
def test_low_rank_updates_stay_in_their_spans(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Rank 3 each: no directions are made up, as arbitrary singular vectors of zero would be."""
    generator = torch.Generator().manual_seed(3)
    left = torch.randn(2, shape[0], 3, generator=generator, dtype=dtype)
    right = torch.randn(2, 3, shape[1], generator=generator, dtype=dtype)
    updates, base = list(left @ right), torch.zeros(shape, dtype=dtype)
    span, _ = torch.linalg.qr(torch.cat(list(left), dim=1).double())
    for name, whole in WHOLE.items():
        got = merge(name, updates, base).double()
        assert float((got - span @ span.T @ got).norm() / got.norm()) < 1e-4
        values = torch.linalg.svdvals(got)
        assert int((values > 1e-4 * values[0]).sum()) == 6
        if name == "iso_c":
            s = torch.linalg.svdvals((updates[0] + updates[1]).double())[:6]
            torch.testing.assert_close(values[:6], s.mean().expand(6), rtol=1e-4, atol=0)
        if name == "wudi":
            want = whole([update.double() for update in updates])
            assert float((got - want).norm() / want.norm()) < 1e-4
    # the objective of WUDI at its exact minimum is zero: no source is disturbed
    got = merge("wudi", updates, base, filter_type="none", truncate_rank_ratio=1.0)
    for update in updates:
        assert float(((got - update) @ update.T).norm() / update.norm() ** 2) < 1e-3


@given(seed=SEED, K=st.integers(2, 4))
@settings(max_examples=10, deadline=None)
def test_the_order_of_the_sources_is_irrelevant(seed: int, K: int) -> None:
    updates, base = models((14, 11), K, seed)
    for name in METHODS:
        allowed = ALLOWED.get(name, 1e-9)
        torch.testing.assert_close(merge(name, updates[::-1], base), merge(name, updates, base), rtol=0, atol=allowed)


def test_more_sources_than_the_short_side_allows() -> None:
    updates, base = models((9, 30), 12)
    for name in METHODS:
        moved = merge(name, updates, base) - base
        assert bool(moved.isfinite().all()) and float(moved.norm()) > 0


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_stay_where_they_are(name: str, value: float) -> None:
    updates, base = models((12, 10), 2)
    want = base + (updates[0] + updates[1]) / 2
    updates[1][3, 4] = value
    got = merge(name, updates, base, 32)
    assert (~got.isfinite()).nonzero().tolist() == [[3, 4]]
    torch.testing.assert_close(got[got.isfinite()], want[got.isfinite()], rtol=0, atol=1e-12)


def test_parameters_are_those_of_the_papers() -> None:
    common = {"weight": (1.0,), "lambda": 1.0, "embeddings": "average"}
    filters = {"filter_type": "exponential", "exp_time": 300.0, "truncate_rank_ratio": 0.85, "ridge": 0.1}
    wanted = {
        "tsv_m": common, "iso_c": common, "iso_cts": common | {"common_space_fraction": 0.8},
        "wudi": common | filters | {"init_mode": None},
    }  # fmt: skip
    for name, defaults in wanted.items():
        method = method_named(name)
        assert {key: p.default for key, p in method.parameters.items()} == defaults
        assert method.base == "required" and not method.exact


@pytest.mark.parametrize("name", METHODS)
def test_memory_does_not_grow_with_the_sources(name: str) -> None:
    method = method_named(name)
    values = {p.keyword: p.default for p in method.parameters.values()}
    few, many = (method.resident((4096, 4096), K, values) for K in (3, 30))
    assert 4 * 4096 * 4096 < many < 1.01 * few < 800 << 20
    assert method.resident((200_000, 1024), 3, values) < 320 << 20  # in panels
    assert method.resident((4096,), 3, values) == 0


@pytest.mark.parametrize("name", METHODS)
def test_through_the_engine(name: str, llama: Callable[..., Path], recipe: Callable[..., Path], tmp_path: Path) -> None:
    folders = [llama(letter, dtype=torch.bfloat16) for letter in "ab"]
    base = llama("base", dtype=torch.bfloat16)
    report = yeam.merge(recipe(*folders, merge_method=name, base_model=base), tmp_path / "out", device="cpu")
    tensors = [load_file(folder / "model.safetensors") for folder in (base, *folders)]
    for key, got in load_file(tmp_path / "out" / "model.safetensors").items():
        origin, *updates = (tensor[key].double() for tensor in tensors)
        updates = [update - origin for update in updates]
        plain = origin.ndim == 1 or "embed" in key or "lm_head" in key
        want = origin + (sum(updates) / 2 if plain else WHOLE[name](updates))
        assert float((got.double() - want).norm() / want.norm()) < 4e-3, key
    facts = {entry["name"]: entry for entry in report.tensors}
    if name != "wudi":
        assert 0 < facts["model.layers.0.self_attn.q_proj.weight"]["update"]["rank"] <= 16


def test_a_real_merge_loads_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    settings = {"iso_cts": {}, "wudi": {"filter_type": "ridge"}}
    for name, parameters in settings.items():
        recipe = {
            "merge_method": name,
            "base_model": str(FAMILY / "base"),
            "models": [{"model": str(FAMILY / expert)} for expert in ("code", "names")],
            "parameters": parameters,
        }
        yeam.merge(recipe, tmp_path / name, device="cpu")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        ids = tokenizer("def main(", return_tensors="pt").input_ids
        with torch.inference_mode():
            loss = float(model(input_ids=ids, labels=ids).loss)
            assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]
        assert loss < 8


def test_bad_input_is_refused_in_time(llama: Callable[..., Path], recipe: Callable[..., Path], tmp_path: Path) -> None:
    a, b = llama("a"), llama("b")
    with pytest.raises(ConfigError, match="needs a base model"):
        yeam.plan(recipe(a, b, merge_method="tsv_m"))
    for name, parameters, said in (
        ("iso_cts", {"common_space_fraction": 1.5}, "less than or equal to 1"),
        ("wudi", {"truncate_rank_ratio": 0}, "greater than 0"),
        ("wudi", {"filter_type": "tikhonov"}, "'exponential', 'ridge' or 'none'"),
        ("iso_c", {"embeddings": "spectral"}, "'average', 'base' or 'matrix'"),
    ):
        with pytest.raises(ConfigError, match=said):
            yeam.plan(recipe(a, merge_method=name, base_model=b, parameters=parameters))
    broken = load_file(b / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    broken[2, 3] = math.nan
    c = llama("c", change={"model.layers.0.self_attn.q_proj.weight": broken})
    with pytest.raises(CheckpointError, match=r"q_proj\.weight holds nan at element 35"):
        yeam.merge(recipe(a, c, merge_method="iso_c", base_model=b), tmp_path / "out", device="cpu")
