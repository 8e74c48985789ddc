"""Updates between models of different families: exact where one function fits into the other's shape, and bad input."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from conftest import REPOSITORY, save_model
from safetensors.torch import load_file, save_file
from test_transfer import LARGER, scrambled
from transfer_models import body_of, difference, exact_logits, logits, make, rewritten

import yeam
from yeam.errors import UserError
from yeam.transfer import layer_update
from yeam.transfer.anchors import gather
from yeam.transfer.branches import ATTENTION, MLP
from yeam.transfer.rotary import speeds
from yeam.transfer.stream import maps_of
from yeam.transfer.transported import TransportedCheckpoint


def tuned(base: Path, seed: int = 4) -> Path:
    """A model of the same shape, a small step in every matrix away."""
    out = base.with_name(base.name + "-tuned")
    shutil.copytree(base, out)
    state, body = load_file(base / "model.safetensors"), body_of(base)
    generator = torch.Generator().manual_seed(seed)
    for name in sorted({slot.name for slots in body.slots for part, slot in slots.items() if "norm" not in part}):
        noise = torch.randn(state[name].shape, generator=generator, dtype=torch.float64)
        state[name] = state[name] + 0.1 * state[name].std() * noise
    save_file(state, out / "model.safetensors", {"format": "pt"})
    return out


def moved(host: Path, base: Path, other: Path, **options: Any) -> TransportedCheckpoint:
    settings = {"strength": 1.0, "budget": 10.0, "parts": ATTENTION + MLP, **options}
    return TransportedCheckpoint(body_of(host), body_of(base), body_of(other), **settings)


def relative(base: Path, kind: str, out: Path) -> Path:
    """A larger model of a kind whose layers are its own, and whose words are the base's, turned into its stream."""
    host, small = make(kind, out, seed=1, **LARGER[kind]), body_of(base)
    body, state = body_of(host), load_file(host / "model.safetensors")
    wide = torch.linalg.qr(
        torch.randn(body.hidden, small.hidden, generator=torch.Generator().manual_seed(8)).double()
    ).Q
    words = small.around("embedding", "head", dtype=torch.float64)
    for part, slot in body.outer.items():
        if part in ("embedding", "head"):
            state[slot.name] = words.get(part, words["embedding"]) @ wide.T
    save_file(state, host / "model.safetensors", {"format": "pt"})
    return host


def tensors(checkpoint: TransportedCheckpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint.read(name, 0, info.numel).view(info.shape) for name, info in checkpoint.tensors.items()}


def expanded(small: Path, shape: Path, out: Path) -> Path:
    yeam.merge({"merge_method": "passthrough", "models": [{"model": str(small)}],
                "plugins": [{"expand": {"to": str(shape)}}]}, out)  # fmt: skip
    return out


@pytest.mark.parametrize("kind", ["qwen2", "granite", "phi3"])
def test_an_update_moves_exactly_into_another_family(kind: str, tmp_path: Path) -> None:
    """A Llama's function in a larger model with biases, other scalars, or fused tensors, scrambled there."""
    base = make("llama", tmp_path / "base")
    other = tuned(base)
    changes = {**LARGER[kind], **({"partial_rotary_factor": 1.0} if kind == "phi3" else {})}
    shape = make(kind, tmp_path / "shape", seed=1, **changes)

    host = expanded(base, shape, tmp_path / "host")
    wanted = exact_logits(expanded(other, shape, tmp_path / "wanted"))
    host = rewritten(host, scrambled(host))
    assert difference(exact_logits(host), exact_logits(base)) < 1e-9
    found = moved(host, base, other)
    after = exact_logits(rewritten(host, tensors(found)))
    assert difference(after, wanted) < 1e-5 and difference(exact_logits(host), wanted) > 0.05
    assert found.relation.tier == "same vocabulary"


