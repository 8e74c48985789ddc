"""Injection: what is added, what is kept, what is refused; and the fit of strengths to a text.

Legend: K models (the target first), M rows, N columns, T elements.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, Llama
from held_inputs import HeldInputs
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_tokenizers import SPECIAL, add_words
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import yeam
from yeam.errors import CheckpointError, ConfigError, UserError
from yeam.geometry import agreement, protect
from yeam.injection import inject_recipe
from yeam.methods import method_named
from yeam.methods.inject import panels_of
from yeam.methods.inject_step import SHARE, resolve

FAMILY = REPOSITORY / "examples" / "tiny-family"
MODELS = FAMILY / "models"


def injected(
    target: Tensor, sources: Sequence[Tensor], base: Tensor | None, depth: int = 1, **values: Any
) -> tuple[Tensor, list[Any]]:
    """The method on one tensor, and its facts. Tiles are small, so that there are several."""
    method = method_named("inject")
    inputs = HeldInputs(torch.stack([target, *sources]).flatten(1), base, tuple(target.shape), tile=256, depth=depth)
    given = {parameter.keyword: parameter.default for parameter in method.parameters.values()}
    out_T = torch.cat(list(method.run(inputs, {**given, **values})))
    return out_T.view(target.shape), inputs.facts


def team(seed: int, count: int, shape: tuple[int, ...]) -> tuple[Tensor, list[Tensor], Tensor]:
    """Target, sources and base in multiples of 1/1024, so that sums and differences are exact."""
    generator = torch.Generator().manual_seed(seed)

    def draw(scale: int) -> Tensor:
        return torch.randint(-scale, scale + 1, shape, generator=generator) / 1024

    base = draw(1000)
    return base + draw(60), [base + draw(60) for _ in range(count)], base


SHAPES = st.sampled_from([(16, 24), (24, 16), (12, 10), (3, 16, 8), (40,), (7, 3), (2, 3, 3, 3)])
POLICIES = st.sampled_from(["union", "consensus", "priority"])


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 99), SHAPES, POLICIES, st.booleans(), st.sampled_from(["space", "rays", "none"]))
def test_copies_of_a_source_count_once(
    seed: int, shape: tuple[int, ...], policy: str, with_base: bool, protection: str
) -> None:
    """n copies of one source are one, a copy of the target is none, to the bit; with the whole update in one source, too."""
    target, (a, b), base = team(seed, 2, shape)
    how = {"policy": policy, "protect": protection}
    origin = base if with_base else None
    two, _ = injected(target, [a, b], origin, **how)
    assert torch.equal(injected(target, [a, b, a, a], origin, **how)[0], two)
    assert torch.equal(injected(target, [a, target, b], origin, **how)[0], two)
    assert torch.equal(injected(target, [a, a], origin, **how)[0], injected(target, [a], origin, **how)[0])
    assert policy == "consensus" or not torch.equal(two, target)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 99), SHAPES, st.sampled_from(["union", "consensus"]), st.floats(0.1, 50))
def test_a_source_and_its_mirror_image_cancel(seed: int, shape: tuple[int, ...], policy: str, strength: float) -> None:
    """S and its mirror image about the base leave the target as it is, to the bit."""
    target, (a,), base = team(seed, 1, shape)
    out, facts = injected(target, [a, 2 * base - a], base, policy=policy, strength=strength)
    assert torch.equal(out, target) and all(part["moved"] == 0 for part in facts)


@pytest.mark.parametrize("shape", [(40, 24), (192,), (1,)])
@pytest.mark.parametrize("policy", ["union", "consensus"])
def test_what_rounding_leaves_of_nothing_is_not_injected(shape: tuple[int, ...], policy: str) -> None:
    """Sources that cancel but for rounding, and a vector that is an earlier step of the target's."""
    base, own, step = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    target = base + 0.05 * own
    out, _ = injected(target, [base + 0.05 * step, base - 0.05 * step], base, policy=policy)
    assert torch.equal(out, target)
    if len(shape) == 1:
        assert torch.equal(injected(target, [base + 0.5 * (target - base)], base, policy=policy)[0], target)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 99), SHAPES, POLICIES, st.floats(0.01, 100), st.floats(0.001, 0.5), st.integers(1, 4))
