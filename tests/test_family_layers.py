"""Layers picked, repeated and reordered: config.json stays true to them, and transformers loads the result."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from family_models import TABLED, TEXT, Saved, saved
from safetensors.torch import save_file

from yeam.errors import ConfigError
from yeam.families import config_updates, describe, rename_layer
from yeam.families.counts import contradictions


def relayer(
    model: Saved, layers: dict[str, list[int]]
) -> tuple[dict[str, Any], dict[str, torch.Tensor], tuple[str, ...]]:
    update = config_updates(model.config, model.anatomy, layers)
    tensors = {}
    for name, meaning in model.anatomy.tensors.items():
        if meaning.stack not in layers:
            tensors[name] = model.tensors[name]
            continue
        for new, old in enumerate(layers[meaning.stack]):
            if old == meaning.layer:
                renamed = rename_layer(name, model.anatomy.stacks[meaning.stack], new)
                tensors[renamed] = model.tensors[name].clone()
    return update.config, tensors, update.notes


@pytest.mark.parametrize("label", TABLED)
def test_a_relayered_model_loads_and_its_layers_keep_their_kind(label: str, tmp_path: Path) -> None:
    model = saved(label)
    layers = {p: [s.count - 1, 0, 0, *range(s.count)] for p, s in model.anatomy.stacks.items()}
    before = copy.deepcopy(model.config)
    config, tensors, notes = relayer(model, layers)
    assert model.config == before and notes == ()
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = TABLED[label][2].from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    old, new = model.model.config.get_text_config(), loaded.config.get_text_config()
    if getattr(old, "layer_types", None):
        picked = layers[next(p for p, s in model.anatomy.stacks.items() if s.module != "vision_tower")]
        assert new.layer_types == [old.layer_types[i] for i in picked]
    # the identity changes nothing
    same = config_updates(
        model.config, model.anatomy, {p: list(range(s.count)) for p, s in model.anatomy.stacks.items()}
    )
    assert same.config == model.config and same.notes == ()


@pytest.mark.parametrize("label", TABLED)
def test_layers_that_are_not_there_are_told(label: str) -> None:
    model = saved(label)
    assert list(contradictions(model.config, model.anatomy)) == []
    for prefix, stack in model.anatomy.stacks.items():
        last = f"{prefix}.{stack.count - 1}."
        left = {name: shape for name, shape in model.shapes.items() if not name.startswith(last)}
        (found,) = contradictions(model.config, describe(model.config, left))
        assert (found.stack.prefix, found.stated, found.missing) == (prefix, stack.count, (stack.count - 1,))
        doubled = {
            **model.shapes,
            **{name.replace(last, f"{prefix}.{stack.count}."): s for name, s in model.shapes.items()},
        }
        (found,) = contradictions(model.config, describe(model.config, doubled))
        assert (found.stack.count, found.stated, found.missing) == (stack.count + 1, stack.count, ())


def test_layers_of_unknown_kinds_are_counted_where_that_can_be_told() -> None:
    def told(config: dict[str, Any], *stacks: tuple[str, int]) -> list[tuple[str, int]]:
        shapes = {f"{prefix}.{i}.a.{x}.weight": (4, 4) for prefix, count in stacks for i in range(count) for x in "qkv"}
        config = {"model_type": "own", **config}
        return [(each.stack.prefix, each.stated) for each in contradictions(config, describe(config, shapes))]

    sides = ("model.encoder.layers", 2), ("model.decoder.layers", 3)
    assert told({"encoder_layers": 2, "decoder_layers": 4, "num_hidden_layers": 2}, *sides) == [
        ("model.decoder.layers", 4)
    ]
    assert told({"encoder_layers": 2, "decoder_layers": 3}, *sides) == []
    assert told({"num_hidden_layers": 5}, ("model.layers", 3)) == [("model.layers", 5)]
    assert told({"num_hidden_layers": 5}, ("a.layers", 3), ("b.layers", 4)) == []  # of which?
    assert told({"num_hidden_layers": 64}, ("encoder.blocks", 55)) == []  # as EfficientNet counts
    seeing = {"vision_config": {"encoder_layers": 3}, "text_config": {"encoder_layers": 4, "num_hidden_layers": 2}}
    assert told(seeing, ("model.layers", 2), ("model.encoder.layers", 3)) == []


def test_kinds_that_follow_from_the_index_are_kept() -> None:
    def kinds(config_class: Any, config: dict[str, Any], picked: list[int], **keep: Any) -> tuple[list[str], list[str]]:
        full = {**TEXT, **config, "model_type": config_class.model_type, **keep}
        anatomy = describe(full, {f"model.layers.{i}.self_attn.q_proj.weight": (32, 32) for i in range(12)})
        update = config_updates(full, anatomy, {"model.layers": picked})
        old = config_class(**full).layer_types
        return [old[i] for i in picked], config_class(**update.config).layer_types

    picked = [0, 1, 2, 2, 1, 5, 11, 3]
    for config_class, config in (
        (T.Gemma2Config, {}),
        (T.Gemma3TextConfig, {"sliding_window_pattern": 3}),
        (T.Gemma3TextConfig, {}),
        (T.Qwen2Config, {"use_sliding_window": True, "max_window_layers": 2}),
        (T.Qwen3Config, {"use_sliding_window": False}),
        (T.Qwen2MoeConfig, {"use_sliding_window": True, "max_window_layers": 5}),
        (T.Cohere2Config, {}),
        (T.Cohere2Config, {"sliding_window_pattern": 2}),
    ):
        wanted, got = kinds(config_class, config, picked, num_hidden_layers=12)
        assert got == wanted, (config_class, config)
        assert len(set(wanted)) == 2 or config_class is T.Qwen3Config


def test_one_side_of_t5_does_not_change_the_other() -> None:
    model = saved("t5")
    config = {k: v for k, v in model.config.items() if k != "num_decoder_layers"}  # as t5-small is published
    shapes = {n: s for n, s in model.shapes.items() if not n.startswith("decoder.block.2.")}
    update = config_updates(config, describe(config, shapes), {"encoder.block": [0, 1, 1]})
    made = T.T5Config(**update.config)
    assert (made.num_layers, made.num_decoder_layers) == (3, 2)


def test_sparse_layers_stay_sparse() -> None:
    def is_dense(config: dict[str, Any], i: int) -> bool:  # as Qwen's MoE layers decide it
        return i in config["mlp_only_layers"] or (i + 1) % config["decoder_sparse_step"] != 0

    model = saved("qwen3_moe")
    config = {**model.config, "num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    anatomy = describe(config, {f"model.layers.{i}.mlp.gate.weight": (3, 32) for i in range(6)})
    picked = [5, 3, 1, 1, 0]
    new = config_updates(config, anatomy, {"model.layers": picked}).config
    assert [is_dense(new, i) for i in range(5)] == [is_dense(config, i) for i in picked]

    deep = {"model_type": "deepseek_v3", "num_hidden_layers": 6, "first_k_dense_replace": 2}
    anatomy = describe(deep, {f"model.layers.{i}.mlp.gate.weight": (3, 32) for i in range(6)})
    kept = config_updates(deep, anatomy, {"model.layers": [1, 4, 5]})
    assert kept.config["first_k_dense_replace"] == 1 and not kept.notes
    assert any("first_k_dense" in note for note in config_updates(deep, anatomy, {"model.layers": [4, 1]}).notes)


def test_layers_from_models_with_other_configs() -> None:
    model = saved("gemma3")
    other = {**model.config, "num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}
    origins = {"model.layers": [model.config, other, other]}
    update = config_updates(model.config, model.anatomy, {"model.layers": [0, 3, 2]}, origins)
    assert update.config["layer_types"] == ["sliding_attention", "full_attention", "full_attention"]
    with pytest.raises(ConfigError, match="no layer 3 in a model of 3"):
        config_updates(model.config, model.anatomy, {"model.layers": [0, 3]})
    with pytest.raises(ConfigError, match=r"model\.layers"):
        config_updates(model.config, model.anatomy, {"layers": [0]})


def test_what_cannot_be_kept_true_is_said() -> None:
    config = {"model_type": "jamba", "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1}
    anatomy = describe(config, {f"model.layers.{i}.mamba.D": (4,) for i in range(4)})
    assert any("attn_layer_period" in note for note in config_updates(config, anatomy, {"model.layers": [1, 0]}).notes)
    uneven = {
        f"model.layers.{i}.{x}.weight": (4,)
        for i in range(3)
        for x in ("attn_norm", "mlp_norm")
        if (i, x[0]) != (0, "a")
    }
    anatomy = describe({"model_type": "modernbert", "num_hidden_layers": 3}, uneven)
    config = {"model_type": "modernbert", "num_hidden_layers": 3}
    assert any(
        "layer 1 is made of layer 0 " in n for n in config_updates(config, anatomy, {"model.layers": [0, 0]}).notes
    )
    assert not config_updates(config, anatomy, {"model.layers": [0, 2, 1, 2]}).notes
    bare = describe({}, {f"model.layers.{i}.self_attn.q_proj.weight": (4, 4) for i in range(2)})
    assert any("by hand" in note for note in config_updates({}, bare, {"model.layers": [1]}).notes)