@pytest.mark.parametrize(
    ("source", "kind"), [("llama", "gemma3"), ("gemma3", "gemma3"), ("llama", "qwen3"), ("gemma3", "llama")]
)
def test_scales_that_a_norm_leaves_open_do_not_matter(
    source: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights in front of a norm may have any length; an update that moves there is as long relative to them."""
    monkeypatch.setattr(layer_update, "gated", lambda layer, match, host: layer)  # the layers have nothing in common
    base = make(source, tmp_path / "base")
    host, other = relative(base, kind, tmp_path / "host"), tuned(base)
    body = body_of(host)
    state = load_file(host / "model.safetensors")
    stretched = {}
    for slots in body.slots:
        for part, factor in (("q", 3.0), ("k", 0.2), ("o", 7.0), ("down", 0.1)):
            behind = "qk" if part in "qk" else {"o": "attn_post_norm", "down": "mlp_post_norm"}[part]
            if (behind == "qk" and body.traits.qk_norm != "none") or behind in slots:
                stretched[slots[part].name] = factor * state[slots[part].name]
    assert bool(stretched) == (kind != "llama")
    plain = tensors(moved(host, base, other))
    changed = [name for name, x in plain.items() if difference(x, state[name]) > 1e-4]
    assert len(changed) == 7 * 3 and all(x.isfinite().all() for x in plain.values())
    if stretched:
        longer = rewritten(host, stretched)
        again = tensors(moved(longer, base, other))
        for name in stretched:
            ratio = float(stretched[name].norm() / state[name].norm())
            assert difference(again[name] / ratio, plain[name]) < 1e-6, name


PAIRS = [("llama", "gpt2"), ("gpt2", "gpt_neox"), ("gpt_neox", "llama"), ("qwen2", "llama"), ("llama", "llama-biases"),
         ("qwen3", "gemma3"), ("gemma3", "qwen2"), ("phi3", "granite"), ("granite", "mistral"), ("mistral", "phi3")]  # fmt: skip


@pytest.mark.parametrize(("source", "kind"), PAIRS)
def test_any_families_can_be_mapped(source: str, kind: str, tmp_path: Path) -> None:
    """Whatever the two models have, what is moved is finite and within the budget."""
    base = make(source, tmp_path / "base")
    host = relative(base, kind, tmp_path / "host")
    found = moved(host, base, tuned(base), budget=0.01)
    state = load_file(host / "model.safetensors")
    steps = {name: difference(x, state[name]) for name, x in tensors(found).items()}
    assert all(0 <= step <= 0.0100001 for step in steps.values()) and max(steps.values()) > 1e-5
    gated = [body_of(folder).traits.glu for folder in (base, host)]
    is_mlp = [name for name, step in steps.items() if step > 0 and any(word in name for word in ("mlp", "fc"))]
    assert bool(is_mlp) == (gated[0] == gated[1]) and bool(found.remarks) == (gated[0] != gated[1])
    facts = next(f for name in found.tensors if (f := found.facts(name)))
    assert {"tier", "anchors", "write_r2", "heads_of", "neuron_margin"} <= facts.keys()


def test_strangers_change_nothing(tmp_path: Path) -> None:
    """The stream of an unrelated model is not found, and the host comes out as it was, byte for byte, with the reason."""
    base, host = make("llama", tmp_path / "base"), make("gemma3", tmp_path / "host", seed=1, **LARGER["gemma3"])
    report = yeam.merge(recipe(host, tuned(base), base), tmp_path / "out")
    assert any("nothing was moved" in note for note in report.notes)
    assert "nothing was moved" in (tmp_path / "out/README.md").read_text()
    before, after = load_file(host / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(x, after[name]) for name, x in before.items())


def test_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    """What is held while every tensor of a host is read in turn: as much in 12 layers as in 4."""

    def held() -> dict[int, int]:
        gc.collect()  # what other tests left behind may go at any time
        tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor]
        return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}

    most = []
    for depth in (4, 12):
        base = make("llama", tmp_path / f"base-{depth}", num_hidden_layers=depth, dtype=torch.float32)
        shape = make(
            "llama", tmp_path / f"shape-{depth}", dtype=torch.float32, **{**LARGER["llama"], "num_hidden_layers": depth}
        )
        host, others = expanded(base, shape, tmp_path / f"host-{depth}"), held()
        found, sizes = moved(host, base, tuned(base)), []
        for name in found.tensors:
            found.read(name, 0, found.tensors[name].shape[-1])
            if "down_proj" in name:
                sizes.append(sum(size for place, size in held().items() if place not in others))
        most.append(max(sizes))
    assert len(sizes) == 12 and most[0] > 0
    assert most[1] < 1.1 * most[0], most


def test_streams_of_16_bit_models_are_found_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same maps and gates as in float64, and nothing by chance; tokens paired at random find nothing."""
    base, shape = make("llama", tmp_path / "base"), make("llama", tmp_path / "shape", seed=1, **LARGER["llama"])
    host = expanded(base, shape, tmp_path / "host")
    for folder in (base, host):
        state = {name: x.bfloat16() for name, x in load_file(folder / "model.safetensors").items()}
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    tokens, found = torch.arange(160), []
    for kind in (torch.float32, torch.float64):
        if kind == torch.float64:
            monkeypatch.setattr(torch, "float32", torch.float64)
        anchors = gather(body_of(host), body_of(base), tokens, tokens)
        monkeypatch.undo()
        found.append(maps_of(anchors, body_of(base), body_of(host)))
    assert difference(found[0].writers_DS, found[1].writers_DS) < 1e-6 and found[0].gate > 0.999
    assert found[0].gate == pytest.approx(found[1].gate, abs=1e-6) and found[0].write.chance < 0.05
    mixed = torch.randperm(160, generator=torch.Generator().manual_seed(1))
    assert maps_of(gather(body_of(host), body_of(base), tokens, mixed), body_of(base), body_of(host)).gate < 0.05


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt_neox"])
def test_silent_parts_of_a_host_do_not_mislead_in_float32(kind: str, tmp_path: Path) -> None:
    """A host that was only grown: most of its slots hold nothing, and a quotient of two nothings is no number."""
    base, shape = make(kind, tmp_path / "base"), make(kind, tmp_path / "shape", seed=1, **LARGER[kind])
    other = tuned(base)
    for folder in (base, other):
        state = load_file(folder / "model.safetensors")
        save_file({name: x.float() for name, x in state.items()}, folder / "model.safetensors", {"format": "pt"})
    host = expanded(base, shape, tmp_path / "host")
    wanted = exact_logits(expanded(other, shape, tmp_path / "wanted"))
    yeam.merge(recipe(host, other, base, budget=10.0), tmp_path / "out")
    assert difference(exact_logits(tmp_path / "out"), wanted) < 1e-3 < 0.05 < difference(exact_logits(host), wanted)


def recipe(host: Path, model: Path, base: Path | None, **options: Any) -> dict[str, Any]:
    source = {"model": str(model), **({} if base is None else {"base": str(base)})}
    return {"merge_method": "passthrough", "models": [{"model": str(host)}],
            "plugins": [{"scale_up": {"sources": [source], **options}}]}  # fmt: skip


def test_a_report_tells_what_moved(tmp_path: Path, yeam_process: Callable[..., Any]) -> None:
    """The relation, the layers, the gates and a verdict: in the report, the card, the page and a picture."""
    base, shape = make("llama", tmp_path / "base"), make("llama", tmp_path / "shape", seed=1, **LARGER["llama"])
    host = expanded(base, shape, tmp_path / "host")
    report = yeam.merge(recipe(host, tuned(base), base, budget=10.0), tmp_path / "out")
    verdict = next(note for note in report.notes if "moved" in note)
    assert "the host descends from the source" in verdict and "100% of the heads" in verdict
    assert "the host descends from the source" in (tmp_path / "out/README.md").read_text()
    done = yeam_process("report", tmp_path / "out", "--to", tmp_path / "page.html", "--to", tmp_path / "page.png")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.html").read_text()
    assert all(
        words in page for words in ("Moved updates", "same vocabulary", "Layer map", "Gates", "6 of 6", "56 of 56")
    )
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_an_injection_reaches_models_of_another_shape(tmp_path: Path, yeam_process: Callable[..., Any]) -> None:
    """A base of another shape is that of the sources: their updates move into the target, layers and strength as asked for."""
    base, shape = make("llama", tmp_path / "base"), make("llama", tmp_path / "shape", seed=1, **LARGER["llama"])
    other = tuned(base)
    host, wanted = expanded(base, shape, tmp_path / "host"), expanded(other, shape, tmp_path / "wanted")
    state, target = load_file(host / "model.safetensors"), load_file(wanted / "model.safetensors")
    done = yeam_process(
        "inject", "--target", host, "--sources", other, "--base", base, "--budget", "10", "--out", tmp_path / "out"
    )
    assert done.returncode == 0 and "descends from the source" in done.stderr, done.stderr
    assert difference(exact_logits(tmp_path / "out"), exact_logits(wanted)) < 1e-5
    shown = yeam_process("inject", "--target", host, "--sources", other, "--base", base, "--dry-run")
    assert shown.returncode == 0 and "moved as by `scale_up`" in shown.stderr
    source = {"model": other, "base": base}
    yeam.inject(host, [source], tmp_path / "half", budget=10.0, strength=0.5, layers="0-1")
    half = load_file(tmp_path / "half/model.safetensors")
    for name in (f"model.layers.{n}.mlp.down_proj.weight" for n in range(3)):
        share = 0.5 if ".2." not in name else 0.0
        assert torch.allclose(half[name], torch.lerp(state[name], target[name], share), atol=1e-7), name
    for sources, options, words in (
        ([source, other], {}, "no base is named"),
        ([source], {"policy": "priority"}, "policy: sources of another shape"),
        ([source], {"roles": "mlp,norm"}, "norm cannot be moved"),
        ([source], {"strengths": [{"layers": 0, "strength": 0.5}]}, "strengths: sources of another shape"),
        ([source], {"distill": REPOSITORY / "README.md"}, "no strength can be fitted"),
    ):
        with pytest.raises(UserError, match=words) as error:
            yeam.inject(host, sources, tmp_path / "none", **options)
        assert error.value.remedy and not (tmp_path / "none").exists()


def test_a_source_without_its_base_is_shown_another_way(tmp_path: Path) -> None:
    """`align` and `graft` are named where they are legal, and only there."""
    small, same = make("llama", tmp_path / "small"), make("llama", tmp_path / "same", seed=2)
    large, gpt2 = make("llama", tmp_path / "large", seed=1, **LARGER["llama"]), make("gpt2", tmp_path / "gpt2")
    for host, source, ways in ((small, same, {"align", "graft"}), (large, small, {"graft"}), (large, gpt2, set())):
        with pytest.raises(UserError, match="needs the base") as error:
            yeam.plan(recipe(host, source, None))
        assert {word for word in ("align", "graft") if f"`{word}`" in (error.value.remedy or "")} == ways


def test_rotary_speeds_of_gemma3_in_both_dialects(tmp_path: Path) -> None:
    """transformers 5 keeps settings for each kind of layer; before, the sliding window had a base of its own."""
    new = make("gemma3", tmp_path / "new", rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}})  # fmt: skip
    old = tmp_path / "old"
    shutil.copytree(new, old)
    config = json.loads((old / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    (old / "config.json").write_text(json.dumps(config))
    for layer in range(3):
        a, b = (speeds(body_of(folder), layer) for folder in (new, old))
        assert torch.allclose(a, b, rtol=1e-12)
    assert float(speeds(body_of(new), 1)[0]) == pytest.approx(1 / 8) and float(speeds(body_of(new), 0)[0]) == 1


def _with(folder: Path, out: Path, **changes: Any) -> Path:
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **changes}))
    return out