def test_the_budget_bounds_all_sources_together(
    seed: int, shape: tuple[int, ...], policy: str, strength: float, budget: float, count: int
) -> None:
    """The relative change of a tensor is never above the budget, and is what the report says."""
    target, sources, base = team(seed, count, shape)
    out, facts = injected(target, sources, base, policy=policy, strength=strength, budget=budget)
    change = float((out - target).double().norm() / target.double().norm())
    assert change <= budget * (1 + 1e-4)
    told = sum(part["moved"] ** 2 for part in facts) ** 0.5 / float(target.norm())
    assert change == pytest.approx(told, rel=1e-3, abs=1e-6)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 99), st.integers(1, 3), st.sampled_from([1, 4, 32]), st.sampled_from([1e-4, 0.01, 0.1, 1.0]))
def test_how_far_a_target_moves(seed: int, count: int, depth: int, moved: float) -> None:
    """No direction further than the resolved update moves its strongest one, times a factor for gentle updates; in any number of axes."""
    generator = torch.Generator().manual_seed(seed)
    base, own, *updates = torch.randn(2 + count, 32, 48, generator=generator)
    target, sources = base + 0.01 * own, [base + moved * update for update in updates]
    out, _ = injected(target, sources, base, depth, policy="priority", budget=1e9)
    delta_KT = torch.stack([source - base for source in sources]).flatten(1)
    resolved, weights, step = (
        float(torch.linalg.matrix_norm(x, 2))
        for x in (resolve(delta_KT, "priority", 32.0).view(32, 48), target, out - target)
    )
    wanted = SHARE * min(0.78 / (resolved / weights * depth) ** 0.4, 2.7) ** 1.5
    assert step / resolved == pytest.approx(wanted, rel=0.05)


def test_the_order_of_sources_matters_only_by_priority() -> None:
    target, sources, base = team(5, 3, (16, 24))
    turned = sources[::-1]
    for policy in ("union", "consensus"):
        ahead, back = (injected(target, each, base, policy=policy)[0] for each in (sources, turned))
        assert torch.allclose(ahead, back, atol=1e-3)
    ahead, back = (injected(target, each, base, policy="priority")[0] for each in (sources, turned))
    assert not torch.allclose(ahead, back, atol=1e-2)


def test_what_a_policy_takes() -> None:
    """Two sources share an update in some rows, only one has one in others, and they contradict each other in the last."""
    torch.manual_seed(0)
    base, v, target = torch.randn(24, 16), 0.1 * torch.randn(24, 16), torch.randn(24, 16)
    first, second = v.clone(), v.clone()
    second[8:16] = 0
    second[16:] *= -1
    plain = {"protect": "none", "frames": "none", "strength": 1.0, "budget": 100.0}

    def taken(policy: str) -> list[float]:
        step = injected(target, [base + first, base + second], base, policy=policy, **plain)[0] - target
        return [float((step[i : i + 8] * v[i : i + 8]).sum() / v[i : i + 8].square().sum()) for i in (0, 8, 16)]

    shared, single, opposed = taken("consensus")
    assert single < 0.5 * shared and abs(opposed) < 0.1 * shared
    shared, single, opposed = taken("union")
    assert single > 0.5 * shared and abs(opposed) < 0.1 * shared
    shared, single, opposed = taken("priority")
    assert single == pytest.approx(shared, rel=1e-3) and opposed == pytest.approx(shared, rel=1e-3)


def test_later_sources_add_only_what_does_not_contradict() -> None:
    """By priority, in a block of four: along the first only what goes beyond it, across it everything."""
    first = torch.tensor([2.0, 0, 0, 0])
    later = torch.tensor([[1.0, 3, 0, 0], [-1, 3, 0, 0], [5, 0, 1, 0]])
    wanted = torch.tensor([[2.0, 3, 0, 0], [2, 3, 0, 0], [5, 0, 1, 0]])
    for update, result in zip(later, wanted):
        assert torch.allclose(resolve(torch.stack([first, update]), "priority", 4.0), result)


