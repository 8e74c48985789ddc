"""Consensus TA, PCB and MetaGPT against the papers' formulas on whole float64 tensors.

Legend: K sources.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from held_inputs import HeldInputs, outcome
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import yeam
from yeam.errors import CheckpointError, ConfigError
from yeam.methods import method_named, selection

FAMILY = Path(__file__).parents[1] / "examples" / "tiny-family" / "models"
METHODS = ("consensus_ta", "pcb", "metagpt")
SEED = st.integers(0, 2**31)
TILE = st.sampled_from([23, 64, 1 << 18])
SHAPES = st.sampled_from([(), (1, 1), (7,), (150,), (3, 50), (12, 13), (2, 5, 8), (4, 3, 1, 1)])


@pytest.fixture(autouse=True, scope="module")
def _small_steps() -> Iterator[None]:
    """float64 is searched in more, smaller steps, which is faster where tensors are tiny."""
    with patch.object(selection, "PART_BITS", 10):
        yield


def merge(name: str, sources: Sequence[Tensor], base: Tensor, tile: int = 1 << 18, **values: Any) -> Tensor:
    """The registered method on tensors in memory, with its defaults unless told otherwise, as the engine runs it."""
    method = method_named(name)
    full = {}
    for parameter in method.parameters.values():
        default = parameter.default * len(sources) if parameter.per_source else parameter.default
        full[parameter.keyword] = values.pop(parameter.name, default)
    assert not values
    inputs = HeldInputs(torch.stack(list(sources)), base, tuple(base.shape), tile)
    with torch.inference_mode():
        return outcome(method, inputs, full).view(base.shape)


def models(shape: tuple[int, ...], K: int, seed: int = 0, coarse: bool = False) -> tuple[list[Tensor], Tensor]:
    """Sources and base, float64; `coarse` ones differ by multiples of 1/4 and often not at all, so that numbers are equal."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    updates = 0.3 * torch.randn(K, *shape, generator=generator, dtype=torch.float64)
    if coarse:
        base, updates = (base * 4).round() / 4, (updates * 4).round() / 4
    return [base + update for update in updates], base


# The formulas. v: the weighted updates, [K, size].


def whole_consensus_ta(v: Tensor, tall_mask_lambda: Sequence[float], prun_thre_k: int) -> Tensor:
    total = v.sum(dim=0)
    masks = torch.stack([x.abs() > bound * (total - x).abs() for x, bound in zip(v, tall_mask_lambda)])
    return total * (masks.sum(dim=0) >= prun_thre_k)


def whole_pcb(v: Tensor, pcb_ratio: float, min_ratio: float, max_ratio: float) -> Tensor:
    """With the two answers where the released code divides 0 by 0: the magnitudes, or the highest scores, are all equal."""
    K, size = v.shape
    ordered = v.abs().sort(dim=1).values
    low = ordered[:, min(int(size * min_ratio), size - 1), None]
    high = ordered[:, min(max(int(size * (1 - max_ratio) - 1), 0), size - 1), None]
    clamped = torch.minimum(torch.maximum(v.abs(), low), high)
    unit = torch.where(high > low, (clamped - low) / (high - low), 0.0)
    score = torch.exp(K * unit**2) * torch.tanh(v * v.sum(dim=0))
    ordered = score.sort(dim=1).values
    low, high = ordered[:, min(int(size * (1 - pcb_ratio)), size - 1), None], ordered[:, -1:]
    share = torch.where(
        high > low, (score.clamp(min=low) - low) / (high - low), ((score >= high) & (score > 0)).double()
    )
    return (v.sign() * clamped * share).sum(dim=0) / share.sum(dim=0).clamp(min=1e-12)


def whole_metagpt(v: Tensor) -> Tensor:
    squares = v.square().sum(dim=1)
    return (v * squares[:, None] / squares.sum()).sum(dim=0) if squares.sum() > 0 else v.sum(dim=0)


def stacked(sources: Sequence[Tensor], base: Tensor, weight: Sequence[float] | None = None) -> Tensor:
    rows = torch.stack([(source - base).flatten() for source in sources])
    return rows if weight is None else rows * torch.tensor(weight, dtype=rows.dtype)[:, None]


