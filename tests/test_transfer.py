"""Symmetries of decoders: legal changes of coordinates change nothing that transformers computes, and they are found again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from safetensors.torch import load_file, save_file
from transfer_models import (
    KINDS,
    body_of,
    difference,
    exact_logits,
    inverse,
    logits,
    make,
    random_gauge,
    random_rotation,
    rewritten,
)

import yeam
from yeam.errors import UserError
from yeam.transfer import neurons
from yeam.transfer.align import align_layer
from yeam.transfer.aligned import AlignedCheckpoint, may_rotate
from yeam.transfer.anchors import gather
from yeam.transfer.body import Body
from yeam.transfer.branches import ATTENTION, MLP
from yeam.transfer.effective import Effective
from yeam.transfer.gauge import regauged
from yeam.transfer.residual import Rotation, rotated_layer, rotated_outer
from yeam.transfer.stream import rotation_of
from yeam.transfer.transported import TransportedCheckpoint


def scrambled(folder: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """Stored tensors of a model after a random change of everything that may be changed."""
    body = body_of(folder)
    rotation = random_rotation(body, seed)
    out = {}
    for layer in range(body.depth):
        parts = regauged(body.layer(layer, torch.float64), body, random_gauge(body, layer, seed + layer))
        other = body.layer((layer + 1) % body.depth, torch.float64)  # any gains will do
        out.update(body.joined(rotated_layer(parts, body, rotation, other), body.slots[layer]))
    outer = body.around("embedding", "position", "final_norm", "head", dtype=torch.float64)
    out.update(body.joined(rotated_outer(outer, body, rotation, {}), body.outer))
    return out


def unscrambled(folder: Path, original: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """Stored tensors with what `scrambled` did to the original taken back, in float64."""
    body, host = body_of(folder), body_of(original)
    rotation = Rotation.of(random_rotation(host, seed).matrix_DD.T)
    out = {}
    for layer in range(body.depth):
        parts = rotated_layer(body.layer(layer, torch.float64), body, rotation, host.layer(layer, torch.float64))
        out.update(
            body.joined(regauged(parts, body, inverse(random_gauge(host, layer, seed + layer))), body.slots[layer])
        )
    outer = body.around("embedding", "position", "final_norm", "head", dtype=torch.float64)
    out.update(
        body.joined(rotated_outer(outer, body, rotation, host.around("final_norm", dtype=torch.float64)), body.outer)
    )
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_symmetries_leave_the_function_as_it_is(kind: str, tmp_path: Path) -> None:
    folder = make(kind, tmp_path / "model")
    changed = rewritten(folder, scrambled(folder))
    assert difference(exact_logits(changed), exact_logits(folder)) < 1e-9
    assert difference(logits(changed), logits(folder)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_scrambled_model_is_found_again(kind: str, tmp_path: Path) -> None:
    folder = make(kind, tmp_path / "model")
    host, source = body_of(folder), body_of(rewritten(folder, scrambled(folder)))
    tokens = torch.arange(160)
    rotation, fit = rotation_of(gather(host, source, tokens, tokens), source, rotate=may_rotate(source))
    assert fit.gate > 0.999
    for layer in range(host.depth):
        there, here = host.layer(layer, torch.float64), source.layer(layer, torch.float64)
        found = align_layer(here, source, there, host, rotation)
        back = rotated_layer(regauged(here, source, found.gauge), source, rotation, there)
        for part, wanted in there.items():
            assert difference(back[part], wanted) < 1e-8, (layer, part)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scrambled_model_is_found_again_in_float32(kind: str, tmp_path: Path) -> None:
    """To 1e-6, or to what rounding of the scrambled weights leaves where the scramble is known and taken back in float64: random changes
    of heads may multiply it by more than ten."""
    folder = make(kind, tmp_path / "model", dtype=torch.float32)
    other = rewritten(folder, {name: x.float() for name, x in scrambled(folder).items()})
    aligned, known = AlignedCheckpoint(body_of(other), body_of(folder)), unscrambled(other, folder)
    for name, x in load_file(folder / "model.safetensors").items():
        found, wanted = aligned.read(name, 0, x.numel()).view(x.shape).double(), x.double()
        assert difference(found, wanted) < max(1e-6, difference(known[name], wanted)), name


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gemma3", "gpt2", "gpt_neox"])
def test_an_aligned_model_computes_the_same_and_lies_on_its_host(kind: str, tmp_path: Path) -> None:
    folder = make(kind, tmp_path / "model")
    other = rewritten(folder, scrambled(folder))
    host, source = body_of(folder), body_of(other)
    aligned = AlignedCheckpoint(source, host)
    found = {name: aligned.read(name, 0, info.numel).view(info.shape) for name, info in aligned.tensors.items()}
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert difference(found[name], tensor) < 1e-8, name
    assert difference(exact_logits(rewritten(other, found)), exact_logits(other)) < 1e-9


def test_gains_that_hide_directions_are_found_again(tmp_path: Path) -> None:
    """An exact match divides readers by the host's gains however small they are; of one that is not exact noise would be left there."""
    plain = make("llama", tmp_path / "model")
    norms = {name: x for name, x in load_file(plain / "model.safetensors").items() if "layernorm" in name}
    for gains in norms.values():
        gains[:3] = torch.tensor([1e-3, -2e-3, 0.01])
    folder = rewritten(plain, norms)
    state = load_file(folder / "model.safetensors")
    aligned = AlignedCheckpoint(body_of(rewritten(folder, scrambled(folder))), body_of(folder))
    for name, x in state.items():
        assert difference(aligned.read(name, 0, x.numel()).view(x.shape), x) < 1e-8, name
    generator = torch.Generator().manual_seed(9)
    noisy = {
        name: x + 0.2 * x.std() * torch.randn(x.shape, generator=generator, dtype=x.dtype) if x.dim() > 1 else x
        for name, x in state.items()
    }
    true = rewritten(folder, noisy)
    alike = AlignedCheckpoint(body_of(rewritten(true, scrambled(true))), body_of(folder))
    name = next(iter(norms))
    found = alike.read(name, 0, state[name].numel())
    assert float(found.abs().min()) == pytest.approx(0.05 * float(state[name].abs().median()))