def test_agreement_is_measured_against_chance() -> None:
    """Unrelated sources are at chance level, equal ones share everything, and heads are told apart."""
    torch.manual_seed(0)
    K, rows, columns = 3, 32, 64
    updates = torch.randn(K, rows, columns)
    updates[:, :8] = updates[0, :8]  # a head in which they agree
    grid = agreement.Grid.of(rows, columns, head_rows=8)
    energies = agreement.Energies(torch.empty(rows * columns // 4), torch.empty(rows * columns // 4), K)
    energies.add(updates.flatten(1), 0)
    coherence_B, facts = agreement.block_coherence_(energies, grid)
    heads = coherence_B.view(4, -1)
    assert float(heads[0].min()) > 0.99 and float(heads[1:].mean()) == pytest.approx(1 / K, abs=0.03)
    shared, unopposed = agreement.shared(heads, K), agreement.unopposed(heads, K)
    assert float(shared[0].min()) > 0.99 and float(shared[1:].mean()) < 0.15
    assert float(unopposed[1:].mean()) > 0.8
    assert facts["agreement"] == pytest.approx(0.25, abs=0.02) and facts["rows_above_chance"] < 0.9


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (8, 200), (200, 8)])
def test_protection_is_the_penalised_step(shape: tuple[int, int]) -> None:
    """Both sides are damped by (C + I)⁻¹ with Gram matrices of mean eigenvalue 1, whichever way is cheaper."""
    torch.manual_seed(0)
    x, own, weights = (torch.randn(*shape, dtype=torch.float64) for _ in range(3))

    def inverse(side: int) -> Tensor:
        gram = torch.eye(side, dtype=torch.float64)
        for u in (own, weights):
            product = u.T @ u if side == shape[1] else u @ u.T
            gram += product * (side / product.trace())
        return torch.linalg.inv(gram)

    wanted = inverse(shape[0]) @ x @ inverse(shape[1])
    assert torch.allclose(protect.protect_(x.clone(), [own, weights]), wanted, atol=1e-10)


def test_the_injected_part_stays_off_what_the_target_uses() -> None:
    """Block by block it is perpendicular to the target's update; in space it avoids its directions on both sides."""
    torch.manual_seed(0)
    base = torch.randn(64, 48)
    left, right = torch.randn(64), torch.randn(48)
    target = base + 0.1 * torch.outer(left, right)
    sources = [base + 0.1 * torch.randn(64, 48) for _ in range(2)]
    steps = {
        how: injected(target, sources, base, protect=how, budget=10.0)[0] - target for how in ("none", "rays", "space")
    }
    along = (steps["rays"].view(-1, 4) * (target - base).view(-1, 4)).sum(1)
    assert float(along.abs().max()) < 1e-5

    def use(step: Tensor) -> tuple[float, float]:
        return float((step @ right).norm() / step.norm()), float((left @ step).norm() / step.norm())

    assert all(damped < 0.1 * plain for damped, plain in zip(use(steps["space"]), use(steps["none"])))


def test_panels_cover_a_tensor_once() -> None:
    for shape, head in [((40_000, 24), 64), ((3, 20, 16), 0), ((9, 10_000_000), 0), ((5,), 0), ((), 0)]:
        panels = panels_of(shape, head)
        end = 0
        for panel in panels:
            assert panel.start == end
            end += panel.numel
        assert end == torch.Size(shape).numel()
        assert all(panel.rows % head == 0 for panel in panels[:-1] if head)