@given(K=st.integers(2, 4), shape=SHAPES, coarse=st.booleans(), tile=TILE, seed=SEED, data=st.data())
@settings(max_examples=40, deadline=None)
def test_consensus_is_the_formula(
    K: int, shape: tuple[int, ...], coarse: bool, tile: int, seed: int, data: st.DataObject
) -> None:
    sources, base = models(shape, K, seed, coarse)
    weight = tuple([1.0, 0.5, 2.0, -1.0][:K])
    bounds = tuple(data.draw(st.lists(st.sampled_from([0.0, 0.2, 0.6, 1.0, 6.0]), min_size=K, max_size=K)))
    least = data.draw(st.integers(0, K))
    given = {"weight": weight, "tall_mask_lambda": bounds, "prun_thre_k": least, "lambda": 0.7}
    want = base + 0.7 * whole_consensus_ta(stacked(sources, base, weight), bounds, least).view(shape)
    torch.testing.assert_close(merge("consensus_ta", sources, base, tile, **given), want, rtol=0, atol=1e-12)


@given(
    K=st.integers(1, 4), shape=SHAPES, coarse=st.booleans(), tile=TILE, seed=SEED,
    ratio=st.sampled_from([0.05, 0.1, 0.3, 0.9, 1.0]), ends=st.sampled_from([(1e-4, 1e-4), (0.0, 0.0), (0.3, 0.1)]),
    opposed=st.booleans(),
)  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_pcb_is_the_formula(
    K: int, shape: tuple[int, ...], coarse: bool, tile: int, seed: int, ratio: float, ends: tuple[float, float], opposed: bool
) -> None:  # fmt: skip
    sources, base = models(shape, K, seed, coarse)
    if opposed:  # most scores of a source are negative: the threshold may be, too
        sources[0] = base - 0.3 * sum(source - base for source in sources)
    weight = tuple([1.0, 0.5, 2.0, -1.0][:K])
    given = {"pcb_ratio": ratio, "min_ratio": ends[0], "max_ratio": ends[1]}
    want = base + 1.2 * whole_pcb(stacked(sources, base, weight), **given).view(shape)
    got = merge("pcb", sources, base, tile, weight=weight, **given)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


@given(K=st.integers(1, 4), shape=SHAPES, coarse=st.booleans(), tile=TILE, seed=SEED)
@settings(max_examples=40, deadline=None)
def test_metagpt_is_the_formula(K: int, shape: tuple[int, ...], coarse: bool, tile: int, seed: int) -> None:
    sources, base = models(shape, K, seed, coarse)
    want = base + whole_metagpt(stacked(sources, base)).view(shape)
    torch.testing.assert_close(merge("metagpt", sources, base, tile), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_tiles_make_no_difference(name: str) -> None:
    sources, base = models((60, 70), 3)
    sources, base = [source.float() for source in sources], base.float()
    whole = merge(name, sources, base)
    for tile in (64, 999):
        got = merge(name, sources, base, tile)
        if name == "metagpt":  # its sums are added up tile by tile
            torch.testing.assert_close(got, whole, rtol=0, atol=1e-6)
        else:
            assert torch.equal(got, whole)


@pytest.mark.parametrize("name", METHODS)
def test_float32_is_close_to_the_formula(name: str) -> None:
    sources, base = models((60, 70), 3)
    sources, base = [source.float() for source in sources], base.float()
    v = stacked([source.double() for source in sources], base.double())
    want = {
        "consensus_ta": lambda: whole_consensus_ta(v, [0.4] * 3, 2),
        "pcb": lambda: 1.2 * whole_pcb(v, 0.1, 1e-4, 1e-4),
        "metagpt": lambda: whole_metagpt(v),
    }[name]()
    got = merge(name, sources, base, 512).double() - base.double()
    assert (
        float((got.flatten() - want).norm() / want.norm()) < 1e-3
    )  # an element at the threshold may fall on either side


def test_consensus_by_hand() -> None:
    updates = torch.tensor([[1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, -0.9], [1.0, 0.1, 0.0, 0.0]]).double()
    base = torch.full((4,), 2.0, dtype=torch.float64)
    sources = list(base + updates)
    kept = {0: [3.0, 1.1, 0.0, 0.1], 1: [3.0, 1.1, 0.0, 0.1], 2: [3.0, 0.0, 0.0, 0.1], 3: [3.0, 0.0, 0.0, 0.0]}
    for least, want in kept.items():  # 0 drops nothing; 1 what no one needs (it is zero here); 2 what one alone needs
        got = merge("consensus_ta", sources, base, prun_thre_k=least)
        torch.testing.assert_close(got - base, torch.tensor(want, dtype=torch.float64))


def test_pcb_drops_what_is_small_or_opposed() -> None:
    """Of ten elements three are kept: source 0 leads the first, source 1 the last, and both share one in the middle."""
    base = torch.zeros(10, dtype=torch.float64)
    updates = torch.zeros(2, 10, dtype=torch.float64)
    updates[0, :2], updates[1, 8:], updates[:, 5] = torch.tensor([0.9, 0.1]), torch.tensor([0.1, -0.9]), 0.7
    updates[1, 0] = -0.1
    got = merge("pcb", list(updates), base, min_ratio=0.0, max_ratio=0.0, pcb_ratio=0.3, **{"lambda": 1.0})
    assert got.nonzero().flatten().tolist() == [0, 5, 9]
    assert float(got[5]) == pytest.approx(0.7) and float(got[0]) > 0 > float(got[9])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zero_updates_copies_and_one_source(dtype: torch.dtype) -> None:
    (source, other), base = models((20, 12), 2)
    source, other, base = source.to(dtype), other.to(dtype), base.to(dtype)
    update = source - base
    close = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 1e-12}
    for name in METHODS:
        assert torch.equal(merge(name, [base, base], base), base)
    torch.testing.assert_close(merge("metagpt", [source], base), source, **close)
    torch.testing.assert_close(merge("metagpt", [source] * 3, base), source, **close)
    torch.testing.assert_close(merge("metagpt", [source, base], base), source, **close)
    torch.testing.assert_close(merge("consensus_ta", [source] * 3, base), base + 3 * update, **close)
    assert torch.equal(merge("consensus_ta", [source, base], base), base)  # only one needs it
    for sources in ([source], [source] * 3, [source, base]):  # its largest tenth, with clamped outliers, 1.2 times
        moved = merge("pcb", sources, base) - base
        kept = moved != 0
        assert 0 < int(kept.sum()) <= 24
        assert float(update.abs()[kept].min()) >= float(update.abs()[~kept].max())
        inside = kept & (update.abs() < update.abs().max())
        torch.testing.assert_close(moved[inside], 1.2 * update[inside], **close)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_are_seen_where_they_are(name: str, value: float) -> None:
    sources, base = models((30, 10), 2)
    sources[1][3, 4] = value
    got = merge(name, sources, base, 64)
    assert (~got.isfinite()).nonzero().tolist() == [[3, 4]]
    if name == "metagpt":
        finite = [source.nan_to_num(nan=0.0, posinf=0.0) for source in sources]
        finite[1][3, 4] = base[3, 4]
        want = base + whole_metagpt(stacked(finite, base)).view(base.shape)
        torch.testing.assert_close(got[got.isfinite()], want[got.isfinite()])