def test_what_cannot_be_moved_is_refused_at_plan_time(tmp_path: Path) -> None:
    """From headers and small files alone: no weight is read."""
    small, large = make("llama", tmp_path / "small"), make("llama", tmp_path / "large", seed=1, **LARGER["llama"])
    olmo = make("olmo2", tmp_path / "olmo", **LARGER["olmo2"])
    gpt2 = make("gpt2", tmp_path / "gpt2", **LARGER["gpt2"])
    tokenizer = REPOSITORY / "examples/tiny-family/models/base/tokenizer.json"
    spoken, foreign = shutil.copytree(small, tmp_path / "spoken"), shutil.copytree(large, tmp_path / "foreign")
    shutil.copy(tokenizer, spoken / "tokenizer.json")
    spec = json.loads(tokenizer.read_text())
    spec["model"] |= {"vocab": {f"<<{n}>>": n for n in range(160)}, "merges": []}
    spec["added_tokens"] = []
    (foreign / "tokenizer.json").write_text(json.dumps(spec))
    experts, latent = make("mixtral", tmp_path / "experts"), make("deepseek_v3", tmp_path / "latent", hidden_size=96)
    mamba = T.MambaConfig(vocab_size=160, hidden_size=64, state_size=4, num_hidden_layers=1)
    T.MambaForCausalLM(mamba).save_pretrained(tmp_path / "mamba")
    state = {name: x.float() for name, x in load_file(large / "model.safetensors").items()}
    name = "model.layers.0.mlp.up_proj.weight"
    packed = {**state, f"{name[:-6]}qweight": torch.zeros(2, 2, dtype=torch.int32)}
    del packed[name]
    config = json.loads((large / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "gptq", "bits": 4}
    }
    quantized = save_model(tmp_path / "quantized", packed, config)
    cases = [
        (recipe(large, small, None), "needs the base"),
        (recipe(small, large, large), "at least as wide"),
        (recipe(large, gpt2, small), "is not the base of"),
        (recipe(olmo, small, small), "reads its stream as it is"),
        (recipe(gpt2, small, small, parts="mlp"), "only one of the two models has gates"),
        (recipe(foreign, spoken, spoken), "share no token"),
        (recipe(large, experts, experts, parts="mlp"), "routed experts only"),
        (recipe(latent, small, small, parts="attention"), "multi-head latent attention"),
        (recipe(latent, gpt2, gpt2), "multi-head latent attention.*only one of the two"),
        (recipe(tmp_path / "mamba", small, small), "mamba"),
        (recipe(quantized, small, small), "quantised"),
        (recipe(large, small, small, strength=-1), "cannot be negative"),
        (recipe(large, small, small, parts="norms"), "is none of attention, mlp, embedding"),
    ]
    for bad, words in cases:
        with pytest.raises(UserError, match=words) as error:
            yeam.plan(bad)
        assert error.value.remedy, words
    for plugin in ({"align": {"to": str(experts)}}, {"expand": {"to": str(latent)}}, {"graft": {"donor": str(latent)}}):
        with pytest.raises(UserError, match=r"mixtral|deepseek") as error:
            yeam.plan({"merge_method": "passthrough", "models": [{"model": str(small)}], "plugins": [plugin]})
        assert "scale_up" in error.value.remedy
    with pytest.raises(UserError, match="does not fit into the shape"):
        plugin = {"expand": {"to": str(small)}}
        yeam.plan({"merge_method": "passthrough", "models": [{"model": str(large)}], "plugins": [plugin]})