def test_an_injection_into_a_real_expert(tmp_path: Path) -> None:
    """With defaults the target keeps at least 95 % of what it had gained, and both sources' domains improve clearly."""
    out = tmp_path / "out"
    report = yeam.inject(MODELS / "prose", [MODELS / "code", MODELS / "names"], out, base=MODELS / "base")
    heldout = {d: ids[:32].long() for d, ids in load_file(FAMILY / "heldout.safetensors").items()}

    @cache
    def model_of(folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def loss(folder: Path, domain: str) -> float:
        model = model_of(folder)
        with torch.inference_mode():
            return float(model(input_ids=heldout[domain], labels=heldout[domain]).loss)

    own = [loss(MODELS / name, "prose") for name in ("base", "prose")]
    assert (own[0] - loss(out, "prose")) / (own[0] - own[1]) >= 0.95
    for domain in ("code", "names"):
        gained = loss(MODELS / "base", domain) - loss(MODELS / domain, domain)
        assert (loss(MODELS / "prose", domain) - loss(out, domain)) / gained > 0.1
    assert any("changed by" in note for note in report.notes) and 0.05 < report.totals["relative_change"] < 0.12
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("def main", return_tensors="pt")
    assert (
        AutoModelForCausalLM.from_pretrained(out).generate(**ids, max_new_tokens=2).shape[1] > ids["input_ids"].shape[1]
    )
    mine, theirs = load_file(out / "model.safetensors"), load_file(MODELS / "prose" / "model.safetensors")
    touched = {name for name in mine if not torch.equal(mine[name], theirs[name])}
    assert touched == {name for name in mine if "_proj" in name}
    assert (out / "config.json").read_text() == (MODELS / "prose" / "config.json").read_text()
    again = yeam.merge(out / "yeam_config.yaml", tmp_path / "again")
    assert [t["xxh3"] for t in again.tensors] == [t["xxh3"] for t in report.tensors]


@pytest.mark.parametrize(
    ("options", "touched"),
    [
        ({"roles": "embedding"}, {"model.embed_tokens.weight"}),
        ({"roles": ["norm"], "layers": "1"}, {"model.layers.1.input_layernorm.weight",
                                              "model.layers.1.post_attention_layernorm.weight", "model.norm.weight"}),
        ({"roles": "up,o", "layers": "0-0"}, {"model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.o_proj.weight"}),
        ({"roles": "up", "strengths": [{"layers": "0", "strength": 0}]}, {"model.layers.1.mlp.up_proj.weight"}),
        ({"budget": 0}, set()),
        ({"strength": 0}, set()),
    ],
)  # fmt: skip
def test_only_what_is_selected_is_touched(
    tmp_path: Path, llama: Llama, options: dict[str, Any], touched: set[str]
) -> None:
    """Everything else is the target's bytes."""
    base, target, source = llama("base"), llama("target", dtype=torch.bfloat16), llama("source")
    out = tmp_path / "out"
    yeam.inject(target, source, out, base=base, **options)
    before, after = load_file(target / "model.safetensors"), load_file(out / "model.safetensors")
    assert {name for name in after if not torch.equal(after[name], before[name])} == touched
    assert all(after[name].dtype == before[name].dtype for name in after)
    if not touched:
        assert (out / "model.safetensors").read_bytes() == (target / "model.safetensors").read_bytes()


def test_strengths_of_groups_and_heads_are_in_the_plan(llama: Llama) -> None:
    recipe = inject_recipe(
        llama("target"), [llama("a"), llama("b")], llama("base"), strength=0.5, budget=0.03,
        strengths=[{"layers": "1", "roles": ["mlp"], "strength": 2.0}, {"roles": ["attention"], "strength": 0.8}],
    )  # fmt: skip
    jobs = {job.name: job for job in yeam.plan(recipe).jobs}
    found = {name: job.parameters["strength"] for name, job in jobs.items() if job.method == "inject"}
    assert found["model.layers.0.mlp.up_proj.weight"] == 0.5 and found["model.layers.1.mlp.up_proj.weight"] == 1.0
    assert found["model.layers.0.self_attn.q_proj.weight"] == pytest.approx(0.4)
    heads = {site: jobs[f"model.layers.0.self_attn.{site}_proj.weight"].parameters for site in "qo"}
    assert (heads["q"]["head_rows"], heads["q"]["head_columns"]) == (8, 0)
    assert (heads["o"]["head_rows"], heads["o"]["head_columns"]) == (0, 8)


def test_the_command_line(tmp_path: Path, llama: Llama) -> None:
    from yeam.cli.app import app

    target, base, sources = llama("target"), llama("base"), [llama("a"), llama("b")]
    words = ["inject", "--target", target, "--sources", *sources, "--base", base, "--budget", "0.05"]
    result = CliRunner().invoke(app, [str(word) for word in (*words, "--layers", "1-1", "--dry-run", "--json")])
    rows = json.loads(result.stdout)["injection"]
    budgets = {row["tensor"]: row["budget"] for row in rows}
    assert len(budgets) == 21 and sum(budgets.values()) == pytest.approx(7 * 0.05)
    assert budgets["model.layers.1.mlp.up_proj.weight"] == 0.05 and budgets["model.layers.0.mlp.up_proj.weight"] == 0
    shown = CliRunner().invoke(app, [str(word) for word in (*words, "--dry-run")])
    assert "14 of 21 tensors are touched" in shown.stdout
    both = f"{sources[0]},{sources[1]}"
    commas = ["inject", "--target", target, "--sources", both, "--base", base, "--budget", "0.05", "--protect", "space"]
    outs = [tmp_path / "one", tmp_path / "two"]
    for line, out in zip((words, commas), outs):
        result = CliRunner().invoke(app, [str(word) for word in (*line, "--out", out)])
        assert result.exit_code == 0 and "what was touched changed by" in result.stderr, result.stderr
    assert (outs[0] / "model.safetensors").read_bytes() == (outs[1] / "model.safetensors").read_bytes()


def test_a_base_that_is_no_ancestor_is_told(tmp_path: Path, llama: Llama) -> None:
    target = llama("target")
    tensors = load_file(target / "model.safetensors")
    near = {name: tensor + 0.01 for name, tensor in tensors.items()}
    kin, stranger = llama("kin", change=near), llama("stranger")
    kept = yeam.inject(target, kin, tmp_path / "kept", base=llama("base", change=tensors))
    assert not any("ANCESTOR" in note for note in kept.notes)
    report = yeam.inject(target, kin, tmp_path / "out", base=stranger)
    told = [note for note in report.findings if "ANCESTOR" in note]
    assert len(told) == 2 and "/target and the base" in told[0] and "/kin and" in told[1], report.notes
    assert "equals the target" in "".join(
        yeam.inject(target, [kin, llama("twin", change=tensors)], tmp_path / "twin-out").notes
    )


def test_sources_of_another_vocabulary(tmp_path: Path, llama: Llama) -> None:
    """Shared tokens are found by what they stand for; rows of other tokens stay the target's, with and without a base."""
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(13))]
    target = add_words(llama("target", vocab=16), words, **SPECIAL[0])
    base = add_words(llama("base", vocab=16), words, **SPECIAL[0])
    source = llama("source", vocab=16)
    name = "model.embed_tokens.weight"
    tensors = load_file(add_words(source, words, **SPECIAL[0]) / "model.safetensors")
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    kept = [words[i] for i in order.tolist() if words[i] not in ("w3", "w4")]
    rows = torch.cat([tensors[name][words.index(word)][None] for word in kept] + [torch.randn(4, 16)])
    renamed = [*kept, *(f"new{i}" for i in range(4))]
    change = {**tensors, name: rows, "lm_head.weight": rows.clone()}
    other = add_words(llama("other", vocab=len(renamed), change=change), renamed, **SPECIAL[0])
    mine = load_file(target / "model.safetensors")[name]
    for number, origin in enumerate((base, None)):
        options = {"base": origin, "roles": "embedding", "protect": "none", "frames": "none", "budget": 10.0}
        report = yeam.inject(target, other, tmp_path / f"out{number}", **options)
        found = load_file(tmp_path / f"out{number}" / "model.safetensors")[name]
        changed = {words[i] for i in range(16) if not torch.equal(found[i], mine[i])}
        assert changed == {*kept} and any("10 of the target's 16 rows" in note for note in report.notes)
        start = mine if origin is None else load_file(origin / "model.safetensors")[name]
        index = [words.index(word) for word in sorted(kept)]
        step, update = found[index] - mine[index], tensors[name][index] - start[index]
        assert torch.allclose(step / step.norm(), update / update.norm(), atol=1e-4)
    yeam.inject(target, other, tmp_path / "body", base=base)  # without embeddings the vocabulary does not matter


