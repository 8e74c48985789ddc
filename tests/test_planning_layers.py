"""Plans of slices and modules: which layers and parts go where, and what config.json says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import Llama, llama_config, llama_tensors, save_model
from plans import jobs, refuses, yaml
from safetensors.torch import load_file, save_file

import yeam
from yeam.errors import CheckpointError


def sources(*pieces: tuple[Path, int, int]) -> dict[str, Any]:
    return {"sources": [{"model": str(model), "layer_range": [first, end]} for model, first, end in pieces]}


def test_frankenmerge_inputs(llama: Llama) -> None:
    """Layers are renumbered; what precedes them is the first slice's, what follows the last's."""
    a, b = llama("a", layers=3), llama("b", layers=4)
    plan = yeam.plan(
        {"merge_method": "passthrough", "slices": [sources((a, 0, 2)), sources((b, 1, 4)), sources((a, 2, 3))]}
    )
    made = jobs(plan)
    assert plan.config is not None and plan.config["num_hidden_layers"] == 6
    assert {job.layer for job in plan.jobs} == {None, *range(6)}
    origin = [made[f"model.layers.{i}.mlp.up_proj.weight"].sources[0] for i in range(6)]
    assert [(source.model, source.tensor.split(".")[2]) for source in origin] == [
        (0, "0"), (0, "1"), (1, "1"), (1, "2"), (1, "3"), (0, "2")
    ]  # fmt: skip
    assert made["model.embed_tokens.weight"].sources[0].model == made["lm_head.weight"].sources[0].model == 0
    assert {job.method for job in plan.jobs} == {"copy"}
    swapped = jobs(yeam.plan({"merge_method": "passthrough", "slices": [sources((a, 0, 2)), sources((b, 3, 4))]}))
    assert swapped["model.embed_tokens.weight"].sources[0].model == 0
    assert swapped["lm_head.weight"].sources[0].model == swapped["model.norm.weight"].sources[0].model == 1


def test_layer_kinds_stay_true(tmp_path: Path) -> None:
    """`layer_types` and Gemma 3's pattern follow the layers that were picked."""
    for model_type, rule in (("qwen2", {}), ("gemma3_text", {"sliding_window_pattern": 2})):
        folder = tmp_path / model_type
        kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2} if model_type == "qwen2" else {}
        config = {**llama_config(layers=4), "model_type": model_type, **kinds, **rule}
        save_model(folder, llama_tensors(layers=4), config)
        plan = yeam.plan({"merge_method": "passthrough", "slices": [sources((folder, 0, 1)), sources((folder, 2, 4))]})
        assert plan.config is not None
        assert plan.config["layer_types"] == ["sliding_attention", "sliding_attention", "full_attention"]


def test_extra_layers_are_left_out_of_a_frankenmerge(llama: Llama) -> None:
    """A prediction layer behind the stack has the number of a new layer: it goes, and config.json says so."""
    extra = {f"model.layers.2.{part}.weight": torch.zeros(16) for part in ("enorm", "shared_head.norm")}
    folder = llama("mtp", change=extra, config={"num_nextn_predict_layers": 1})
    plan = yeam.plan({"merge_method": "passthrough", "slices": [sources((folder, 0, 2)), sources((folder, 1, 2))]})
    assert plan.config is not None
    assert (plan.config["num_hidden_layers"], plan.config["num_nextn_predict_layers"]) == (3, 0)
    assert not [job for job in plan.jobs if "enorm" in job.name]
    assert any("model.layers.2.enorm.weight and 1 more: left out" in note for note in plan.notes)
    whole = yeam.plan({"merge_method": "passthrough", "models": [{"model": str(folder)}]})
    assert "model.layers.2.enorm.weight" in jobs(whole)


def test_what_slices_refuse(tmp_path: Path, llama: Llama) -> None:
    a, b = llama("a", layers=2), llama("b", layers=3)
    linear = {"merge_method": "linear", "parameters": {"weight": 1}}
    unequal = {**linear, "models": [{"model": str(a)}, {"model": str(b)}]}
    refuses(unequal, "2 layers", "3", "slices:", error=CheckpointError)
    refuses({**linear, "slices": [sources((a, 1, 3))]}, "beyond", "which has 2", "[0, 2]")
    refuses({**linear, "slices": [sources((a, 0, 2), (b, 0, 1))]}, "layer_range", "has 1 layers", "slice has 2")
    hidden = {**linear, "merge_method": "yeam", "base_model": str(a), "slices": [sources((b, 1, 3))], "parameters": {}}
    refuses(hidden, "beyond", str(a))
    text = "merge_method: linear\nslices:\n- sources:\n  - model: $a\n    layer_range: [1, 3]\nparameters: {weight: 1}"
    refuses(yaml(tmp_path, text, a=a), "recipe.yaml:5")