def silent(parts: dict[str, torch.Tensor], body: Body, what: str) -> None:
    """Take from a layer's parts, in place, what its heads carry: all or some of it."""
    wide = body.head_dim
    if what == "a whole layer":
        parts["o"].zero_(), parts["down"].zero_()
    elif what == "keys":
        parts["k"][:wide] = 0
    elif what == "values":
        parts["v"][:wide] = 0
    elif what == "outputs":
        parts["o"][:, : body.heads // body.kv_heads * wide] = 0
    elif what == "values of rank 1":
        parts["v"][:wide] = parts["v"][:1] * torch.linspace(-1, 2, wide, dtype=torch.float64)[:, None]
    else:
        parts["v"].view(body.kv_heads, wide, -1)[:, wide // 2 :] = 0
        parts["o"].view(-1, body.heads, wide)[:, :, wide // 2 :] = 0


@pytest.mark.parametrize("who", ["both", "host", "source"])
@pytest.mark.parametrize(
    "what", ["a whole layer", "keys", "values", "outputs", "values of rank 1", "half of the dimensions"]
)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_heads_that_carry_nothing_or_little_are_aligned(kind: str, what: str, who: str, tmp_path: Path) -> None:
    """The aligned model computes the same, with weights of ordinary size, and lies on a host that it equals."""
    plain, other = make(kind, tmp_path / "plain"), make(kind, tmp_path / "other")
    body = body_of(plain)
    parts = body.layer(1, torch.float64)
    silent(parts, body, what)
    edited = rewritten(plain, body.joined(parts, body.slots[1]))
    source = rewritten(other, scrambled(other)) if who == "host" else rewritten(edited, scrambled(edited))
    host = plain if who == "source" else edited
    aligned = AlignedCheckpoint(body_of(source), body_of(host))
    found = {name: aligned.read(name, 0, info.numel).view(info.shape) for name, info in aligned.tensors.items()}
    wanted = exact_logits(source)
    assert difference(exact_logits(rewritten(source, found)), wanted) < 1e-9
    assert max(float(x.abs().max()) for x in found.values()) < 100
    if who == "both":
        half = {name: (x + found[name]) / 2 for name, x in load_file(host / "model.safetensors").items()}
        assert difference(exact_logits(rewritten(source, half)), wanted) < 1e-8


def test_align_on_the_command_line(tmp_path: Path, yeam_process: Callable[..., Any]) -> None:
    """A scrambled model, aligned, merges with the original as if nothing had happened; unaligned it does not."""
    folder = make("llama", tmp_path / "model", dtype=torch.float32)
    other = rewritten(folder, {name: x.float() for name, x in scrambled(folder).items()})
    done = yeam_process("align", folder, other, "--out", tmp_path / "aligned", "--json")
    report = json.loads(done.stdout)
    assert report["stream"]["tier"] == "same shape" and report["stream"]["anchors"] == 160
    assert report["stream"]["gate"] > 0.999 and "aligned exactly" in report["verdict"] and len(report["layers"]) == 3
    assert difference(logits(tmp_path / "aligned"), logits(other)) < 1e-5
    only = json.loads(yeam_process("align", folder, other, "--report-only", "--json").stdout)
    assert only["layers"][2]["head_score"] == pytest.approx(report["layers"][2]["head_score"], abs=1e-5)
    recipe: dict[str, Any] = {"merge_method": "linear", "parameters": {"weight": 1.0}}
    recipe["models"] = [{"model": str(folder)}, {"model": str(other)}]
    yeam.merge(recipe, tmp_path / "naive")
    yeam.merge({**recipe, "plugins": ["align"]}, tmp_path / "merged")
    wanted = logits(folder)
    assert (
        difference(logits(tmp_path / "merged"), wanted) < 1e-5 and difference(logits(tmp_path / "naive"), wanted) > 0.5
    )


def test_a_tuned_model_takes_the_alignment_of_its_base(tmp_path: Path) -> None:
    folder = make("qwen2", tmp_path / "model")
    base = rewritten(folder, scrambled(folder))
    state = load_file(base / "model.safetensors")
    update = {name: 0.05 * torch.randn(x.shape, dtype=torch.float64) for name, x in state.items()}
    tuned = tmp_path / "tuned"
    shutil.copytree(base, tuned)
    save_file({name: x + update[name] for name, x in state.items()}, tuned / "model.safetensors", {"format": "pt"})
    recipe = {"merge_method": "linear", "parameters": {"weight": 1.0}, "models": [{"model": str(tuned)}],
              "plugins": [{"align": {"to": str(folder), "judge": str(base)}}]}  # fmt: skip
    yeam.merge(recipe, tmp_path / "out")
    assert difference(exact_logits(tmp_path / "out"), exact_logits(tuned)) < 1e-9
    moved, original = load_file(tmp_path / "out/model.safetensors"), load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.gate_proj.weight"  # permuted, rotated, and scaled by norms only
    assert 0.01 < difference(moved[name], original[name]) < 0.6


def test_what_an_alignment_says_of_fine_tunes(refused, tmp_path: Path) -> None:
    """Close relatives are not called the same model, and one model is not its own host."""
    models = REPOSITORY / "examples" / "tiny-family" / "models"
    report = yeam.align(models / "base", models / "code")
    assert "fine-tunes" in report.verdict and "exactly" not in report.verdict
    refused(["align", models / "base", models / "base", "--report-only"], "both the host and the source")
    words = ["align", models / "base", models / "code", "--out", tmp_path / "out", "--plot"]
    refused([*words, tmp_path / "no" / "a.png"], "there is no folder")
    refused([*words, tmp_path / "a.html"], "not as a page")
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_aligned(tmp_path: Path) -> None:
    llama, wide = make("llama", tmp_path / "llama"), make("llama", tmp_path / "wide", intermediate_size=64)
    deep, other = make("llama", tmp_path / "deep", num_hidden_layers=2), make("qwen3", tmp_path / "qwen3")
    for source, words in ((wide, "tensors of layer 0"), (deep, "3 in"), (other, "computation"), (llama, "to itself")):
        with pytest.raises(UserError, match=words):
            plugin = {"align": {"to": str(llama), "models": [str(source)]}}
            yeam.plan({"merge_method": "passthrough", "models": [{"model": str(source)}], "plugins": [plugin]})
    stranger = make("llama", tmp_path / "stranger", seed=5)
    report = yeam.align(llama, stranger)
    assert "not alignable" in report.verdict and report.stream["gate"] < 0.05


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "gpt_neox"])
@pytest.mark.parametrize(("noise", "bound"), [(0.2, 0.06), (0.5, 0.16), (1.0, 0.30)])
def test_noise_does_not_mislead(kind: str, noise: float, bound: float, tmp_path: Path) -> None:
    """The source is the host with noise of that share of each tensor's deviation, then scrambled: found within half the noise."""
    folder = make(kind, tmp_path / "model")
    generator = torch.Generator().manual_seed(9)
    noisy = {
        name: x + noise * x.std() * torch.randn(x.shape, generator=generator, dtype=x.dtype) if x.dim() > 1 else x
        for name, x in load_file(folder / "model.safetensors").items()
    }
    true = rewritten(folder, noisy)
    host, source = body_of(folder), body_of(rewritten(true, scrambled(true)))
    aligned, errors = AlignedCheckpoint(source, host), []
    for layer in range(source.depth):
        found, gauge = aligned.match(layer), random_gauge(source, layer, layer)
        assert torch.equal(found.heads.heads_B, gauge.heads_H.argsort())
        assert torch.equal(found.neurons.neurons_B, gauge.neurons_I.argsort())
    for name, wanted in noisy.items():
        if wanted.dim() > 1:
            errors.append(difference(aligned.read(name, 0, wanted.numel()).view(wanted.shape), wanted))
    assert sum(errors) / len(errors) < bound


@pytest.mark.parametrize("gated", [True, False])
def test_neurons_are_matched_alike_in_blocks_of_any_size(gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Best partners and leads are those of the whole matrix of scores; however few are assigned at once, each is taken once."""
    generator = torch.Generator().manual_seed(0)

    def layer(count: int) -> Effective:
        rows = [torch.randn(count, 12, generator=generator) for _ in range(3)]
        return Effective(*[torch.zeros(0, 4, 12)] * 4, rows[0] if gated else None, rows[1], rows[2])

    source, host = layer(150), layer(200)
    unit = [
        None if a is None else torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T
        for a, b in zip((source.gate_ID, source.up_ID, source.down_ID), (host.gate_ID, host.up_ID, host.down_ID))
    ]
    score_AB = unit[1] + unit[2] if unit[0] is None else unit[0] + unit[1] * unit[2]
    whole = neurons.match_neurons(source, host)
    taken = whole.neurons_B >= 0
    assert sorted(whole.neurons_B[taken].tolist()) == list(range(150))
    mutual = (score_AB.argmax(1)[score_AB.argmax(0)] == torch.arange(200)).nonzero()[:, 0]
    assert torch.equal(whole.neurons_B[mutual], score_AB.argmax(0)[mutual]) and len(mutual) > 10
    top = score_AB.topk(2, dim=0).values
    assert torch.allclose(whole.margin_B[mutual], (top[0] - top[1])[mutual], atol=1e-6)
    monkeypatch.setattr(neurons, "BLOCK", 1)
    blocks = neurons.match_neurons(source, host)
    assert torch.equal(blocks.neurons_B, whole.neurons_B)
    assert torch.allclose(blocks.margin_B[taken], whole.margin_B[taken], atol=1e-6)
    monkeypatch.setattr(neurons, "DENSE", 16)
    few = neurons.match_neurons(source, host).neurons_B
    assert sorted(few[few >= 0].tolist()) == list(range(150)) and torch.equal(few[mutual], whole.neurons_B[mutual])


LARGER = {
    "llama": {"hidden_size": 80, "intermediate_size": 90, "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 4,
              "head_dim": 16},
    "gpt2": {"n_embd": 60, "n_inner": 70, "n_layer": 4, "n_head": 5, "n_positions": 80},
    "gpt_neox": {"hidden_size": 60, "intermediate_size": 70, "num_hidden_layers": 4, "num_attention_heads": 5},
}  # fmt: skip
LARGER |= dict.fromkeys(
    ("llama-biases", "llama-tied", "mistral", "qwen2", "qwen3", "gemma3", "granite", "olmo2"), LARGER["llama"]
)
LARGER["phi3"] = {k: v for k, v in LARGER["llama"].items() if k != "head_dim"} | {
    "hidden_size": 128,
    "partial_rotary_factor": 0.5,
}
LARGER["gemma3"] = LARGER["gemma3"] | {
    "layer_types": [f"{x}_attention" for x in ("sliding", "full", "sliding", "full")]
}


@pytest.mark.parametrize("kind", LARGER)
def test_a_small_model_in_a_larger_shape_computes_the_same(kind: str, tmp_path: Path) -> None:
    """Width, depth, heads, groups, head dimensions and neurons all grow at once."""
    small, large = (
        make(kind, tmp_path / "small"),
        make(kind, tmp_path / "large", seed=1, vocab_size=200, **LARGER[kind]),
    )
    recipe = {
        "merge_method": "passthrough",
        "models": [{"model": str(small)}],
        "plugins": [{"expand": {"to": str(large)}}],
    }
    yeam.merge(recipe, tmp_path / "out")
    assert difference(exact_logits(tmp_path / "out"), exact_logits(small)) < 1e-9
    assert difference(logits(tmp_path / "out"), logits(small)) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3", "gpt_neox", "gpt2"])
def test_an_update_moves_exactly_into_a_descendant(kind: str, tmp_path: Path) -> None:
    """Host = the base in a larger shape, scrambled there: host + moved update computes what the tuned model computes."""
    base, large = make(kind, tmp_path / "base"), make(kind, tmp_path / "large", seed=1, **LARGER[kind])
    body = body_of(base)
    tuned = tmp_path / "tuned"
    shutil.copytree(base, tuned)
    state = load_file(base / "model.safetensors")
    inside = {slot.name for slots in body.slots for part, slot in slots.items() if "norm" not in part}
    generator = torch.Generator().manual_seed(4)
    for name in inside:
        noise = torch.randn(state[name].shape, generator=generator, dtype=torch.float64)
        state[name] = state[name] + 0.1 * state[name].std() * noise
    save_file(state, tuned / "model.safetensors", {"format": "pt"})
    for source, out in ((base, "host"), (tuned, "wanted")):
        yeam.merge({"merge_method": "passthrough", "models": [{"model": str(source)}],
                    "plugins": [{"expand": {"to": str(large)}}]}, tmp_path / out)  # fmt: skip
    host = rewritten(tmp_path / "host", scrambled(tmp_path / "host"))
    moved = TransportedCheckpoint(body_of(host), body, body_of(tuned), strength=1.0, budget=10.0, parts=ATTENTION + MLP)
    assert moved.relation.layer_map == {0: 0, 1: 1, 2: 2} and moved.relation.maps.is_rotation
    found = {name: moved.read(name, 0, info.numel).view(info.shape) for name, info in moved.tensors.items()}
    before, wanted = exact_logits(host), exact_logits(tuned)
    assert difference(before, exact_logits(base)) < 1e-9 and difference(before, wanted) > 0.05
    assert difference(exact_logits(rewritten(host, found)), wanted) < 1e-5
