"""Merges by slices and modules: layers and parts of several models in one that loads and computes with them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import transformers as tf
from merge_models import CONFIGS, SIZES, Tensors, build, entries, load, logits, mean, merged, save, tensors

import yeam


def state_of(model: tf.PreTrainedModel, layers: list[tuple[tf.PreTrainedModel, int]]) -> Tensors:
    """The state dict of `model` with these layers of these models as its own."""
    state = {n: t for n, t in model.state_dict().items() if ".layers." not in n}
    for at, (source, index) in enumerate(layers):
        prefix = f"model.layers.{index}."
        state |= {
            n.replace(prefix, f"model.layers.{at}."): t for n, t in source.state_dict().items() if n.startswith(prefix)
        }
    return state


def stacked(models: list[tuple[str, int, int]]) -> list[dict[str, Any]]:
    return [{"sources": [{"model": model, "layer_range": [first, end]}]} for model, first, end in models]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_frankenmerge(family: str, tmp_path: Path) -> None:
    """Two models' layers, renumbered: config.json has the new count and kinds, and the result computes with them."""
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4, "head_dim": 4}
    config = {
        "llama": lambda: CONFIGS["llama"](),
        "qwen3": lambda: tf.Qwen3Config(**SIZES, **kinds, use_sliding_window=True),
        "gemma3": lambda: tf.Gemma3TextConfig(**SIZES, **kinds, query_pre_attn_scalar=4),
    }[family]()
    a, b = build(config, 1), build(config, 2)
    paths = save(a, tmp_path / "a"), save(b, tmp_path / "b")
    slices = stacked([(paths[0], 0, 2), (paths[1], 1, 2), (paths[1], 0, 1)])
    yeam.merge({"merge_method": "passthrough", "slices": slices}, tmp_path / "out")
    model = load(tmp_path / "out")
    if family != "llama":
        assert model.config.layer_types == [*kinds["layer_types"], "full_attention", "sliding_attention"]
    wanted = copy.deepcopy(model.config)
    assert wanted.num_hidden_layers == 4
    expected = tf.AutoModelForCausalLM.from_config(wanted).eval()
    ours = state_of(a, [(a, 0), (a, 1), (b, 1), (b, 0)])
    ours |= {n: t for n, t in b.state_dict().items() if n in ("model.norm.weight", "lm_head.weight")}
    if config.tie_word_embeddings:
        ours["lm_head.weight"] = ours["model.embed_tokens.weight"]
    expected.load_state_dict(ours)
    torch.testing.assert_close(logits(model), logits(expected))
    assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False).shape == (1, 6)


def test_one_model_twice_in_a_slice(tmp_path: Path) -> None:
    """Layers 0 and 1 of one model averaged into a single layer, under linear and against a base under yeam."""
    a, b = build(CONFIGS["llama"](), 1), build(CONFIGS["llama"](), 2)
    path, base = save(a, tmp_path / "a"), save(b, tmp_path / "b")
    both = [{"model": path, "layer_range": [0, 1]}, {"model": path, "layer_range": [1, 2]}]
    ours = merged(tmp_path / "linear", "linear", [], slices=[{"sources": both}], parameters={"weight": 1})
    x, y = tensors(path), tensors(base)
    for name in ours:
        wanted = (x[name] + x[name.replace("layers.0", "layers.1")]) / 2
        torch.testing.assert_close(ours[name], wanted)
    assert load(tmp_path / "linear").config.num_hidden_layers == 1
    ours = merged(tmp_path / "yeam", "yeam", [], slices=[{"sources": both}], base_model=base)
    for name in ours:  # the base gives the layers of the first source
        updates = torch.stack([x[name] - y[name], x[name.replace("layers.0", "layers.1")] - y[name]])
        wanted = reference.merge(y[name], updates, depth=2, embedding="embed_tokens" in name)
        assert (ours[name] - wanted).norm() / updates[0].norm() < 1e-4


def test_language_and_vision(tmp_path: Path) -> None:
    """A LLaVA-like model: whole, and by modules with a tower from one model and a deeper text decoder."""
    text = {**SIZES, "model_type": "llama", "tie_word_embeddings": False}
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 8, "patch_size": 4, "projection_dim": 16,
    }  # fmt: skip
    config = tf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=39, vision_feature_layer=-1)
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(tf.LlavaForConditionalGeneration(config).eval())
    a, b = (save(model, tmp_path / name) for model, name in zip(models, "ab"))
    merged(tmp_path / "whole", "linear", entries(a, b, weight=1))
    whole = load(tmp_path / "whole", tf.AutoModelForImageTextToText)
    torch.testing.assert_close(logits(whole), logits(mean(*models)))
    modules = {
        "text_decoder": {"slices": stacked([(a, 0, 2), (b, 0, 1)])},
        "vision_tower": {"models": entries(b)},
        "multi_modal_projector": {"models": entries(a)},
    }
    yeam.merge({"merge_method": "passthrough", "modules": modules}, tmp_path / "parts")
    parts = load(tmp_path / "parts", tf.AutoModelForImageTextToText)
    assert parts.config.text_config.num_hidden_layers == 3
    ours, x, y = parts.state_dict(), models[0].state_dict(), models[1].state_dict()
    for name, tensor in ours.items():
        source = y if "vision_tower" in name or "lm_head" in name or name.endswith("language_model.norm.weight") else x
        if "language_model.layers.2." in name:
            name, source = name.replace("layers.2.", "layers.0."), y
        assert torch.equal(tensor, source[name]), name


def test_encoder_and_decoder_by_modules(tmp_path: Path) -> None:
    models = [build(CONFIGS["t5"](), seed) for seed in (1, 2)]
    a, b = (save(model, tmp_path / name) for model, name in zip(models, "ab"))
    modules = {
        "encoder": {"models": entries(a, b), "parameters": {"weight": [1, 3]}},
        "decoder": {"models": entries(b), "parameters": {"weight": 1}},
        "shared": {"models": entries(a), "parameters": {"weight": 1}},
    }
    yeam.merge({"merge_method": "linear", "modules": modules}, tmp_path / "out")
    model = load(tmp_path / "out", tf.AutoModelForSeq2SeqLM)
    x, y = models[0].state_dict(), models[1].state_dict()
    for name, tensor in model.state_dict().items():
        mine, other = x[name], y[name]
        wanted = (
            other
            if name.startswith("decoder.block")
            else (mine + other) / 2
            if name.startswith("encoder.block")
            else mine
        )
        if "embed_tokens" not in name and "block" in name:
            torch.testing.assert_close(tensor, wanted, msg=name)
    assert torch.equal(model.shared.weight, models[0].shared.weight)

    decoder = {"slices": stacked([(b, 1, 2), (a, 0, 2)])}
    parts = {"encoder": {"models": entries(a)}, "decoder": decoder, "shared": {"models": entries(a)}}
    yeam.merge({"merge_method": "passthrough", "modules": parts}, tmp_path / "deep")
    deep = load(tmp_path / "deep", tf.AutoModelForSeq2SeqLM)
    assert (deep.config.num_layers, deep.config.num_decoder_layers) == (2, 3)
    ours = deep.state_dict()
    bias = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert torch.equal(ours[bias], y[bias])  # of the whole stack: it stays in layer 0, from the first slice's model
    for at, source, layer in ((0, y, 1), (1, x, 0), (2, x, 1)):
        name = "decoder.block.{}.layer.1.EncDecAttention.q.weight".format
        assert torch.equal(ours[name(at)], source[name(layer)])