def multimodal(folder: Path, seed: int, prefix: str = "") -> Path:
    """Names like LLaVA's: a vision tower of 2 layers, a projector, a text model of 2 layers."""
    text = {
        ("lm_head.weight" if name == "lm_head.weight" else f"language_model.{name}"): tensor
        for name, tensor in llama_tensors(seed).items()
    }
    tower = {
        f"vision_tower.vision_model.encoder.layers.{i}.self_attn.{p}_proj.weight": torch.randn(8, 8)
        for i in range(2)
        for p in "qkv"
    }
    projector = {"multi_modal_projector.linear_1.weight": torch.randn(16, 8)}
    config = {
        "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "text_config": llama_config(),
        "vision_config": {"model_type": "clip_vision_model", "num_hidden_layers": 2, "hidden_size": 8},
    }  # fmt: skip
    return save_model(folder, {f"{prefix}{n}": t for n, t in {**text, **tower, **projector}.items()}, config)


def test_modules(tmp_path: Path) -> None:
    """Each module has its models and parameters; `models:` covers all of them; every module has to be named."""
    a, b = multimodal(tmp_path / "a", 1), multimodal(tmp_path / "b", 2)
    both = [{"model": str(a)}, {"model": str(b)}]
    modules = {
        "text_decoder": {"models": both, "parameters": {"weight": [1, 3]}},
        "vision_tower": {"models": both[:1]},
        "multi_modal_projector": {"models": both[::-1]},
    }
    recipe = {"merge_method": "linear", "modules": modules, "parameters": {"weight": 2}}
    made = jobs(yeam.plan(recipe))
    whole = jobs(yeam.plan({"merge_method": "linear", "models": both, "parameters": {"weight": 2}}))
    assert made.keys() == whole.keys() == {*load_file(a / "model.safetensors")}
    text = "language_model.model.layers.{}.mlp.up_proj.weight".format
    assert [made[text(i)].parameters["weight"] for i in range(2)] == [(1, 1), (3, 3)]
    tower = "vision_tower.vision_model.encoder.layers.1.self_attn.q_proj.weight"
    assert [source.model for source in made[tower].sources] == [0]
    assert [source.model for source in made["multi_modal_projector.linear_1.weight"].sources] == [1, 0]
    assert all([source.model for source in job.sources] == [0, 1] for job in whole.values())

    short = {name: block for name, block in modules.items() if name != "vision_tower"}
    refuses({**recipe, "modules": short}, "vision_tower", "name every module")
    refuses({**recipe, "modules": {**short, "vision_towre": {"models": both}}}, "did you mean 'vision_tower'")
    stacked = {
        "merge_method": "passthrough",
        "slices": [
            sources(
                (a, 0, 1),
            )
        ],
    }
    refuses(stacked, "one stack of layers", "language_model.model.layers", "modules:")
    sliced = {
        "text_decoder": sliced_block(a),
        "vision_tower": {"models": both[:1]},
        "multi_modal_projector": {"models": both[:1]},
    }
    deeper = yeam.plan({"merge_method": "passthrough", "modules": sliced})
    assert deeper.config is not None and deeper.config["text_config"]["num_hidden_layers"] == 3
    assert deeper.config["vision_config"]["num_hidden_layers"] == 2
    assert text(2) in jobs(deeper) and tower in jobs(deeper)


def sliced_block(model: Path) -> dict[str, Any]:
    return {"slices": [sources((model, 0, 2)), sources((model, 1, 2))]}


def test_two_orders_of_prefixes(tmp_path: Path) -> None:
    """`model.language_model.` merges with `language_model.model.`, under the first model's names."""
    a, b = multimodal(tmp_path / "a", 1), multimodal(tmp_path / "b", 2)
    renamed = {
        name.replace("language_model.model.", "model.language_model.")
        .replace("vision_tower.", "model.vision_tower.")
        .replace("multi_modal", "model.multi_modal"): tensor
        for name, tensor in load_file(b / "model.safetensors").items()
    }
    save_file(renamed, b / "model.safetensors", {"format": "pt"})
    both = [{"model": str(a)}, {"model": str(b)}]
    plan = yeam.plan({"merge_method": "linear", "models": both, "parameters": {"weight": 1}})
    assert {job.name for job in plan.jobs} == {*load_file(a / "model.safetensors")}
    assert {job.sources[1].tensor for job in plan.jobs} == {*renamed}