def test_parameters_are_those_of_the_papers() -> None:
    wanted = {
        "consensus_ta": {"weight": (1.0,), "tall_mask_lambda": (0.4,), "prun_thre_k": 2, "lambda": 1.0},
        "pcb": {"weight": (1.0,), "pcb_ratio": 0.1, "min_ratio": 1e-4, "max_ratio": 1e-4, "lambda": 1.2},
        "metagpt": {"weight": (1.0,), "lambda": 1.0},
    }
    for name, defaults in wanted.items():
        method = method_named(name)
        assert {key: p.default for key, p in method.parameters.items()} == defaults
        assert method.base == "required" and not method.exact


def family(folders: Sequence[Path]) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    base, *experts = ({n: t.double() for n, t in load_file(f / "model.safetensors").items()} for f in folders)
    return base, [{name: expert[name] - origin for name, origin in base.items()} for expert in experts]


@pytest.mark.parametrize("name", METHODS)
def test_through_the_engine(name: str, llama: Callable[..., Path], recipe: Callable[..., Path], tmp_path: Path) -> None:
    """MetaGPT's coefficients are those of whole models, the same for every tensor. PCB's tanh must not saturate: equal scores."""
    weight = 0.1 if name == "pcb" else 1.0
    folders = [llama(letter, dtype=torch.bfloat16) for letter in ("base", "a", "b", "c")]
    small = {key: t + 1 for key, t in load_file(folders[0] / "model.safetensors").items()}  # of a length of its own
    folders.append(llama("d", dtype=torch.bfloat16, change=small))
    report = yeam.merge(
        recipe(*folders[1:], merge_method=name, base_model=folders[0], parameters={"weight": weight}),
        tmp_path / "out",
        device="cpu",
    )
    base, updates = family(folders)
    squares = torch.tensor([sum(float(u.square().sum()) for u in update.values()) for update in updates])
    for key, got in load_file(tmp_path / "out" / "model.safetensors").items():
        v = torch.stack([weight * update[key].flatten() for update in updates])
        want = {
            "consensus_ta": lambda v=v: whole_consensus_ta(v, [0.4] * 4, 2),
            "pcb": lambda v=v: 1.2 * whole_pcb(v, 0.1, 1e-4, 1e-4),
            "metagpt": lambda v=v: (v * (squares / squares.sum()).double()[:, None]).sum(dim=0),
        }[name]()
        want = base[key] + want.view(base[key].shape)
        assert float((got.double() - want).norm() / want.norm()) < 4e-3, key
    if name == "metagpt":
        noted = [entry["update"]["coefficients"] for entry in report.tensors]
        assert all(row == noted[0] for row in noted)
        torch.testing.assert_close(torch.tensor(noted[0]), (squares / squares.sum()).float())