def test_bad_input(tmp_path: Path, llama: Llama, refused: Callable[..., str]) -> None:
    target, base, a = llama("target"), llama("base"), llama("a")
    wide, deep, fewer = (
        llama("wide", hidden=32),
        llama("deep", layers=3),
        llama("fewer", config={"num_attention_heads": 4}),
    )
    out = tmp_path / "out"
    common = ["inject", "--target", target, "--base", base, "--out", out]

    def refuse(*words: object, texts: Sequence[str], sources: Sequence[Path] = (a,)) -> None:
        said = refused([*common, "--sources", *sources, *words], *texts, inputs=[target, base, a])
        assert "recipe" not in said and "plugin" not in said  # the user wrote none
        assert not out.exists()

    refuse(texts=["width 32", "scale_up"], sources=[wide])
    refuse(texts=["4 heads of 4"], sources=[fewer])
    refuse(texts=["target", "nothing to add"], sources=[a, target])
    refuse(texts=["base", "nothing to add"], sources=[base])
    refuse("--roles", "mlp,atention", texts=["unknown role 'atention' (did you mean 'attention'?)"])
    refuse("--roles", "router", texts=["no tensor of the roles router"])
    refuse("--layers", "1-2", texts=["layers 1-2 are not inside the target's 2 layers"])
    refuse("--layers", "x", texts=["is no range"])
    refuse("--policy", "vote", texts=["policy"])
    refuse("--budget", "-1", texts=["budget"])
    refuse("--sources", tmp_path / "nowhere", texts=["nowhere"])
    (tmp_path / "empty.txt").write_text(" \n")
    refuse("--distill", tmp_path / "empty.txt", texts=["no text"])
    refuse("--distill", tmp_path / "empty.txt", "--dry-run", texts=["nothing can be fitted"])
    assert yeam.plan(inject_recipe(target, deep, base)).jobs  # its further layers do not matter
    with pytest.raises(CheckpointError, match=r"has no model\.layers\.2"):
        yeam.plan(inject_recipe(deep, a, llama("deeper", layers=3)))
    with pytest.raises(ConfigError, match="the base is the target"):
        yeam.plan(inject_recipe(target, a, target))
    with pytest.raises(ConfigError, match="a recipe of one model"):
        settings = {"inject": {"sources": [str(a)], "base": str(base)}}
        yeam.plan({"merge_method": "linear", "models": [{"model": str(m), "parameters": {"weight": 1}} for m in (target, a)],
                   "plugins": [settings]})  # fmt: skip
    notes = yeam.plan(inject_recipe(target, [a, a], base, policy="consensus")).notes
    assert any("named twice" in note for note in notes) and any(
        "a single source agrees with itself" in note for note in notes
    )
    assert any("without a base" in note for note in yeam.plan(inject_recipe(target, [a])).notes)


