"""Updates into and out of models that are only partly looked into (experts, latent and state-space attention), of embeddings, and
between models in the same coordinates."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_transfer import LARGER, scrambled
from test_transfer_families import expanded, moved, recipe, tensors, tuned
from transfer_models import PARTIAL, body_of, difference, exact_logits, logits, make, rewritten

import yeam
from yeam.transfer.branches import ATTENTION, EMBEDDING, MLP, kind_of
from yeam.transfer.residual import gain, weight_of

WIDER = {"hidden_size": 96, "intermediate_size": 72}
SHARED = {"moe_intermediate_size": 72, "shared_expert_intermediate_size": 72}


def sizes(kind: str, **changes: Any) -> dict[str, Any]:
    known = PARTIAL[kind][2]
    return changes | ({key: changes["intermediate_size"] for key in SHARED if key in known} if changes else {})


def like(dense: Path, kind: str, out: Path, stretch: float = 1.0, **changes: Any) -> Path:
    """A model of a kind with the words and MLPs of a Llama of its widths, in each expert or in the shared one (its neurons in an order
    of their own there, `stretch` times as long), and with its heads where the kind has heads in all layers."""
    folder = make(kind, out, seed=1, **sizes(kind, **changes))
    body, source = body_of(folder), body_of(dense)
    state = load_file(folder / "model.safetensors")
    words = source.around("embedding", "head", "final_norm", dtype=torch.float64)
    words["final_norm"] = weight_of(gain(words["final_norm"], source), body)
    state |= body.joined({part: words[part] for part in body.outer}, body.outer)
    for number, slots in enumerate(body.slots):
        theirs, parts = source.layer(number, torch.float64), body.layer(number, torch.float64)
        for part in parts:
            last = part.rpartition(".")[2]
            if "norm" in part and part in theirs:
                parts[part] = weight_of(gain(theirs[part], source), body)
            elif part.endswith(".bias") and part not in theirs:
                parts[part] = torch.zeros_like(parts[part])
            elif kind_of(part) == ATTENTION:
                parts[part] = theirs[part]
            elif any(part.startswith(prefix) for prefix in body.branches(number)):
                seed = number + sum(map(ord, part.removesuffix(last)))
                order = torch.randperm(len(theirs["up"]), generator=torch.Generator().manual_seed(seed))
                values = theirs[last][:, order] if last == "down" else theirs[last][order]
                parts[part] = values * (stretch if "expert" in part and last == "down" else 1)
        state |= body.joined(parts, slots)
    save_file({name: x.contiguous() for name, x in state.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", PARTIAL)
def test_an_update_moves_exactly_into_what_is_known_of_a_host(kind: str, tmp_path: Path) -> None:
    """Host: the base in a larger stream, scrambled there, its MLPs in experts or beside attention of another kind."""
    base = make("llama", tmp_path / "base")
    shape = make("llama", tmp_path / "shape", seed=1, **WIDER)
    hosts = []
    for name, source in (("host", base), ("wanted", tuned(base))):
        dense = expanded(source, shape, tmp_path / f"{name}-dense")
        hosts.append(like(rewritten(dense, scrambled(dense)), kind, tmp_path / name, **WIDER))
    found = moved(hosts[0], base, tmp_path / "base-tuned")
    before, wanted, after = (
        load_file(hosts[0] / "model.safetensors"),
        load_file(hosts[1] / "model.safetensors"),
        tensors(found),
    )
    differ = {name for name, x in before.items() if not torch.equal(x, wanted[name])}
    assert {name for name, x in after.items() if not torch.equal(x, before[name])} == differ
    assert all(difference(after[name], wanted[name]) < 1e-6 < difference(before[name], wanted[name]) for name in differ)
    heads = [name for name in differ if "q_proj" in name]
    assert bool(heads) == body_of(hosts[0]).attends and any("down" in name or "w2" in name for name in differ)
    assert any("experts" in name for name in differ) == (kind in ("mixtral", "jamba", "deepseek_v2", "deepseek_v3"))
    assert bool(found.remarks) and not any("gate.weight" in name or "router" in name for name in differ)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_experts_take_what_a_dense_model_has_learned(kind: str, tmp_path: Path) -> None:
    """As transformers computes it: an upcycled host does after the merge what the tuned model does, whatever the router weighs."""
    base = make("llama", tmp_path / "base")
    shape = make("llama", tmp_path / "shape", seed=1, **WIDER)
    dense = expanded(base, shape, tmp_path / "dense")
    host = like(
        rewritten(dense, scrambled(dense)), kind, tmp_path / "host", 2.0 if kind == "qwen2_moe" else 1.0, **WIDER
    )
    if kind == "qwen2_moe":  # half of the shared expert, nothing of the others
        state = load_file(host / "model.safetensors")
        for name, x in state.items():
            if "shared_expert_gate" in name or ("experts." in name and "down" in name):
                state[name] = torch.zeros_like(x)
        save_file(state, host / "model.safetensors", {"format": "pt"})
    assert difference(logits(host), logits(base)) < 1e-5
    report = yeam.merge(recipe(host, tuned(base), base, budget=10.0), tmp_path / "out")
    wanted = logits(tmp_path / "base-tuned")
    assert difference(logits(tmp_path / "out"), wanted) < 1e-5 and difference(logits(host), wanted) > 0.05
    assert any("descends" in note and "100% of the neurons" in note for note in report.notes)
    assert any("routers stay as they are" in note for note in report.notes)


@pytest.mark.parametrize("kind", ["qwen2_moe", "deepseek_v3", "bamba"])
def test_what_is_known_of_a_source_moves(kind: str, tmp_path: Path) -> None:
    """Its MLPs, as far as every token visits them, into a larger Llama; its attention only where that is by heads."""
    dense = make("llama", tmp_path / "dense")
    base = like(dense, kind, tmp_path / "base", intermediate_size=56)
    other = like(tuned(dense), kind, tmp_path / "other", intermediate_size=56)
    shape = make("llama", tmp_path / "shape", seed=1, **WIDER)
    host, wanted = (expanded(x, shape, tmp_path / f"{x.name}-large") for x in (dense, tmp_path / "dense-tuned"))
    host, wanted = rewritten(host, scrambled(host)), rewritten(wanted, scrambled(wanted))
    found = moved(host, base, other)
    before, after, target = (
        load_file(host / "model.safetensors"),
        tensors(found),
        load_file(wanted / "model.safetensors"),
    )
    heads = body_of(base).attends
    for name, x in after.items():
        if "mlp" in name or (heads and "_proj" in name):
            assert difference(x, target[name]) < 1e-6 < difference(before[name], target[name]), name
        else:
            assert torch.equal(x, before[name]), name
    assert bool(found.remarks) and heads == (kind == "qwen2_moe")


def with_words(folder: Path, scale: float = 0.1) -> Path:
    """Embedding and head changed as well."""
    state, body = load_file(folder / "model.safetensors"), body_of(folder)
    generator = torch.Generator().manual_seed(6)
    for part, slot in body.outer.items():
        if part in EMBEDDING:
            x = state[slot.name]
            state[slot.name] = x + scale * x.std() * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gemma3", "granite", "gpt2", "gpt_neox"])
def test_words_move_exactly_into_a_descendant(kind: str, tmp_path: Path) -> None:
    """Rows of embedding and head, in a larger shape, scrambled there, whatever the norms, shifts and factors of the family."""
    base, shape = make(kind, tmp_path / "base"), make(kind, tmp_path / "shape", seed=1, **LARGER[kind])
    other = with_words(tuned(base))
    host, wanted = expanded(base, shape, tmp_path / "host"), expanded(other, shape, tmp_path / "wanted")
    host = rewritten(host, scrambled(host))
    found = moved(host, base, other, parts=ATTENTION + MLP + EMBEDDING)
    after, target = exact_logits(rewritten(host, tensors(found))), exact_logits(wanted)
    assert difference(after, target) < 1e-5
    plain = exact_logits(rewritten(host, tensors(moved(host, base, other))))
    assert difference(plain, target) > 0.02


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox"])
def test_an_update_moves_exactly_beside_shifts(kind: str, tmp_path: Path) -> None:
    """Into the base itself in other coordinates, where weights have means that nothing reads, and rows that are embedding and head."""
    base = make(kind, tmp_path / "base")
    other = with_words(tuned(base))
    host = rewritten(shutil.copytree(base, tmp_path / "host"), scrambled(base))
    found = moved(host, base, other, parts=ATTENTION + MLP + EMBEDDING)
    assert found.relation.tier == "same shape" and body_of(host).is_tied == (kind == "gpt2")
    target = exact_logits(other)
    assert difference(exact_logits(rewritten(host, tensors(found))), target) < 1e-6
    assert difference(exact_logits(host), target) > 0.05


def test_words_of_strangers_stay(tmp_path: Path) -> None:
    """Tokens whose rows lie elsewhere in the host, or that the source lacks, are not touched, though others show how the streams lie to
    each other; nor does it matter how many rows are read at once."""
    base, shape = make("llama", tmp_path / "base"), make("llama", tmp_path / "shape", seed=1, **LARGER["llama"])
    host = expanded(base, shape, tmp_path / "host")
    state = load_file(host / "model.safetensors")
    strange, names = torch.arange(0, 160, 8), ("model.embed_tokens.weight", "lm_head.weight")
    for name in names:
        state[name][strange] = -state[name][strange]
        state[name] = torch.cat([state[name], state[name][:20]])
    host = rewritten(host, state)
    found = moved(host, base, with_words(tuned(base)), parts=EMBEDDING)
    for name in names:
        after = torch.cat([found.read(name, row * 80, (row + 20) * 80) for row in range(0, 180, 20)])
        change = (after.view(-1, 80) - state[name]).norm(dim=1)
        assert (
            bool((change[strange] == 0).all()) and bool((change[160:] == 0).all()) and float((change > 0).sum()) == 140
        )


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "gpt_neox"])
def test_in_the_same_coordinates_an_update_is_task_arithmetic(kind: str, tmp_path: Path) -> None:
    """Bit for bit, norms and words included, into the base itself and into a relative that was trained on."""
    base = make(kind, tmp_path / "base", dtype=torch.float32)
    state, generator = load_file(base / "model.safetensors"), torch.Generator().manual_seed(3)
    folders = {}
    for name in ("tuned", "relative"):
        folders[name] = Path(shutil.copytree(base, tmp_path / name))
        moved_state = {key: x + 0.02 * torch.randn(x.shape, generator=generator) for key, x in state.items()}
        save_file(moved_state, folders[name] / "model.safetensors", {"format": "pt"})
    plain = {"merge_method": "task_arithmetic", "base_model": str(base), "models": [{"model": str(folders["tuned"])}]}
    yeam.merge({**plain, "parameters": {"weight": 1.0}}, tmp_path / "plain")
    wanted = load_file(tmp_path / "plain/model.safetensors")
    yeam.merge(recipe(base, folders["tuned"], base, budget=10.0), tmp_path / "out")
    assert all(torch.equal(x, wanted[name]) for name, x in load_file(tmp_path / "out/model.safetensors").items())
    report = yeam.merge(
        recipe(folders["relative"], folders["tuned"], base, budget=10.0, strength=0.5), tmp_path / "other"
    )
    after, own, gap = (
        load_file(f / "model.safetensors") for f in (tmp_path / "other", folders["relative"], folders["tuned"])
    )
    assert all(torch.equal(x, own[name] + 0.5 * (gap[name] - state[name])) for name, x in after.items())
    assert any("added as it is" in note for note in report.notes)
    yeam.merge(recipe(folders["relative"], folders["tuned"], base, budget=0.01), tmp_path / "bound")
    bound = load_file(tmp_path / "bound/model.safetensors")
    name = next(name for name in bound if "mlp" in name and bound[name].dim() == 2)
    assert difference(bound[name], own[name]) == pytest.approx(0.01, rel=1e-4)


def test_a_scrambled_relative_is_not_in_the_same_coordinates(tmp_path: Path) -> None:
    base = make("llama", tmp_path / "base")
    host = rewritten(base, scrambled(base))
    found = moved(host, base, tuned(base))
    assert found.relation.tier == "same shape" and not found.relation.is_same and found.strength == 1.0


def test_several_sources_meet_in_the_host(tmp_path: Path) -> None:
    """The same source twice is that source; one and its opposite leave the host as it was."""
    base, shape = make("llama", tmp_path / "base"), make("llama", tmp_path / "shape", seed=1, **LARGER["llama"])
    host, other = expanded(base, shape, tmp_path / "host"), with_words(tuned(base))
    before, after = load_file(base / "model.safetensors"), load_file(other / "model.safetensors")
    opposite = Path(shutil.copytree(other, tmp_path / "opposite"))
    save_file(
        {name: 2 * x - after[name] for name, x in before.items()}, opposite / "model.safetensors", {"format": "pt"}
    )
    own, results = load_file(host / "model.safetensors"), {}
    for name, sources in {"once": [other], "twice": [other, other], "against": [other, opposite]}.items():
        plan = recipe(host, other, base, budget=10.0)
        plan["plugins"][0]["scale_up"]["sources"] = [{"model": str(source), "base": str(base)} for source in sources]
        yeam.merge(plan, tmp_path / name)
        results[name] = load_file(tmp_path / name / "model.safetensors")
    for name, x in own.items():
        for one, wanted in (("twice", results["once"][name]), ("against", x)):
            assert float((results[one][name] - wanted).norm()) <= 1e-6 * float(wanted.norm()), (one, name)
    assert difference(results["once"]["lm_head.weight"], own["lm_head.weight"]) > 0.05


def test_notes_on_what_moves(tmp_path: Path) -> None:
    """They call models by the names that the report has, and say nothing of kinds that are not merged."""
    base, host = make("llama", tmp_path / "base"), make("mixtral", tmp_path / "host", seed=1)
    sources = [{"model": str(tuned(base)), "base": str(base)}]
    plan = yeam.plan(
        {
            "merge_method": "passthrough",
            "models": [{"model": str(host)}],
            "plugins": [{"scale_up": {"sources": sources}}],
        }
    )
    assert [note for note in plan.notes if note.startswith("host: MLPs move into each expert")]
    assert not [note for note in plan.notes if str(tmp_path) in note or "config.json says" in note], plan.notes