def test_coefficients_survive_an_interrupted_run(
    llama: Callable[..., Path], recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """A run that continues has the sums of the whole model, not of the tensors that are left; lanes make no difference."""
    folders = [llama(letter) for letter in ("base", "a", "b")]
    path = recipe(*folders[1:], merge_method="metagpt", base_model=folders[0])
    yeam.merge(path, tmp_path / "whole", device="cpu", memory="4GiB")

    class Stop(Exception):
        pass

    def stop(progress: Any) -> None:
        if progress.tensors == 8:
            raise Stop

    with pytest.raises(Stop):
        yeam.merge(path, tmp_path / "parts", device="cpu", progress=stop)
    report = yeam.merge(path, tmp_path / "parts", device="cpu")
    assert report.resumed >= 8
    whole, parts = (load_file(tmp_path / out / "model.safetensors") for out in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)


def test_models_that_share_no_tensors_have_sums_of_their_own(
    llama: Callable[..., Path], recipe: Callable[..., Path], tmp_path: Path
) -> None:
    base, a, b, c = (llama(letter) for letter in ("base", "a", "b", "c"))
    slices = [
        {"sources": [{"model": str(model), "layer_range": [layer, layer + 1]} for model in models]}
        for layer, models in enumerate([(base, a, b), (base, a, c)])
    ]
    report = yeam.merge(recipe(merge_method="metagpt", base_model=base, slices=slices), tmp_path / "out", device="cpu")
    noted = {json.dumps(entry["update"]["coefficients"]) for entry in report.tensors if entry["layer"] is not None}
    assert len(noted) == 2
    base_, updates = family([base, a, c])
    second = [key for key in base_ if ".layers.1." in key]
    squares = torch.tensor([sum(float(update[key].square().sum()) for key in second) for update in updates])
    layer = next(e["update"]["coefficients"] for e in report.tensors if e["layer"] == 1)
    assert layer[0] == pytest.approx(float(squares[0] / squares.sum()), rel=0.02)


def test_bad_input_is_refused_in_time(llama: Callable[..., Path], recipe: Callable[..., Path], tmp_path: Path) -> None:
    a, b = llama("a"), llama("b")
    with pytest.raises(ConfigError, match="takes 2 or more models beside the base, and there are 1"):
        yeam.plan(recipe(a, merge_method="consensus_ta", base_model=b))
    for name, parameters, said in (
        ("pcb", {"pcb_ratio": 0}, "greater than 0"),
        ("pcb", {"max_ratio": 1}, "less than 1"),
        ("consensus_ta", {"prun_thre_k": -1}, "greater than or equal to 0"),
        ("consensus_ta", {"prun_thre_k": 3}, "no element is in more than 2 masks"),
        ("metagpt", {"density": 1}, "has no parameter 'density'"),
    ):
        with pytest.raises(ConfigError, match=said):
            yeam.plan(recipe(a, a, merge_method=name, base_model=b, parameters=parameters))
    broken = load_file(b / "model.safetensors")["model.norm.weight"]
    broken[2] = math.inf
    c = llama("c", change={"model.norm.weight": broken})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds inf at element 2"):
        yeam.merge(recipe(a, c, merge_method="metagpt", base_model=b), tmp_path / "out", device="cpu")


def test_a_real_merge_loads_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    experts = ("code", "prose", "numbers")
    recipe = {
        "merge_method": "metagpt",
        "base_model": str(FAMILY / "base"),
        "models": [{"model": str(FAMILY / expert)} for expert in experts],
    }
    report = yeam.merge(recipe, tmp_path / "merged", device="cpu")
    assert sum(report.tensors[0]["update"]["coefficients"]) == pytest.approx(1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    ids = tokenizer("def main(", return_tensors="pt").input_ids
    with torch.inference_mode():
        assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]
        assert float(model(input_ids=ids, labels=ids).loss) < 8