GRAFTS = ["llama", "llama-biases", "gpt2", "gpt_neox", "phi3", "gemma3"]


@pytest.mark.parametrize("kind", GRAFTS)
def test_grafted_neurons_add_what_tuning_changed(kind: str, tmp_path: Path) -> None:
    """Host = the base in a larger shape: with all neurons in pairs it computes what the tuned MLPs do; at strength 0 nothing changes."""
    base, shape = make(kind, tmp_path / "base"), make(kind, tmp_path / "shape", seed=1, **LARGER[kind])
    other = shutil.copytree(base, tmp_path / "tuned")
    state, body = load_file(base / "model.safetensors"), body_of(base)
    generator = torch.Generator().manual_seed(4)
    for name in {slot.name for slots in body.slots for part, slot in slots.items() if part in ("gate", "up", "down")}:
        noise = torch.randn(state[name].shape, generator=generator, dtype=torch.float64)
        state[name] = state[name] + 0.1 * state[name].std() * noise
    save_file(state, other / "model.safetensors", {"format": "pt"})
    host = expanded(base, shape, tmp_path / "host")
    wanted, before = exact_logits(expanded(other, shape, tmp_path / "wanted")), exact_logits(host)
    for strength in (0.0, 1.0):
        options = {"donor": str(other), "base": str(base), "neurons": 112, "strength": strength}
        out = tmp_path / f"out-{strength}"
        yeam.merge(
            {"merge_method": "passthrough", "models": [{"model": str(host)}], "plugins": [{"graft": options}]}, out
        )
        after = exact_logits(out)
        assert difference(logits(out), after) < 1e-5  # transformers takes the larger width
        if strength == 0:
            assert difference(after, before) < 1e-12
        else:
            assert difference(after, wanted) < 1e-6 and difference(before, wanted) > 0.01


def test_grafts_without_a_base_and_what_cannot_be_grafted(tmp_path: Path) -> None:
    base, gpt2 = make("llama", tmp_path / "base"), make("gpt2", tmp_path / "gpt2")
    host = relative(base, "llama", tmp_path / "host")
    plain = {"merge_method": "passthrough", "models": [{"model": str(host)}]}
    report = yeam.merge({**plain, "plugins": [{"graft": {"donor": str(base), "neurons": 10}}]}, tmp_path / "out")
    assert any("grows by 38 neurons to 128" in note for note in report.notes)
    change = difference(exact_logits(tmp_path / "out"), exact_logits(host))
    assert 1e-4 < change < 0.5
    for options, words in (
        ({"donor": str(gpt2)}, "has gates"), ({"donor": str(base), "neurons": 0}, "cannot be added"),
        ({"donor": str(base), "strength": -1.0}, "negative"), ({"donor": str(base), "base": str(gpt2)}, "is not the base"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            yeam.plan({**plain, "plugins": [{"graft": options}]})
    with pytest.raises(UserError, match="at least as wide"):
        yeam.plan({**plain, "models": [{"model": str(base)}], "plugins": [{"graft": {"donor": str(host)}}]})
