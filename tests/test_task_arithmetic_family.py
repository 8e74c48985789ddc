"""Methods on task vectors against formulas over whole tensors, bit for bit in every dtype; selection; random numbers.

Legend: K sources.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from held_inputs import HeldInputs, outcome
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import yeam
from yeam.methods import Tile, choices, method_named, mixing, random_bits, row_ranks, selection, statistics
from yeam.methods.random_bits import RandomBits, _TorchWords, stream_key
from yeam.methods.selection import Cutter, largest

SETTINGS = settings(max_examples=80, deadline=None)
SEED = st.integers(0, 2**31)
TILE = st.sampled_from([7, 64, 1 << 18])
WAY = st.sampled_from(["usual", "blocks", "device"])
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
COMMON = {"weight": ..., "density": 1.0, "rescale": False, "normalize": False, "lambda": 1.0, "int8_mask": False}
DEFAULTS: dict[str, dict[str, Any]] = {  # as mergekit 0.1.4 declares them, and the seed; ... is required
    "task_arithmetic": COMMON,
    "ties": COMMON | {"normalize": True},
    "dare_linear": COMMON | {"rescale": True, "seed": 0},
    "dare_ties": COMMON | {"rescale": True, "seed": 0},
    "breadcrumbs": COMMON | {"gamma": 0.01},
    "breadcrumbs_ties": COMMON | {"gamma": 0.01},
    "della": COMMON | {"normalize": True, "rescale": True, "epsilon": 0.15, "seed": 0},
    "della_linear": COMMON | {"rescale": True, "epsilon": 0.15, "seed": 0},
}
PER_SOURCE = ("weight", "density", "gamma", "epsilon")


def merge(name: str, sources: Tensor, base: Tensor, tile: int = 1 << 18, tensor: str = "w", **values: Any) -> Tensor:
    """The registered method on tensors in memory, with its defaults unless told otherwise."""
    method = method_named(name)
    full = {}
    for parameter in method.parameters.values():
        default = (parameter.default or (None,)) * len(sources) if parameter.per_source else parameter.default
        full[parameter.keyword] = values.pop(
            parameter.name, default[: len(sources)] if parameter.per_source else default
        )
    assert not values
    inputs = HeldInputs(sources, base, tuple(base.shape), tile, tensor, exact=True)  # as the formulas below round
    return outcome(method, inputs, full).view(base.shape)


@contextmanager
def worked_through(way: str) -> Iterator[None]:
    """In small blocks; or as on a device that is not the CPU, without numpy and compiled loops; or as usual."""
    with ExitStack() as patches:
        if way == "blocks":
            for module, name, value in (
                (row_ranks, "BLOCK", 10), (selection, "PENDING", 10), (selection, "PART_BITS", 5),
                (selection, "SAMPLED", 60), (selection, "WINDOWS", 4), (selection, "WINDOW", 4), (selection, "SIGMAS", 1.0),
            ):  # fmt: skip
                patches.enter_context(patch.object(module, name, value))
        if way == "device":
            for module in (statistics, random_bits, row_ranks):
                patches.enter_context(patch.object(module, "on_cpu", lambda device: False))
            for module in (statistics, row_ranks, selection, mixing, choices):
                patches.enter_context(patch.object(module, "is_compiled", lambda x: False))
        yield


# The formulas, on whole tensors and in the order of operations that decides how half precision rounds.


def by_magnitude(delta: Tensor) -> Tensor:
    """Indices of the elements, the largest magnitude first; of equal ones the first."""
    return delta.flatten().double().abs().sort(descending=True, stable=True).indices


def uniform(seed: int, tensor: str, k: int, size: int) -> Tensor:
    """A number in [0, 1) for each element, from SplitMix64 in Python's integers."""
    key = int.from_bytes(hashlib.blake2b(f"{seed}\n{k}\n{tensor}".encode(), digest_size=8).digest(), "little")
    numbers = []
    for pair in range((size + 1) // 2):
        z = (key + (pair + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        z ^= z >> 31
        numbers += [(z % 2**31) / 2**31, (z >> 32) % 2**31 / 2**31]
    return torch.tensor(numbers[:size], dtype=torch.float64)


def kept(name: str, delta: Tensor, k: int, given: dict[str, Any]) -> Tensor:
    """1 for the elements of source k's update that stay, 0 for the others."""
    size, density = delta.numel(), given["density"][k] if "density" in given else 1.0
    mask = torch.zeros(size, dtype=delta.dtype)
    if density >= 1 or name == "task_arithmetic":
        mask += 1
    elif density > 0 and name == "ties":
        mask[by_magnitude(delta)[: int(density * size)]] = 1
    elif density > 0 and name.startswith("breadcrumbs"):
        stay = int(density * size)
        top = min(int(given["gamma"][k] * size), size - stay)
        mask[by_magnitude(delta)[top : top + stay]] = 1
    elif density > 0 and name.startswith("dare"):
        mask[uniform(given["seed"], "w", k, size) < density] = 1
    elif density > 0:
        columns = next((n for n in reversed(delta.shape) if n > 1), 1)
        magnitude = delta.reshape(-1, columns).double().abs()
        rank = magnitude.argsort(dim=1, stable=True).argsort(dim=1).double()
        across = rank / (columns - 1) if columns > 1 else torch.full_like(rank, 0.5)
        probability = density - given["epsilon"][k] + 2 * given["epsilon"][k] * across
        mask[uniform(given["seed"], "w", k, size) < (probability * 2**31).round().flatten() / 2**31] = 1
    return mask.view(delta.shape)


def expected(name: str, sources: Tensor, base: Tensor, given: dict[str, Any]) -> Tensor:
    """The merged tensor, in the dtype of the inputs."""
    dtype = base.dtype
    weight = torch.tensor(given["weight"], dtype=dtype).view(-1, *[1] * base.ndim)
    deltas = []
    for k, source in enumerate(sources):
        delta = source - base
        sparse = delta * kept(name, delta, k, given)
        factor = torch.float32 if dtype == torch.float64 else dtype
        before, after = (float(d.double().abs().sum().to(factor)) for d in (delta, sparse))
        if given["rescale"] and name != "task_arithmetic" and min(before, after) >= 1e-7:
            sparse = sparse * torch.tensor(before / after, dtype=torch.float64).to(factor).to(dtype)
        deltas.append(sparse)
    weighted = torch.stack(deltas) * weight
    if name in ("ties", "dare_ties", "breadcrumbs_ties", "della"):
        majority = torch.where(weighted.sum(dim=0) >= 0, 1, -1)
        agrees = weighted.sign() == majority
        mixed, divisor = (weighted * agrees).sum(dim=0), (weight * agrees).sum(dim=0)
        divisor[divisor == 0] = 1
    else:
        mixed, divisor = weighted.sum(dim=0), weight.sum(dim=0)
        divisor[divisor.abs() < 1e-8] = 1
    if given["normalize"]:
        mixed = mixed / divisor
    if given["lambda"] != 1:
        mixed = mixed * given["lambda"]
    return base + mixed


def models(K: int, shape: tuple[int, ...], dtype: torch.dtype, coarse: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Sources and base; `coarse` ones differ by multiples of 1/4 and often not at all, so that magnitudes are equal."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    delta = 0.3 * torch.randn(K, *shape, generator=generator, dtype=torch.float64)
    if coarse:
        base, delta = (base * 4).round() / 4, (delta * 4).round() / 4
    return (base + delta).to(dtype), base.to(dtype)


@pytest.mark.parametrize("name", DEFAULTS)
def test_parameters_and_defaults_are_mergekits(name: str) -> None:
    method = method_named(name)
    found = {
        p.name: ... if p.required else p.default[0] if p.per_source else p.default for p in method.parameters.values()
    }
    assert found == DEFAULTS[name]
    assert {p.name for p in method.parameters.values() if p.per_source} == found.keys() & set(PER_SOURCE)
    assert method.base == "required"


@given(
    name=st.sampled_from([*DEFAULTS]),
    K=st.integers(1, 4),
    shape=st.sampled_from([(), (1, 1), (7,), (9, 1), (150,), (3, 50), (12, 13), (2, 5, 8), (4, 3, 1, 1)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    coarse=st.booleans(),
    tile=TILE,
    way=WAY,
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    lambda_=st.sampled_from([1.0, 0.7]),
    seed=SEED,
    data=st.data(),
)
@settings(max_examples=250, deadline=None)
def test_equals_the_formula_bit_for_bit(name, K, shape, dtype, coarse, tile, way, flags, lambda_, seed, data) -> None:
    sources, base = models(K, shape, dtype, coarse, seed)

    def each(*values: float) -> tuple[float, ...]:
        return tuple(data.draw(st.lists(st.sampled_from(values), min_size=K, max_size=K)))

    given = {"weight": each(0.3, 1.0, 0.55, -0.3, 0.0), "density": each(0.5, 0.29, 0.8, 1.0, 0.0, 0.001)}
    given |= dict(zip(("normalize", "rescale", "int8_mask"), flags)) | {"lambda": lambda_}
    if name.startswith("breadcrumbs"):
        given["gamma"] = each(0.01, 0.2, 0.0, 0.7)
    if name.startswith("della"):
        given |= {"density": each(0.5, 0.29, 0.8, 1.0, 0.0), "epsilon": each(0.15, 0.01)}
    if name.startswith(("dare", "della")):
        given["seed"] = seed % 3
    with worked_through(way):
        merged = merge(name, sources, base, tile, **given)
    integers = BITS[dtype.itemsize]
    assert torch.equal(merged.view(integers), expected(name, sources, base, given).view(integers))


@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), tile=TILE, way=WAY, seed=SEED, data=st.data()
)
@SETTINGS
def test_selection_is_exact(dtype: torch.dtype, tile: int, way: str, seed: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    tiny = torch.finfo(dtype).tiny
    scales = torch.tensor([0.0, tiny / 8, tiny, 1e-3, 1.0, 1.0 + 2**-7, 3e38], dtype=torch.float64)
    x = (
        scales[torch.randint(0, len(scales), (2, 90), generator=generator)]
        * torch.randn(2, 1, generator=generator).sign()
    )
    x[1, :60] = torch.randn(60, generator=generator)
    sources = x.to(dtype)
    counts = data.draw(st.lists(st.integers(0, 91), min_size=1, max_size=3))
    inputs = HeldInputs(sources, torch.zeros(90, dtype=dtype), (90,), tile)
    with worked_through(way):
        cuts = largest(inputs, [counts, counts])
    for k, row in enumerate(cuts):
        for cut, count in zip(row, counts):
            cutter, parts = Cutter(cut), [part.clone() for part in sources[k].split(tile)]
            with worked_through(way):
                for part in parts:
                    cutter(part)
            order = by_magnitude(sources[k])
            wanted = sources[k].clone()
            wanted[order[count:]] = 0.0
            assert torch.equal(torch.cat(parts), wanted)
            if 0 < count < 90:
                assert cut.value == abs(float(sources[k][order[count - 1]]))


class CountedInputs(HeldInputs):
    """Notes the elements that each pass reads."""

    def tiles(
        self, start: int = 0, stop: int | None = None, *, base_only: bool = False, unit: int = 1
    ) -> Iterator[Tile]:
        self.record(read=(math.prod(self.shape) if stop is None else stop) - start)
        return super().tiles(start, stop, base_only=base_only, unit=unit)


@pytest.mark.parametrize(("dtype", "passes"), [(torch.bfloat16, 1), (torch.float32, 2), (torch.float64, 4)])
def test_selection_counts_in_passes(dtype: torch.dtype, passes: int) -> None:
    sources, base = models(2, (40,), dtype, False, 1)
    inputs = CountedInputs(sources, base, (40,))
    largest(inputs, [[5, 20], [40]])
    assert inputs.facts == passes * [{"read": 40}]
    largest(inputs, [[0], [40]])
    assert len(inputs.facts) == passes  # nothing to look for


@pytest.mark.parametrize("misled", [False, True])
def test_large_tensors_are_sampled(misled: bool) -> None:
    size = 1 << 20
    delta = torch.randn(size, generator=torch.Generator().manual_seed(1))
    if misled:
        for start, stop in selection._windows((1024, 1024)):
            delta[start:stop] = 0.0
    inputs = CountedInputs(delta[None], torch.zeros(size), (1024, 1024))
    counts = [size // 1000, size // 2]
    cuts = largest(inputs, [counts])[0]
    order = delta.abs().sort(descending=True).values
    assert [cut.value for cut in cuts] == [float(order[count - 1]) for count in counts]
    passes = [fact["read"] for fact in inputs.facts]
    assert passes.count(size) == (1 if not misled else 3)
    assert sum(passes) - passes.count(size) * size == 16 * 4096


def test_breadcrumbs_without_outliers_keeps_the_rest() -> None:
    """mergekit zeroes the whole update where gamma · size is less than 1."""
    delta = torch.tensor([[4.0, -3.0, 2.0, 1.0]])
    assert merge("breadcrumbs", delta, torch.zeros(4), weight=(1.0,), density=(0.5,)).tolist() == [4.0, -3.0, 0.0, 0.0]
    assert merge("breadcrumbs", delta, torch.zeros(4), weight=(1.0,), density=(0.5,), gamma=(0.25,)).tolist() == [
        0.0, -3.0, 2.0, 0.0,
    ]  # fmt: skip


def test_rescaling_does_not_overflow_float16() -> None:
    sources, base = models(1, (4000,), torch.float16, False, 0)
    sources = base + 100 * (sources - base)  # the L1 norm is about 96,000, and float16 ends at 65,504
    merged = merge("dare_linear", sources, base, weight=(1.0,), density=(0.5,))
    norms = [float((x - base).double().abs().sum()) for x in (merged, sources[0])]
    assert norms[0] == pytest.approx(norms[1], rel=2e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", DEFAULTS)
def test_nan_and_inf_are_seen_where_they_are(name: str, value: float) -> None:
    sources, base = models(2, (300,), torch.float32, False, 8)
    for element in range(3):  # kept or dropped
        broken = sources.clone()
        broken[1, element] = value
        merged = merge(name, broken, base, 64, weight=(0.5, 0.5), density=(0.5, 0.5))
        assert (~merged.isfinite()).nonzero().tolist() == [[element]]


@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
def test_what_is_kept_has_the_norm_of_the_whole(name: str) -> None:
    sources, base = models(1, (64, 96), torch.float32, False, 3)
    merged = merge(name, sources, base, weight=(1.0,), density=(0.3,))
    norms = [float((x - base).double().abs().sum()) for x in (merged, sources[0])]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert float((merged != base).double().mean()) == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / 6144))


def test_della_keeps_by_rank() -> None:
    rows, columns, density, epsilon = 4000, 9, 0.4, 0.3
    sources, base = models(1, (rows, columns), torch.bfloat16, False, 5)
    merged = merge("della_linear", sources, base, weight=(1.0,), density=(density,), epsilon=(epsilon,), rescale=False)
    order = (sources[0] - base).abs().argsort(dim=1, stable=True)
    rates = (merged != base).gather(1, order).double().mean(dim=0)
    wanted = torch.linspace(density - epsilon, density + epsilon, columns, dtype=torch.float64)
    assert float((rates - wanted).abs().max()) < 5 * math.sqrt(0.25 / rows)


def test_della_ranks_rows_of_more_than_65536_columns() -> None:
    sources, base = models(1, (70_000,), torch.bfloat16, False, 6)
    given = DEFAULTS["della"] | {"weight": (0.5,), "density": (0.5,), "epsilon": (0.3,)}
    assert torch.equal(merge("della", sources, base, 1 << 15, **given), expected("della", sources, base, given))


@pytest.mark.parametrize("name", ["dare_ties", "della"])
@pytest.mark.parametrize("K", [2, 9])
def test_choices_that_are_not_kept_are_made_again_alike(name: str, K: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sources, base = models(K, (30, 40), torch.float32, False, 2)
    values: dict[str, Any] = {"weight": (0.5,) * K, "density": (0.5,) * K}
    noted = merge(name, sources, base, 200, **values)
    monkeypatch.setattr(choices, "HELD_BYTES", 0)
    assert torch.equal(merge(name, sources, base, 200, **values), noted)
    assert not torch.equal(merge(name, sources, base, 200, "another", **values), noted)
    assert not torch.equal(merge(name, sources, base, 200, seed=1, **values), noted)


@pytest.mark.parametrize("name", DEFAULTS)
def test_many_sources(name: str) -> None:
    """Beyond four the order of torch's own sum depends on the column, so it is compared in float64."""
    sources, base = models(11, (20, 30), torch.float64, False, 4)
    given = DEFAULTS[name] | {"weight": (0.2,) * 11} | dict.fromkeys(("density",), (0.6,) * 11)
    given |= {k: (DEFAULTS[name][k],) * 11 for k in ("gamma", "epsilon") if k in DEFAULTS[name]}
    torch.testing.assert_close(merge(name, sources, base, 64, **given), expected(name, sources, base, given))


def test_words_are_splitmix64_on_every_device_and_in_any_stretch() -> None:
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    bits = RandomBits(torch.device("cpu"))
    assert [word % 2**64 for word in bits.words64(1234567, 0, 5).tolist()] == known
    for key, start, stop in ((0, 0, 9), (2**64 - 1, 7, 500), (2**63, 2**40 + 1, 2**40 + 70)):
        assert torch.equal(_TorchWords(torch.device("cpu"))(key, start, stop), bits.words64(key, start, stop))
    whole = bits.words31(5, 0, 101).clone()
    assert torch.equal(torch.cat([bits.words31(5, a, b).clone() for a, b in ((0, 1), (1, 50), (50, 101))]), whole)


def test_words_are_uniform_and_uncorrelated() -> None:
    size = 1 << 18
    bits = RandomBits(torch.device("cpu"))
    keys = [stream_key(*key) for key in ((0, "a", 0), (0, "a", 1), (0, "b", 0), (1, "a", 0))]
    streams = np.stack([bits.words31(key, 0, size).numpy().astype(np.float64) / 2**31 for key in keys])
    sigma = 1 / math.sqrt(size)
    assert np.abs(streams.mean(axis=1) - 0.5).max() < 5 * sigma * math.sqrt(1 / 12)
    assert np.abs(streams.var(axis=1) - 1 / 12).max() < 5 * sigma * math.sqrt(1 / 180)
    between = np.corrcoef(streams) - np.eye(4)
    assert np.abs(between).max() < 5 * sigma
    for lag in (1, 2, 3, 64, 4096):
        assert abs(np.corrcoef(streams[0, lag:], streams[0, :-lag])[0, 1]) < 5 * sigma
    counts = np.bincount((streams[0] * 256).astype(int), minlength=256)
    assert ((counts - size / 256) ** 2).sum() / (size / 256) < 255 + 5 * math.sqrt(2 * 255)
    for probability in (0.001, 0.5, 0.93):
        rate = float((bits.below(keys[0], 0, size, round(probability * 2**31)) != 0).double().mean())
        assert abs(rate - probability) < 5 * sigma * math.sqrt(probability * (1 - probability))


@pytest.mark.parametrize(
    ("name", "math"), [("ties", "fp32"), ("ties", "exact"), ("dare_ties", "exact"), ("della", "fp32")]
)
def test_a_whole_merge(name: str, math: str, llama: Callable[..., Path], recipe: Callable[..., Path], tmp_path) -> None:
    parameters = {"weight": 0.6, "density": 0.5}
    base, *others = (llama(n, dtype=torch.bfloat16) for n in ("base", "one", "two"))
    entries = [{"model": str(path), "parameters": parameters} for path in others]
    yeam.merge(recipe(*entries, merge_method=name, base_model=base, math=math), tmp_path / "out")
    files = [load_file(path / "model.safetensors") for path in (base, *others, tmp_path / "out")]
    for tensor, merged in files[-1].items():
        work = torch.float32 if math == "fp32" else torch.bfloat16
        origin, *sources = (file[tensor].to(work) for file in files[:-1])
        values = {"weight": (0.6, 0.6), "density": (0.5, 0.5)}
        assert torch.equal(merge(name, torch.stack(sources), origin, tensor=tensor, **values).to(merged.dtype), merged)


@given(
    rows=st.integers(1, 4),
    columns=st.sampled_from([1, 2, 33, 700, 70_001]),
    kind=st.sampled_from(["float32", "bfloat16", "narrow", "one", "special"]),
    seed=SEED,
)
@settings(max_examples=40, deadline=None)
def test_ranks_are_those_of_a_stable_sort(rows: int, columns: int, kind: str, seed: int) -> None:
    """Whatever of a magnitude has room beside its column; `narrow`: rows that an outlier leaves only a few words for."""
    generator = torch.Generator().manual_seed(seed)
    delta_RN = torch.randn(rows, columns, generator=generator)
    if kind == "bfloat16":
        delta_RN = (delta_RN + 0.01 * torch.randn(rows, columns, generator=generator)).bfloat16() - delta_RN.bfloat16()
        delta_RN = delta_RN.float()
    elif kind == "narrow":
        delta_RN = 1 + 1e-6 * delta_RN
        delta_RN[:, 0] = 1e-30
    elif kind == "one":
        delta_RN = delta_RN.sign() * (delta_RN > -1)
    elif kind == "special":
        delta_RN[delta_RN > 1.5], delta_RN[delta_RN < -1.5] = float("nan"), -float("inf")
    order_RN = delta_RN.abs().view(torch.int32).sort(dim=1, stable=True).indices
    rank_N = torch.arange(columns, dtype=torch.int32)
    expected_RN = torch.empty_like(order_RN, dtype=torch.int32).scatter_(1, order_RN, rank_N.expand(rows, -1))
    found = row_ranks.RowRanks(columns).spread(delta_RN.flatten().numpy(), rank_N.numpy())
    assert np.array_equal(found, expected_RN.flatten().numpy())
