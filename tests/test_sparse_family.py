"""Task arithmetic and its sparse relatives against whole-tensor formulas; the result never depends on the tiles.

Legend: K sources, n elements of a tensor.
"""

from __future__ import annotations

import pytest
import torch
from held_inputs import HeldInputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from yeam.methods import method_named

WEIGHTS = (0.5, 0.3, 1.0)
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")


def merged(name: str, sources: Tensor, base: Tensor, tile: int = 1 << 18, tensor: str = "w", **given: object) -> Tensor:
    method, K = method_named(name), len(sources)
    values = {}
    for p in method.parameters.values():
        value = given.get(p.keyword, WEIGHTS[:K] if p.name == "weight" else p.default)
        values[p.keyword] = (
            (value if isinstance(value, tuple) and len(value) == K else (value[0],) * K) if p.per_source else value
        )
    inputs = HeldInputs(sources, base, tuple(base.shape), tile, tensor)
    return torch.cat([part.clone() for part in method.run(inputs, values)]).view(base.shape)


def example(K: int, shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    return (base + 0.1 * torch.randn(K, *shape, generator=generator)).to(dtype), base.to(dtype)


def keep_largest(delta: Tensor, first: int, count: int) -> Tensor:
    """The entries that rank first … first + count − 1 by magnitude, ties in the order of the elements; else 0."""
    order = delta.abs().flatten().argsort(descending=True, stable=True)[first : first + count]
    kept = torch.zeros(delta.numel(), dtype=delta.dtype)
    kept[order] = delta.flatten()[order]
    return kept.view(delta.shape)


def combined(deltas: list[Tensor], normalize: bool, consensus: bool, strength: float) -> Tensor:
    weighted = torch.stack([w * d for w, d in zip(WEIGHTS, deltas)])
    counted = torch.ones_like(weighted)
    if consensus:
        majority = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
        counted = (weighted.sign() == majority).to(weighted.dtype)
    weight_K = torch.tensor(WEIGHTS[: len(deltas)], dtype=weighted.dtype).view(-1, *[1] * (weighted.dim() - 1))
    divisor = (weight_K * counted).sum(0)
    total = (weighted * counted).sum(0)
    return strength * (total / torch.where(divisor == 0, 1.0, divisor) if normalize else total)


@given(
    name=st.sampled_from(["task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties"]),
    K=st.integers(1, 3),
    shape=st.sampled_from([(1,), (7,), (33, 20), (3, 8, 9)]),
    density=st.sampled_from([1.0, 0.9, 0.5, 0.2]),
    gamma=st.sampled_from([0.0, 0.01, 0.1]),
    normalize=st.booleans(),
    strength=st.sampled_from([1.0, 0.7]),
    tile=st.sampled_from([4, 100, 1 << 18]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=80, deadline=None)
def test_selected_updates(name, K, shape, density, gamma, normalize, strength, tile, seed) -> None:
    sources, base = example(K, shape, seed)
    n, deltas = base.numel(), [source - base for source in sources]
    keep = int(density * n)
    options = {"normalize": normalize, "lambda_": strength}
    if name == "ties":
        options["density"] = (density,)
        deltas = [keep_largest(d, 0, n if density >= 1 else keep) for d in deltas]
    elif name.startswith("breadcrumbs"):
        options |= {"density": (density,), "gamma": (gamma,)}
        top = min(int(gamma * n), n - keep)
        deltas = [keep_largest(d, top, keep) for d in deltas]
    expected = base + combined(deltas, normalize, name.endswith("ties"), strength)
    torch.testing.assert_close(merged(name, sources, base, tile, **options), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equal_magnitudes_keep_exactly_as_many_as_asked(dtype: torch.dtype) -> None:
    base = torch.zeros(1000, dtype=dtype)
    source = torch.full((1, 1000), 0.25, dtype=dtype)
    out = merged("ties", source, base, tile=64, weight=(1.0,), density=(0.3,), normalize=False)
    assert torch.equal(out != 0, torch.arange(1000) < 300)


@pytest.mark.parametrize("name", RANDOM)
def test_random_masks_have_the_density_and_depend_on_seed_and_name_only(name: str) -> None:
    sources, base = example(2, (60, 500), 3)
    options = {"density": (0.6,), "seed": 5} | ({"rescale": False} if "dare" in name else {})
    out = merged(name, sources, base, **options)
    for tile in (500, 1000, 30_000):
        assert torch.equal(merged(name, sources, base, tile, **options), out)
    assert not torch.equal(merged(name, sources, base, **{**options, "seed": 6}), out)
    assert not torch.equal(merged(name, sources, base, tensor="another", **options), out)
    single = merged(name, sources[:1], base, weight=(1.0,), **{**options, "rescale": False, "normalize": False})
    assert float((single != base).float().mean()) == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize("name", RANDOM)
def test_rescaling_keeps_the_l1_norm(name: str) -> None:
    sources, base = example(1, (60, 500), 3)
    out = merged(name, sources, base, weight=(1.0,), density=(0.5,), rescale=True, normalize=False)
    whole, kept = (sources[0] - base).abs().sum(), (out - base).abs().sum()
    assert float(kept / whole) == pytest.approx(1, rel=1e-4)


def test_della_prefers_large_entries() -> None:
    sources, base = example(1, (200, 500), 3)
    out = merged("della_linear", sources, base, weight=(1.0,), density=(0.5,), epsilon=(0.3,), rescale=False)
    delta, kept = (sources[0] - base).abs(), (out != base).float()
    order = delta.argsort(dim=1)
    ranked = kept.gather(1, order)
    assert float(ranked[:, :100].mean()) == pytest.approx(0.5 - 0.3 * 0.8, abs=0.02)
    assert float(ranked[:, -100:].mean()) == pytest.approx(0.5 + 0.3 * 0.8, abs=0.02)


def test_della_of_a_column_is_no_nan() -> None:
    sources, base = example(2, (50, 1), 3)
    assert bool(merged("della", sources, base, density=(0.5,)).isfinite().all())


def test_random_words_are_splitmix64_on_every_device() -> None:
    from yeam.methods.random_bits import _NumpyWords, _TorchWords

    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # SplitMix64 from the state 0
    for words in (_NumpyWords(), _TorchWords(torch.device("cpu"))):
        assert [int(word) % 2**64 for word in words(0, 0, 3)] == published
    key = 0xDEADBEEFCAFEF00D
    assert torch.equal(_NumpyWords()(key, 1000, 5000), _TorchWords(torch.device("cpu"))(key, 1000, 5000))
