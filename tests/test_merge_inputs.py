"""Merges of unequal and unusual files: tied heads, pickles, other prefixes, any tensors, adapters, float8."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import reference
import torch
import transformers as tf
from conftest import Llama, llama_tensors, save_model
from merge_models import CONFIGS, SIZES, Tensors, build, entries, load, logits, mean, merged, save, tensors
from peft import LoraConfig, PeftModel, get_peft_model

import yeam


def test_heads_tied_and_not(tmp_path: Path) -> None:
    """A tied model gives its embedding to an untied head; the result is untied and computes the average's logits."""
    tied, free = tf.LlamaConfig(**SIZES, tie_word_embeddings=True), tf.LlamaConfig(**SIZES, tie_word_embeddings=False)
    a, b = build(tied, 1), build(free, 2)
    paths = [save(a, tmp_path / "a"), save(b, tmp_path / "b")]
    for order in (paths, paths[::-1]):
        out = tmp_path / Path(order[0]).name / "merged"
        merged(out, "linear", entries(*order, weight=1))
        model = load(out)
        assert model.config.tie_word_embeddings is False
        expected = tf.AutoModelForCausalLM.from_config(free).eval()
        mine, other = a.state_dict(), b.state_dict()
        expected.load_state_dict({n: (mine[n] + other[n]) / 2 for n in other})
        torch.testing.assert_close(logits(model), logits(expected))


def test_pickled_models_with_shared_storage(tmp_path: Path) -> None:
    """What a `.bin` holds under two names is written once; untied by the config it is written twice. Both load."""
    for is_tied in (True, False):
        model = build(tf.LlamaConfig(**SIZES, tie_word_embeddings=is_tied), 1)
        folder = tmp_path / f"tied-{is_tied}"
        model.config.save_pretrained(folder)
        state = dict(model.state_dict())
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
        torch.save(state, folder / "pytorch_model.bin")
        ours = merged(tmp_path / f"out-{is_tied}", "linear", entries(folder, folder, weight=1))
        assert ("lm_head.weight" in ours) is not is_tied
        loaded = load(tmp_path / f"out-{is_tied}")
        torch.testing.assert_close(loaded.lm_head.weight, model.model.embed_tokens.weight)


def test_prefix_of_a_base_model(tmp_path: Path) -> None:
    """A GPT-2 saved without its head's prefix merges with one saved with it, in either order."""
    a, b = build(CONFIGS["gpt2"](), 1), build(CONFIGS["gpt2"](), 2)
    with_head, bare = save(a, tmp_path / "a"), save(b.transformer, tmp_path / "b")
    assert any(n.startswith("transformer.h.") for n in tensors(with_head)) and any(
        n.startswith("h.") for n in tensors(bare)
    )
    merged(tmp_path / "ab", "linear", entries(with_head, bare, weight=1))
    torch.testing.assert_close(logits(load(tmp_path / "ab")), logits(mean(a, b)))
    merged(tmp_path / "ba", "linear", entries(bare, with_head, weight=1))
    model = load(tmp_path / "ba", tf.AutoModel)
    for name, tensor in mean(a, b).transformer.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor)


def test_any_tensors_of_any_architecture(tmp_path: Path) -> None:
    """Scalars, hash tables, gates, integers, empty tensors: every one comes out, merged or copied."""

    def odd(seed: int) -> Tensors:
        torch.manual_seed(seed)
        return {
            "skip.weights": torch.randn(7), "lambda": torch.randn(()), "ngram.table": torch.randn(1001, 3),
            "blocks.0.gate": torch.randn(1, 4, 2, 3), "blocks.1.gate": torch.randn(1, 4, 2, 3),
            "empty": torch.zeros(0, 3),
            "hash.seeds": torch.arange(5), "flag": torch.tensor(True), "half": torch.randn(9, 9).half(),
            "double": torch.randn(3, dtype=torch.float64), "phase": torch.randn(4, dtype=torch.complex64),
        }  # fmt: skip

    for config in (None, {"model_type": "nobody-knows", "architectures": ["NobodyKnows"]}):
        a, b = (
            save_model(tmp_path / f"{name}-{config is None}", odd(seed), config) for name, seed in (("a", 1), ("b", 2))
        )
        out = tmp_path / f"out-{config is None}"
        for method, keys in (("linear", {"parameters": {"weight": 1}}), ("yeam", {})):
            ours, x, y = merged(out / method, method, entries(a, b), **keys), odd(1), odd(2)
            assert ours.keys() == x.keys()
            for name, tensor in ours.items():
                assert (tensor.dtype, tensor.shape) == (x[name].dtype, x[name].shape)
                if not tensor.is_floating_point():
                    assert torch.equal(tensor, x[name])
                elif method == "linear":
                    torch.testing.assert_close(tensor, (x[name] + y[name]) / 2, rtol=1e-3, atol=1e-3)
                else:
                    zero = torch.zeros_like(x[name]).double()
                    wanted = reference.merge(zero, torch.stack([x[name], y[name]]).double()) if tensor.numel() else zero
                    torch.testing.assert_close(tensor.double(), wanted, rtol=2e-3, atol=2e-3, msg=name)
            assert (out / method / "config.json").exists() is (config is not None)


