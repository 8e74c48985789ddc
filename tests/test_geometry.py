"""The invariants of rays, frames and length, in float64, and the fast path against the plain reference.

Legend: K sources, T elements, M rows, N columns.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numba
import pytest
import reference
import torch
from held_inputs import HeldInputs, outcome
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from yeam.checkpoint.dtypes import DTYPES
from yeam.compiled import loops
from yeam.geometry.frames import spread_, spread_spectral_
from yeam.geometry.length import Moments, agreement
from yeam.geometry.passes import Along, resolve
from yeam.geometry.rays import ray_point
from yeam.methods import Tile, method_named

SETTINGS = settings(max_examples=25, deadline=None)
SOFTNESS = st.sampled_from([0.05, 1.0, 4.0, 50.0])
SEED = st.integers(0, 2**31)


def updates(K: int, T: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random updates of unequal lengths with some blocks of no length, as sparse fine-tunes have them."""
    generator = torch.Generator().manual_seed(seed)
    delta_KT = torch.randn(K, T, generator=generator, dtype=dtype) * torch.logspace(-2, 0, K, dtype=dtype)[:, None]
    empty = torch.rand(K, -(-T // 4), generator=generator) < 0.2
    return delta_KT.masked_fill_(empty.repeat_interleave(4, dim=1)[:, :T], 0.0)


def merge(sources: Tensor, base: Tensor | None, tile: int = 1 << 18, served: Any = None, **parameters) -> Tensor:
    """The registered method `yeam` on tensors in memory, with its defaults unless told otherwise; served: how `HeldInputs` serves them."""
    method = method_named("yeam")
    values = {p.keyword: p.default for p in method.parameters.values()}
    values |= {"weight": (1.0,) * len(sources)} | parameters
    inputs = HeldInputs(sources, base, tuple(sources.shape[1:]), tile, **(served or {}))
    return outcome(method, inputs, values).view(sources.shape[1:])


@given(K=st.integers(1, 9), T=st.integers(1, 200), softness=SOFTNESS, seed=SEED)
@SETTINGS
def test_rays_solve_the_normal_equations(K: int, T: int, softness: float, seed: int) -> None:
    delta_KT = updates(K, T, seed)
    torch.testing.assert_close(ray_point(delta_KT, softness), reference.rays(delta_KT, softness), rtol=1e-9, atol=1e-12)


@given(T=st.integers(1, 100), softness=SOFTNESS, seed=SEED)
@SETTINGS
def test_a_single_ray_ends_at_its_tip(T: int, softness: float, seed: int) -> None:
    delta_KT = updates(1, T, seed)
    assert torch.equal(ray_point(delta_KT, softness), delta_KT[0])


@given(K=st.integers(2, 4), softness=SOFTNESS, seed=SEED)
@SETTINGS
def test_orthogonal_rays_sum_exactly(K: int, softness: float, seed: int) -> None:
    rotation_44, _ = torch.linalg.qr(
        torch.randn(4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    )
    delta_KT = rotation_44[:K] * torch.linspace(0.5, 2, K, dtype=torch.float64)[:, None]
    torch.testing.assert_close(ray_point(delta_KT, softness), delta_KT.sum(0))


@given(K=st.integers(2, 8), seed=SEED)
@SETTINGS
def test_equal_rays_count_once_when_hard_and_add_up_when_soft(K: int, seed: int) -> None:
    one_T = updates(1, 40, seed)[0]
    delta_KT = one_T.expand(K, -1).contiguous()
    torch.testing.assert_close(ray_point(delta_KT, 1e-9), one_T, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(ray_point(delta_KT, 1e9), K * one_T, rtol=1e-6, atol=1e-9)
    middle_T = ray_point(delta_KT, 4.0)
    torch.testing.assert_close(middle_T, one_T * (K * 5 / (K + 4)))  # (1+μ)K/(K+μ): more than one, less than K


@given(softness=SOFTNESS, seed=SEED)
@SETTINGS
def test_opposite_rays_cancel(softness: float, seed: int) -> None:
    one_T = updates(1, 40, seed)[0]
    assert float(ray_point(torch.stack([one_T, -one_T]), softness).abs().max()) <= 1e-12 * float(one_T.abs().max())


@given(K=st.integers(2, 7), softness=SOFTNESS, seed=SEED)
@SETTINGS
def test_order_rotation_and_scale(K: int, softness: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    delta_KT = updates(K, 32, seed)
    point_T = ray_point(delta_KT, softness)
    torch.testing.assert_close(ray_point(delta_KT[torch.randperm(K, generator=generator)], softness), point_T)
    torch.testing.assert_close(ray_point(delta_KT * 1e-3, softness), point_T * 1e-3)
    rotation_44, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))
    turned_KT = (delta_KT.view(K, -1, 4) @ rotation_44).flatten(1)
    torch.testing.assert_close(ray_point(turned_KT, softness), (point_T.view(-1, 4) @ rotation_44).flatten())


def test_softness_must_be_positive() -> None:
    with pytest.raises(ValueError, match="positive"):
        ray_point(torch.ones(2, 4), 0.0)


@given(
    K=st.integers(2, 7),
    size=st.sampled_from([1, 6, 2048, 5000, 8200]),
    with_base=st.booleans(),
    softness=st.sampled_from([0.3, 4.0]),
    seed=SEED,
)
@SETTINGS
def test_compiled_rays_equal_the_reference(K, size, with_base, softness, seed) -> None:
    """In float32, with the sums that the length is chosen by; equal, absent and opposite updates among them, in tiles of any length."""
    generator = torch.Generator().manual_seed(seed)
    base_T = torch.randn(size, generator=generator)
    source_KT = 0.1 * torch.randn(K, size, generator=generator) + (base_T if with_base else 0)
    source_KT[0, : size // 2] = base_T[: size // 2] if with_base else 0
    source_KT[-1, size // 3 :] = source_KT[-2, size // 3 :]
    weight = [1.0, -0.5, *[0.7] * (K - 2)]
    delta_KT = torch.tensor(weight).double()[:, None] * (source_KT.double() - (base_T.double() if with_base else 0))
    expected_T = reference.rays(delta_KT, softness)

    def resolved(tile: int) -> list[Tensor]:
        point_T, moments, along = torch.empty(size), Moments.of(K), Along(K)
        for start in range(0, size, tile):
            part, base = slice(start, start + tile), base_T[start : start + tile] if with_base else None
            served = Tile(start, start + tile, source_KT[:, part].contiguous(), base)
            resolve(served, weight, softness, moments, point_T[part])
            along.add(served, weight, point_T[part])
        return [
            point_T,
            *map(torch.from_numpy, (moments.gram_KK, moments.along_K, moments.squares_2, along.sources_K)),
            torch.tensor(along.square),
        ]

    found = resolved(size)
    point_T, gram_KK, along_K, squares_2, again_K, square = found
    total = float(delta_KT.square().sum())
    assert float((point_T - expected_T).norm()) <= 1e-6 * total**0.5
    torch.testing.assert_close(gram_KK, delta_KT @ delta_KT.T, rtol=1e-6, atol=1e-6 * total)
    torch.testing.assert_close(along_K, delta_KT @ expected_T, rtol=1e-6, atol=1e-6 * total)
    torch.testing.assert_close(again_K, along_K, rtol=1e-6, atol=1e-6 * total)
    base_square = float(base_T.double().square().sum()) if with_base else 0.0
    assert squares_2.tolist() == pytest.approx(
        [base_square, float(expected_T.square().sum())], rel=1e-5, abs=1e-6 * total
    )
    assert float(square) == pytest.approx(float(squares_2[1]), rel=1e-6)
    assert all(torch.equal(one, other) for one, other in zip(found, resolved(2048)))


def test_compiled_rays_pass_nan_and_inf_on() -> None:
    for value in (float("nan"), float("inf")):
        delta_KT = torch.ones(3, 40)
        delta_KT[1, 17] = value
        point_T = ray_point(delta_KT)
        assert not point_T[16:20].isfinite().all() and point_T[:16].isfinite().all() and point_T[20:].isfinite().all()


@given(
    M=st.integers(8, 90),
    N=st.integers(8, 90),
    width=st.sampled_from([4, 16, 64]),
    alpha=st.sampled_from([0.3, 1.0]),
    seed=SEED,
)
@SETTINGS
def test_frames_equal_the_reference(M: int, N: int, width: int, alpha: float, seed: int) -> None:
    x_MN = updates(M, N, seed)
    expected_MN, generator = x_MN, torch.Generator().manual_seed(seed)
    for _ in range(2):
        wide = N > M
        expected_MN = reference.spread_columns(expected_MN.T if wide else expected_MN, width, alpha, generator)
        expected_MN = expected_MN.T if wide else expected_MN
    spread_(x_MN, alpha=alpha, width=width, rounds=2, seed=seed)
    torch.testing.assert_close(x_MN / x_MN.norm(), expected_MN, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("M", "N", "width"), [(90, 70, 16), (700, 513, 128), (40, 24, 64), (64, 64, 16)])
@pytest.mark.parametrize("rounds", [1, 3])
def test_frames_in_float32_are_those_in_float64(M: int, N: int, width: int, rounds: int) -> None:
    """Compiled loops reorder the columns in float32: several bands, frames that leave columns over, one frame wider than the matrix."""
    x_MN = torch.randn(M, N, generator=torch.Generator().manual_seed(M + rounds), dtype=torch.float64)
    same = {"alpha": 0.9, "width": width, "rounds": rounds, "seed": 5}
    expected_MN = spread_(x_MN.clone(), **same)
    found_MN = spread_(x_MN.float(), **same)
    assert float((found_MN - expected_MN).norm() / expected_MN.norm()) < 1e-5


def test_frames_do_not_raise_what_rounding_left() -> None:
    """Five directions and the rounding of weights that are ten times as large: flattened, the directions stay most of the update."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(300, 5, generator=generator) @ torch.randn(5, 200, generator=generator)
    base = 5 * torch.randn(300, 200, generator=generator)
    rounding = (base + directions).bfloat16().float() - (base + directions)
    noise = float(base.square().mean()) * DTYPES["BF16"].rounding
    assert noise == pytest.approx(float(rounding.square().mean()), rel=0.5)  # it depends on where in an octave they lie
    u, _, vh = torch.linalg.svd(directions)
    shares = []
    for known in (0.0, noise):
        x_MN = spread_(directions + rounding, alpha=1.0, width=64, rounds=1, noise=known)
        shares.append(float(((u[:, :5].T @ x_MN @ vh[:5].T).norm() / x_MN.norm()).square()))
    assert shares[1] > 1.5 * shares[0]


@pytest.mark.parametrize("size", [1e-3, 3e-3, 1e-2, 3e-2])
def test_rounding_left_at_most_the_update(size: float) -> None:
    """Updates from far below a step of bf16 to far above, on weights that are bf16 themselves: what has nothing to do with them."""
    generator = torch.Generator().manual_seed(0)
    base_T = torch.randn(1 << 20, generator=generator, dtype=torch.float64).bfloat16().double()
    learned_T = size * torch.randn(1 << 20, generator=generator, dtype=torch.float64)
    stored_KT = ((base_T + learned_T).bfloat16().double() - base_T)[None]
    moments = Moments.of(1)
    moments.add(stored_KT, base_T, stored_KT[0])
    left_T = stored_KT[0] - (stored_KT[0] @ learned_T) / learned_T.square().sum() * learned_T
    found = moments.rounding([1.0], [DTYPES["BF16"].rounding])
    assert found == pytest.approx(float(left_T.square().sum()), rel=0.35)
    assert moments.rounding([0.5], [DTYPES["BF16"].rounding * 4]) == pytest.approx(found)


def test_updates_of_low_rank_stay_in_their_directions() -> None:
    """Blocks of four know nothing of rank: what the rays make beyond the sources' own directions is not raised by the frames."""
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(3, 120, 6, generator=generator) @ torch.randn(3, 6, 160, generator=generator)
    base = 20 * torch.randn(120, 160, generator=generator)
    update = merge(base + low, base) - base
    u, _, vh = torch.linalg.svd(low.sum(0))
    kept = u[:, :18].T @ update @ vh[:18].T
    assert float((kept.norm() / update.norm()).square()) > 0.9


@given(M=st.integers(8, 60), N=st.integers(8, 60), alpha=st.sampled_from([0.25, 0.6, 1.0]), seed=SEED)
@SETTINGS
def test_spectral_frames_raise_singular_values_to_a_power(M: int, N: int, alpha: float, seed: int) -> None:
    x_MN = torch.randn(M, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(x_MN, full_matrices=False)
    if float(s.min() / s.max()) < 2e-3:
        return  # below the floor the two definitions part on purpose
    torch.testing.assert_close(
        spread_spectral_(x_MN.clone(), alpha=alpha), (u * s ** (1 - alpha)) @ vh, rtol=1e-6, atol=1e-8
    )


def test_many_rounds_tend_to_a_flat_spectrum() -> None:
    x_MN = torch.randn(48, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    spread = []
    for rounds in (0, 2, 8, 32):
        values = torch.linalg.svdvals(spread_(x_MN.clone(), alpha=1.0, width=16, rounds=rounds))
        spread.append(float(values.std() / values.mean()))
    assert spread == sorted(spread, reverse=True)
    assert spread[-1] < 0.02 * spread[0]


@given(K=st.integers(2, 6), copies=st.integers(2, 5), seed=SEED)
@SETTINGS
def test_agreement(K: int, copies: int, seed: int) -> None:
    delta_KT = updates(K, 60, seed)
    moments = Moments.of(K)
    for start in (0, 20, 40):
        part_KT = delta_KT[:, start : start + 20]
        moments.add(part_KT, None, part_KT.sum(0))
    assert agreement(moments.gram_KK) == pytest.approx(reference.agreement(delta_KT), abs=1e-9)
    same_KT = delta_KT[:1].expand(copies, -1)
    assert agreement(same_KT @ same_KT.T) == pytest.approx(1.0)


@given(
    K=st.integers(1, 5),
    shape=st.sampled_from([(7,), (40,), (24, 36), (9, 70), (5, 64), (), (2, 3, 5)]),
    parameters=st.sampled_from(
        [{}, {"frames": 16}, {"frames": 4}, {"frames": "none"}, {"softness": 0.5, "lambda_": 0.7, "seed": 3}]
    ),
    with_base=st.booleans(),
    moved=st.sampled_from([1.0, 0.03, 0.001]),
    depth=st.sampled_from([1, 4, 32]),
    role=st.sampled_from(["mlp", "embedding"]),
    tile=st.sampled_from([64, 1 << 18]),
    seed=SEED,
)
@SETTINGS
def test_merge_equals_the_reference(K, shape, parameters, with_base, moved, depth, role, tile, seed) -> None:
    size = max(1, torch.Size(shape).numel())
    delta = moved * updates(K, size, seed).view(K, *shape)
    base = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    sources = delta + base if with_base else delta
    frames = parameters.get("frames", 256)
    expected = reference.merge(
        base if with_base else torch.zeros_like(base),
        delta,
        softness=parameters.get("softness", 32.0),
        width=None if frames == "none" else frames,
        rounds={4: 4, 16: 2, 64: 2}.get(frames, 1),
        lam=parameters.get("lambda_", 1.0),
        seed=parameters.get("seed", 0),
        depth=depth,
        embedding=role == "embedding",
    )
    if K == 1 and not with_base:
        expected = delta[0] * parameters.get("lambda_", 1.0)
    merged = merge(sources, base if with_base else None, tile, {"depth": depth, "role": role}, **parameters)
    torch.testing.assert_close(merged, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("frames", [256, 16, "none"])
@pytest.mark.parametrize("K", [2, 3, 5])
def test_float32_is_within_1e_5_of_the_reference(K: int, frames: int | str) -> None:
    generator = torch.Generator().manual_seed(K)
    base = torch.randn(200, 330, generator=generator)
    delta = 0.05 * torch.randn(K, 200, 330, generator=generator)
    width, rounds = None if frames == "none" else frames, 2 if frames == 16 else 1
    expected = reference.merge(base.double(), delta.double(), width=width, rounds=rounds)
    update = merge(base + delta, base, frames=frames).double() - base.double()
    assert float((update - (expected - base.double())).norm() / (expected - base.double()).norm()) < 1e-5


def test_a_source_given_twice_counts_once() -> None:
    """However long it is; one that does not move counts not at all."""
    from yeam.geometry.length import distinct

    updates_KT = torch.linalg.qr(
        torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ).Q.T
    updates_KT[1] *= 5
    for chosen, count in (([0, 1, 2, 3], 4.0), ([0, 0], 1.0), ([0, 1, 1], 9 / 5), ([2], 1.0)):
        gram_KK = (updates_KT[chosen] @ updates_KT[chosen].T).numpy()
        assert distinct(gram_KK) == pytest.approx(count)
    still_KT = torch.cat([updates_KT[:2], torch.zeros(1, 30, dtype=torch.float64)])
    assert distinct((still_KT @ still_KT.T).numpy()) == pytest.approx(2.0)
    assert distinct((0 * still_KT @ still_KT.T).numpy()) == 1.0


def test_only_what_goes_far_is_made_flat() -> None:
    """Fine-tunes of a deep model that have arrived keep half of their spectrum; those that had only begun, and those of a shallow model
    whose sum is near the edge of what a matrix may move by, none."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(64, 96, generator=generator, dtype=torch.float64)
    strong = torch.logspace(0, -2, 96, dtype=torch.float64)  # of axes
    delta = torch.randn(2, 64, 96, generator=generator, dtype=torch.float64) * strong

    def decay(moved: float, depth: int) -> float:
        """Of the update's singular values: the largest over the tenth of sixty-four."""
        step = moved * delta / delta.flatten(1).norm(dim=1)[:, None, None] * base.norm()
        value = torch.linalg.svdvals(merge(base + step, base, served={"depth": depth}) - base)
        return float(value[0] / value[9])

    flat, raw = decay(0.001, 32), float(torch.linalg.svdvals(delta.sum(dim=0))[[0, 9]].log().diff().neg().exp())
    assert decay(0.03, 4) == pytest.approx(flat, rel=0.01)
    assert flat < decay(0.01, 32) < raw
    assert flat * 1.2 < decay(0.02, 32) < raw / 1.1


@given(copies=st.integers(1, 5), shape=st.sampled_from([(12,), (20, 28)]), seed=SEED)
@SETTINGS
def test_copies_of_one_source_are_that_source(copies: int, shape: tuple[int, ...], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    base, source = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    merged = merge(source.expand(copies, *shape).contiguous(), base)
    torch.testing.assert_close(merged, source, rtol=1e-12, atol=1e-12)


@given(
    moved=st.integers(1, 3),
    still=st.integers(1, 2),
    shape=st.sampled_from([(12,), (40, 28), (3, 16, 24)]),
    frames=st.sampled_from([256, "spectral", "none"]),
    transposed=st.booleans(),
    seed=SEED,
)
@SETTINGS
def test_sources_that_did_not_move_say_nothing(moved, still, shape, frames, transposed, seed) -> None:
    """Wherever they stand; the only one that moved is followed as if it were alone, also from a base of zeros."""
    generator = torch.Generator().manual_seed(seed)
    base, *steps = torch.randn(1 + moved, *shape, generator=generator, dtype=torch.float64)
    base = base * (moved > 1 or seed % 2)
    sources = [base + 0.01 * step for step in steps]
    order = torch.randperm(moved + still, generator=generator).tolist()
    among = [([*sources, *[base] * still])[i] for i in order]
    served = {"transposed": transposed and len(shape) == 2}
    wanted = merge(torch.stack([sources[i] for i in order if i < moved]), base, served=served, frames=frames)
    found = merge(torch.stack(among), base, served=served, frames=frames)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_contradiction_moves_little_and_cancellation_not_at_all() -> None:
    generator = torch.Generator().manual_seed(0)
    base, delta = torch.randn(2, 32, 32, generator=generator, dtype=torch.float64)
    assert torch.equal(merge(torch.stack([base, base]), base), base)
    opposed = merge(torch.stack([base + 0.1 * delta, base - 0.1 * delta]), base)
    torch.testing.assert_close(opposed, base, rtol=1e-12, atol=1e-12)
    nearly = merge(torch.stack([base + 0.1 * delta, base - 0.099 * delta]), base)
    assert 0 < float((nearly - base).norm()) < 0.026 * float((0.1 * delta).norm())


def test_without_a_base_the_norm_of_the_models_is_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    models = torch.randn(3, 40, 40, generator=generator, dtype=torch.float64) * 0.1 + torch.randn(
        40, 40, generator=generator, dtype=torch.float64
    )
    merged = merge(models, None)
    assert float(merged.norm()) == pytest.approx(float(models.flatten(1).norm(dim=1).mean()), rel=0.02)


def test_tall_matrices_are_panels_and_stacks_are_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    from yeam.methods import yeam

    monkeypatch.setattr(yeam, "PANEL_ROWS", 20)
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(50, 12, generator=generator, dtype=torch.float64)
    delta = 0.1 * torch.randn(2, 50, 12, generator=generator, dtype=torch.float64)
    merged = merge(base + delta, base)
    edges = [0, 16, 33, 50]
    for top, bottom in pairwise(edges):
        expected = reference.merge(base[top:bottom], delta[:, top:bottom])
        torch.testing.assert_close(merged[top:bottom], expected)
    stacked = merge((base + delta)[:, :48].reshape(2, 3, 16, 12), base[:48].view(3, 16, 12))
    for index in range(3):
        rows = slice(16 * index, 16 * (index + 1))
        torch.testing.assert_close(stacked[index], reference.merge(base[rows], delta[:, rows]))


@pytest.mark.parametrize("with_base", [True, False])
def test_points_that_are_not_kept_are_computed_again_alike(with_base: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from yeam.methods import yeam

    generator = torch.Generator().manual_seed(0)
    base = torch.randn(30, 40, generator=generator) if with_base else None
    sources = torch.randn(3, 30, 40, generator=generator)
    kept = merge(sources, base, tile=64, frames="none")
    monkeypatch.setattr(yeam, "HELD_BYTES", 0)
    assert torch.equal(merge(sources, base, tile=64, frames="none"), kept)


def test_loops_are_compiled_where_no_cache_may_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def njit(**options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return real(**options)

    real = numba.njit
    monkeypatch.setattr(numba, "njit", njit)
    assert loops()(lambda x: x + 1)(2) == 3


def test_rows_meet_where_sources_use_different_inputs() -> None:
    """A source is heard alone on inputs that the others hardly use, whatever they say there; found from some of the rows, in pieces."""
    from yeam.geometry.meeting import Meeting

    generator = torch.Generator().manual_seed(0)
    rows, columns = 3000, 512
    first, second = 0.01 * torch.randn(2, rows, columns, generator=generator, dtype=torch.float64)
    signal = torch.randn(2, rows, 8, generator=generator, dtype=torch.float64)
    first[:, :8] += signal[0]
    second[:, 8:16] += signal[1]
    second[:, :8] -= 0.1 * signal[0]  # speaks against the first where it has little to say
    delta = torch.stack([first, second])
    contrast = (first - second).view(1, -1)
    moved = Meeting(delta[:, ::2]).add_(contrast, delta.sum(0).flatten()).view(rows, columns)
    against = [float((x[:, :8] * signal[0]).sum() / signal[0].square().sum()) for x in (delta.sum(0), moved)]
    assert against[0] < 0.91 and against[1] > 1.85  # of 2, what the first alone would have
    swapped = Meeting(delta.flip(0)[:, ::2]).add_(-contrast, delta.sum(0).flatten()).view(rows, columns)
    torch.testing.assert_close(swapped, moved, rtol=1e-7, atol=1e-9)
    same = Meeting(torch.stack([first, first]))
    assert float(same.shares_CRR.abs().max()) < 1e-9  # nothing to move, whatever the sources' contrast

    base = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    short, long = (merge((base + delta).float(), base.float(), tile) for tile in (1 << 14, 1 << 20))
    assert torch.equal(short, long)
    update, expected = short.double() - base, reference.merge(base, delta) - base
    # the reference looks at all rows: axes of noise differ
    assert float(torch.nn.functional.cosine_similarity(update.flatten(), expected.flatten(), dim=0)) > 0.97


@pytest.mark.parametrize(
    ("K", "M", "N", "frames"),
    [
        (2, 40, 24, 256),
        (3, 40, 200, "spectral"),
        (2, 64, 64, 16),
        (2, 64, 64, 256),
        (2, 600, 1100, 256),
        (3, 9100, 40, 16),
    ],
)  # the whole span, axes of one's own, a square, some outputs, fewer of them as there is no room for more
def test_columns_meet_where_inputs_are_rows(K: int, M: int, N: int, frames: int | str) -> None:
    """A matrix stored [in, out] becomes what the same one stored [out, in] becomes, by rays that turn nothing, as their blocks of four
    lie along the rows of either; also as compiled loops read it, in tiles of any length."""
    generator = torch.Generator().manual_seed(M)
    strong = torch.randn(K, M, 6, generator=generator) @ torch.randn(K, 6, N, generator=generator)
    delta = 0.05 * (strong + torch.randn(K, M, N, generator=generator))
    base = torch.randn(M, N, generator=generator)
    how = {"softness": 1e9, "frames": frames}
    is_turned = {"transposed": True}
    x, y = (base + delta).double(), base.double()
    plain = merge(x.mT.contiguous(), y.T.contiguous(), **how).T - y
    turned = merge(x, y, served=is_turned, **how) - y
    if M != 9100:
        torch.testing.assert_close(turned, plain, rtol=1e-5, atol=1e-6 * float(plain.norm()))
    assert float((merge(x, y, **how) - y - plain).norm() / plain.norm()) > 1e-2
    short, long = (
        merge(x.float(), base, tile, served={**is_turned, "stored": True}, **how) for tile in (1 << 11, 1 << 20)
    )
    assert torch.equal(short, long)
    assert float((short.double() - y - turned).norm() / turned.norm()) < 1e-2