def test_not_finite_sources(tmp_path: Path, llama: Llama) -> None:
    """NaN in a source is refused, and with allow_nan stays where it is: the rest of that tensor is the target's."""
    target, base = llama("target"), llama("base")
    name = "model.layers.0.mlp.up_proj.weight"
    spoiled = load_file(llama("a") / "model.safetensors")[name].clone()
    spoiled[1, 2] = float("nan")
    source = llama("a", change={name: spoiled})
    with pytest.raises(CheckpointError, match=name):
        yeam.inject(target, source, tmp_path / "out", base=base)
    yeam.inject(target, source, tmp_path / "out", base=base, allow_nan=True)
    found = load_file(tmp_path / "out" / "model.safetensors")[name]
    mine = load_file(target / "model.safetensors")[name]
    assert bool(found[1, 2].isnan()) and int((found != mine).sum()) == 1


def test_jobs_know_the_model_that_they_are_of() -> None:
    """How far a target moves follows from its layers, also where its tensors would else be copied."""
    plan = yeam.plan(inject_recipe(MODELS / "prose", [MODELS / "code"], MODELS / "base"))
    assert {job.method for job in plan.jobs} == {"inject", "copy"} and {job.depth for job in plan.jobs} == {4}


def test_distilled_strengths(tmp_path: Path) -> None:
    """The fit is never worse than the target on held-out text, here better; the recipe it writes needs no text."""
    text = tmp_path / "text.txt"
    text.write_text((REPOSITORY / "yeam" / "api.py").read_text()[:2200])
    out = tmp_path / "out"
    steps: list[tuple[int, int]] = []
    report = yeam.inject(
        MODELS / "prose", MODELS / "code", out, base=MODELS / "base", distill=text, budget=0.2,
        distill_progress=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    assert steps[-1][0] == steps[-1][1]
    written = yeam.load_recipe(out / "yeam_config.yaml").recipe.plugins[0].options
    assert len(written["strengths"]) == 8 and {s["roles"][0] for s in written["strengths"]} == {"mlp", "attention"}
    assert len({s["strength"] for s in written["strengths"]}) > 1
    note = next(note for note in report.notes if note.startswith("distill"))
    assert "the sources agree to 100%" in note
    text.unlink()
    again = yeam.merge(out / "yeam_config.yaml", tmp_path / "again")
    assert [t["xxh3"] for t in again.tensors] == [t["xxh3"] for t in report.tensors]
    changes = [part["moved"] / part["base_norm"] for t in report.tensors if "update" in t for part in [t["update"]]]
    assert max(changes) <= 0.2 * (1 + 1e-6)


def test_what_is_distilled() -> None:
    """The sources' mean where they agree, the target where they contradict each other; the fit's gradient is that of its loss."""
    from yeam.distill.teachers import divergence, mixed, reduced

    torch.manual_seed(0)
    sure, other = torch.eye(6)[[1, 2]] * 0.9 + 0.1 / 6, torch.eye(6)[[1, 3]] * 0.9 + 0.1 / 6
    own = torch.full((2, 6), 1 / 6)
    wanted, agreed = mixed([reduced(sure), reduced(other)], reduced(own), 6)
    found = wanted.whole(0, 2, 6)
    assert torch.allclose(found[0], sure[0], atol=1e-5) and 0.4 < agreed < 0.8
    assert float((found[1] - own[1]).abs().max()) < float(((sure + other)[1] / 2 - own[1]).abs().max())
    logits = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    whole = found.double()
    exact = torch.xlogy(whole, whole).sum() - (whole * logits.log_softmax(1)).sum()
    assert float(divergence(logits, wanted, torch.arange(2)).detach()) == pytest.approx(float(exact.detach()), abs=1e-4)


def test_groups_hold_every_tensor_once() -> None:
    from yeam.distill.groups import MOST_GROUPS, groups_of

    plan = yeam.plan(
        inject_recipe(MODELS / "code", MODELS / "prose", MODELS / "base", roles="mlp,attention,embedding,norm")
    )
    jobs = [job for job in plan.jobs if job.method == "inject"]
    groups = groups_of(jobs, ["mlp", "attention", "embedding", "norm"])
    assert sorted(name for group in groups for name in group.jobs) == sorted(job.name for job in jobs)
    assert len(groups) <= MOST_GROUPS and groups[-1].first is None
    with pytest.raises(UserError, match="strengths are fitted"):
        yeam.inject(MODELS / "code", MODELS / "prose", base=MODELS / "base", distill="x", strengths=[{"strength": 1}])