def test_lora_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`base+adapter` as a source equals merging what peft's merge_and_unload makes of it, in the base's dtype."""
    models = [build(CONFIGS["llama"](), seed, torch.bfloat16) for seed in (1, 2)]
    base, other = (save(model, tmp_path / name) for model, name in zip(models, ("base", "other")))
    torch.manual_seed(3)
    tuned = get_peft_model(
        copy.deepcopy(models[0]), LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    )
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    tuned.save_pretrained(tmp_path / "adapter")
    plain = PeftModel.from_pretrained(copy.deepcopy(models[0]).float(), tmp_path / "adapter").merge_and_unload()
    ours = merged(
        tmp_path / "out", "linear", [*entries(f"{base}+{tmp_path / 'adapter'}", weight=3), *entries(other, weight=1)]
    )
    mine, theirs = plain.state_dict(), models[1].state_dict()
    assert ours.keys() == mine.keys()
    for name, tensor in ours.items():
        wanted = (3 * mine[name] + theirs[name].float()) / 4
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.float(), wanted, rtol=2**-8, atol=1e-6)
    applied = merged(tmp_path / "applied", "passthrough", entries(f"{base}+{tmp_path / 'adapter'}"))
    x = tensors(base)
    changed = {name for name in x if not torch.equal(applied[name], x[name])}
    assert changed == {name for name in x if "q_proj" in name or "down_proj" in name}
    monkeypatch.chdir(tmp_path)
    report = yeam.merge({"merge_method": "passthrough", "models": [{"model": "base+adapter"}]}, "named")
    assert any("tensors are changed by its adapter" in note for note in report.notes)
    for name in ("yeam_report.json", "README.md"):  # they are published
        assert str(tmp_path) not in (tmp_path / "named" / name).read_text()
    assert load(tmp_path / "out").dtype == torch.bfloat16


def test_float8_with_scales(tmp_path: Path, llama: Llama) -> None:
    """Weights in float8 with block scales merge as the numbers they stand for; the output is plain bfloat16."""
    weights = llama_tensors(1, dtype=torch.bfloat16)
    blocks = torch.tensor([[0.5, 2.0], [1.0, 0.25]])
    change: Tensors = {}
    for name, tensor in weights.items():
        if tensor.shape == (16, 16):
            change |= {name: tensor.to(torch.float8_e4m3fn), f"{name}_scale_inv": blocks.clone()}
    scales = {"quant_method": "fp8", "weight_block_size": [8, 8], "fmt": "e4m3", "activation_scheme": "dynamic"}
    a = llama("a", 1, dtype=torch.bfloat16, change=change, config={"quantization_config": scales})
    b = llama("b", 2, dtype=torch.bfloat16)
    ours, y = merged(tmp_path / "out", "linear", entries(a, b, weight=1)), tensors(b)
    assert ours.keys() == weights.keys() and {t.dtype for t in ours.values()} == {torch.bfloat16}
    for name, tensor in weights.items():
        plain = (
            change[name].float() * blocks.repeat_interleave(8, 0).repeat_interleave(8, 1)
            if name in change
            else tensor.float()
        )
        torch.testing.assert_close(ours[name].float(), (plain + y[name].float()) / 2, rtol=2**-7, atol=1e-6)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    load(tmp_path / "out")


def test_written_as_float8(tmp_path: Path, llama: Llama) -> None:
    """transformers loads no model *as* float8: config.json names bfloat16, which holds every number of it."""
    out = tmp_path / "out"
    ours = merged(out, "linear", entries(llama("a"), llama("b"), weight=1), out_dtype="float8_e4m3fn")
    assert {tensor.dtype for tensor in ours.values()} == {torch.float8_e4m3fn}
    model = load(out)
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.model.norm.weight, ours["model.norm.weight"].bfloat16())


def test_a_model_that_lacks_layers_is_noted(llama: Llama) -> None:
    """Merging what is there is legal; who loads the result must know."""
    cut = llama("cut", config={"num_hidden_layers": 3})
    plan = yeam.plan({"merge_method": "linear", "models": [{"model": str(cut), "parameters": {"weight": 1}}]})
    (note,) = plan.notes
    assert "cut: config.json: num_hidden_layers is 3, but model.layers has no layer 2 (no model.layers.2." in note
