"""Plans: which parameters, inputs, names and bytes a recipe comes to, from headers alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import environment, llama_config, llama_tensors, save_model
from huggingface_hub import save_torch_state_dict, split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import yeam
from yeam.api import plan_costs
from yeam.errors import CheckpointError, ConfigError, UserError
from yeam.planning.jobs import Job, Plan

Llama = Callable[..., Path]


def yaml(tmp_path: Path, text: str, **models: Path) -> Path:
    """A recipe file; `$name` stands for a model's path."""
    for name, folder in models.items():
        text = text.replace(f"${name}", str(folder))
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def jobs(plan: Plan) -> dict[str, Job]:
    return {job.name: job for job in plan.jobs}


def values(plan: Plan, parameter: str) -> dict[str, Any]:
    return {job.name: job.parameters[parameter] for job in plan.jobs}


def refuses(config: Any, *words: str, error: type[UserError] = ConfigError, **options: Any) -> str:
    with pytest.raises(error) as caught:
        yeam.plan(config, **options)
    text = str(caught.value)
    assert all(word in text for word in words), text
    return text


# parameters


def test_precedence_filters_and_gradients(tmp_path: Path, llama: Llama) -> None:
    """The model's own value before the top level's; filters by name and role; gradients over layers."""
    a, b = llama("a", layers=3), llama("b", layers=3)
    plan = yeam.plan(
        yaml(
            tmp_path,
            """
merge_method: linear
models:
  - model: $a
    parameters:
      weight:
        - filter: self_attn.q_proj
          value: [0, 1]
        - filter: role:embedding
          value: 9
  - model: $b
    parameters: {weight: [2, 4]}
parameters:
  normalize: [{filter: norm, value: false}]
  weight: [{filter: role:mlp, value: [10, 20, 40]}, {filter: "*", value: 7}]
""",
            a=a,
            b=b,
        )
    )
    weight, normalize = values(plan, "weight"), values(plan, "normalize")
    layer = "model.layers.{}.{}.weight".format
    assert weight["model.embed_tokens.weight"] == (9, 2)
    assert weight["lm_head.weight"] == weight["model.norm.weight"] == (7, 2)
    assert [weight[layer(i, "self_attn.q_proj")] for i in range(3)] == [(0, 2), (0.5, 3), (1, 4)]
    assert [weight[layer(i, "mlp.up_proj")] for i in range(3)] == [(10, 2), (20, 3), (40, 4)]
    assert weight[layer(1, "self_attn.k_proj")] == (7, 3)
    assert not normalize["model.norm.weight"] and not normalize[layer(0, "input_layernorm")]
    assert normalize["lm_head.weight"]


def test_precedence_of_slices_and_modules(tmp_path: Path, llama: Llama) -> None:
    """source > slice > module > top; filters of a source see its layer numbers; every slice has its own gradients."""
    a, b = llama("a", layers=3), llama("b", layers=3)
    plan = yeam.plan(
        yaml(
            tmp_path,
            """
merge_method: linear
modules:
  default:
    parameters: {weight: 3}
    slices:
      - sources:
          - {model: $a, layer_range: [0, 2], parameters: {weight: [{filter: layers.1., value: 5}]}}
          - {model: $b, layer_range: [1, 3], parameters: {weight: [{filter: layers.1., value: 6}]}}
        parameters: {weight: [{filter: mlp.down, value: [0, 1]}]}
      - sources:
          - {model: $a, layer_range: [2, 3]}
          - {model: $b, layer_range: [2, 3]}
        parameters: {weight: [1, 2]}
parameters: {weight: 99}
""",
            a=a,
            b=b,
        )
    )
    weight = values(plan, "weight")
    layer = "model.layers.{}.{}.weight".format
    assert [weight[layer(i, "self_attn.q_proj")] for i in range(3)] == [(3, 6), (5, 3), (2, 2)]
    assert [weight[layer(i, "mlp.down_proj")] for i in range(3)] == [(0, 6), (5, 1), (2, 2)]
    assert weight["model.embed_tokens.weight"] == (3, 3) and weight["lm_head.weight"] == (1, 1)


def test_base_models(tmp_path: Path, llama: Llama) -> None:
    """A listed base is no source, wherever it stands, and what it says has no effect; `linear` takes it for one."""
    base, a, b = llama("base"), llama("a"), llama("b")
    own = {"weight": [{"filter": "mlp", "value": 5}, {"value": 2}]}
    listed = [
        {"model": str(a)},
        {"model": str(base), "parameters": own},
        {"model": str(b), "parameters": {"weight": 3}},
    ]
    for models in (listed, [listed[0], listed[2]]):
        plan = yeam.plan({"merge_method": "yeam", "base_model": str(base), "models": models})
        names = [model.label.rpartition("/")[2] for model in plan.models]
        for job in plan.jobs:
            assert job.base is not None and names[job.base.model] == "base"
            assert [names[source.model] for source in job.sources] == ["a", "b"]
            assert job.parameters["weight"] == (1, 3)
    common = {"merge_method": "linear", "base_model": str(base), "parameters": {"weight": 1}}
    for models, count in ((listed, 3), ([listed[0], listed[2]], 2)):
        plan = yeam.plan({**common, "models": models})
        assert all(job.base is None and len(job.sources) == count for job in plan.jobs)
        assert plan.models[plan.donor].label.endswith("base")


def test_bases_of_slices(llama: Llama) -> None:
    """A slice's base before the recipe's; a base among the sources gives its layers there, others are a source."""
    base, other, a = llama("base", layers=3), llama("other", layers=3), llama("a", layers=3)

    def source(model: Path, first: int) -> dict[str, Any]:
        return {"model": str(model), "layer_range": [first, first + 1]}

    slices = [
        {"sources": [source(a, 0)]},
        {"sources": [source(a, 1)], "base_model": str(other)},
        {"sources": [source(a, 2), source(base, 0), source(base, 1)]},
    ]
    plan = yeam.plan({"merge_method": "yeam", "base_model": str(base), "slices": slices})

    def inputs(layer: int) -> list[str]:
        job = jobs(plan)[f"model.layers.{layer}.mlp.up_proj.weight"]
        return [f"{Path(plan.models[i.model].reference).name} {i.tensor.split('.')[2]}" for i in job.inputs]

    assert [inputs(i) for i in range(3)] == [["a 0", "base 0"], ["a 1", "other 1"], ["a 2", "base 1", "base 0"]]
    alone = yeam.plan({"merge_method": "yeam", "slices": slices[1:2]})  # the slice's own base is enough
    assert all(job.base is not None for job in alone.jobs)


def test_dtypes(llama: Llama) -> None:
    """dtype is both; out_dtype is the file's; without them the first model's; exact works in the storage dtype."""
    a, b = llama("a", dtype=torch.bfloat16), llama("b", dtype=torch.float32)
    common = {"merge_method": "linear", "models": [{"model": str(a)}, {"model": str(b)}], "parameters": {"weight": 1}}
    expected = [
        ({}, "BF16", "F32", "bfloat16"),
        ({"dtype": "float16"}, "F16", "F32", "float16"),
        ({"dtype": "float32", "out_dtype": "bfloat16"}, "BF16", "F32", "bfloat16"),
        ({"out_dtype": "torch.float16"}, "F16", "F32", "float16"),
        ({"math": "exact"}, "BF16", "BF16", "bfloat16"),
        ({"math": "exact", "dtype": "float16", "out_dtype": "float32"}, "F32", "F16", "float32"),
        ({"models": common["models"][::-1]}, "F32", "F32", "float32"),
    ]
    for keys, dtype, work, stated in expected:
        plan = yeam.plan({**common, **keys})
        assert {(job.dtype, job.work) for job in plan.jobs} == {(dtype, work)}, keys
        assert plan.config is not None and plan.config["dtype"] == stated and "torch_dtype" not in plan.config
    refuses({**common, "math": "exact", "dtype": "float8_e4m3fn"}, "no arithmetic")
    noted = yeam.plan({"merge_method": "yeam", "models": common["models"], "math": "exact"})
    assert any("changes nothing" in note for note in noted.notes)
    # the sources decide, not a base that only donates its config
    donor = yeam.plan({**common, "models": common["models"][1:], "base_model": str(a)})
    assert donor.config is not None and donor.config["dtype"] == "float32"


def test_wrong_parameters(tmp_path: Path, llama: Llama) -> None:
    """Each error has its line and what to do."""
    a, b = llama("a"), llama("b")

    def config(tail: str, method: str = "linear") -> Path:
        text = f"merge_method: {method}\nmodels:\n- model: $a\n- model: $b\n{tail}"
        return yaml(tmp_path, text, a=a, b=b)

    refuses(config("parameters:\n  tt: 0.5"), "recipe.yaml:6", "no parameter 'tt'", "normalize, weight")
    refuses(config("parameters:\n  weigth: 0.5"), "did you mean 'weight'")
    refuses(config("parameters:\n  density: 0.5\n  int8_mask: true", "yeam"), "no parameter 'density'")
    refuses(config(""), "needs 'weight'", str(a))
    refuses(config("parameters:\n  weight: 1\n  normalize: maybe"), "recipe.yaml:7", "normalize")
    refuses(config("parameters:\n  softness: -1", "yeam"), "recipe.yaml:6", "greater than 0")
    refuses(config("parameters:\n  frames: [16, 20]", "yeam"), "not usable", "256")
    refuses(config("parameters:\n  weight: [{filter: mlpx, value: 1}, {value: 2}]"), "'mlpx' matches no", "'mlp'")
    refuses(
        config("parameters:\n  weight: [{filter: 'role:atention', value: 1}, {value: 2}]"), "unknown role", "attention"
    )
    refuses(config("parameters: {weight: 1}\nbase_model: $a\ndtype: float99"), "float99")
    refuses(config("", "passthrough"), "takes 1 model", "there are 2")
    refuses(config("", "slerpp"), "recipe.yaml:1", "unknown merge method")
    refuses(config("parameters: {weight: 1}\ntokenizer: {source: union}"), "recipe.yaml:6", "vocabulary")
    text = "merge_method: yeam\nmodels:\n- model: $a\n  parameters:\n    softness: 2"
    refuses(yaml(tmp_path, text, a=a), "recipe.yaml:5", "not a per-model parameter")
    only = {"merge_method": "yeam", "base_model": str(a), "models": [{"model": str(a)}]}
    refuses(only, "1 or more models beside the base", "there are 0")


# slices and modules


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


# which tensors meet


def test_tensors_that_do_not_fit(llama: Llama) -> None:
    a = llama("a")
    norm, up = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"

    def pair(*models: Path, **keys: Any) -> dict[str, Any]:
        return {
            "merge_method": "linear",
            "models": [{"model": str(m)} for m in models],
            "parameters": {"weight": 1},
            **keys,
        }

    refuses(pair(a, llama("less", change={norm: None})), norm, "less", error=CheckpointError)
    refuses(pair(a, llama("more", change={"extra.weight": torch.ones(2)})), "extra.weight", error=CheckpointError)
    refuses(pair(a, llama("wide", change={up: torch.ones(40, 16)})), "[32, 16]", "[40, 16]", error=CheckpointError)
    refuses(pair(a, llama("int", change={up: torch.ones(32, 16).int()})), "F32", "I32", error=CheckpointError)
    bert = save_model(
        a.parent / "bert", {"encoder.layer.0.output.dense.weight": torch.ones(2, 2)}, {"model_type": "bert"}
    )
    refuses(pair(a, bert), "(bert) has no layers like model.layers", "one architecture", error=CheckpointError)
    mistral = llama("mistral", config={"model_type": "mistral"})
    assert any("mistral is a mistral" in note for note in yeam.plan(pair(a, mistral)).notes)
    vocab = llama("vocab", vocab=34)
    refuses(pair(a, vocab), "vocabularies differ", "32 tokens", "34", error=CheckpointError)
    # the config of a base that is no source has to fit, too
    refuses(pair(vocab, base_model=str(a)), "vocabularies differ", error=CheckpointError)


def test_ties(tmp_path: Path, llama: Llama) -> None:
    """Two tied models have no head; beside an untied one the head is written, and config.json no longer ties."""
    tied, too, free = llama("tied", tied=True), llama("too", tied=True), llama("free")

    def plan(*models: Path, **keys: Any) -> Plan:
        return yeam.plan(
            {
                "merge_method": "linear",
                "models": [{"model": str(m)} for m in models],
                "parameters": {"weight": 1},
                **keys,
            }
        )

    both = plan(tied, too)
    assert "lm_head.weight" not in jobs(both) and both.config is not None and both.config["tie_word_embeddings"] is True
    for order in ((tied, free), (free, tied)):
        mixed = plan(*order)
        names = [source.tensor for source in jobs(mixed)["lm_head.weight"].sources]
        assert sorted(names) == ["lm_head.weight", "model.embed_tokens.weight"]
        assert mixed.config is not None and mixed.config["tie_word_embeddings"] is False
        assert len(mixed.jobs) == len({job.name for job in mixed.jobs}) == len(llama_tensors())
    # the filter sees what the tensor becomes, not what it is tied to
    filtered = plan(tied, free, parameters={"weight": [{"filter": "lm_head", "value": 5}, {"value": 1}]})
    assert jobs(filtered)["lm_head.weight"].parameters["weight"] == (5, 5)
    embedding = llama_tensors(sum(b"stored"), tied=True)["model.embed_tokens.weight"]
    stored = llama("stored", tied=True, change={"lm_head.weight": embedding.clone()})
    twice = plan(stored, tied)
    assert "lm_head.weight" not in jobs(twice) and any("lm_head.weight is stored" in note for note in twice.notes)
    assert "model.embed_tokens.weight" in jobs(plan(stored, free)) and "lm_head.weight" in jobs(plan(stored, free))
    # transformers ties only what is equal, so a head with values of its own is a tensor of its own
    apart = llama("apart", tied=True, change={"lm_head.weight": torch.ones(32, 16)})
    for order in ((apart, tied), (tied, apart)):
        mixed = plan(*order)
        assert "lm_head.weight" in jobs(mixed) and any("two tensors" in note for note in mixed.notes)
        assert mixed.config is not None and mixed.config["tie_word_embeddings"] is False


def test_shared_storage(tmp_path: Path) -> None:
    """A head that shares the embedding's storage: one tensor; two where config.json says that they are not tied."""
    weights = llama_tensors(tied=True)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    for tied in (True, False):
        folder = tmp_path / str(tied)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(llama_config(tied=tied)))
        torch.save(weights, folder / "pytorch_model.bin")
        plan = yeam.plan({"merge_method": "passthrough", "models": [{"model": str(folder)}]})
        assert ("lm_head.weight" in jobs(plan)) is not tied
        assert "model.embed_tokens.weight" in jobs(plan)


def test_constants_and_integers(llama: Llama) -> None:
    """Constants come from the first model, or stay away if it has none; integers are copied, and the plan says so."""
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    table = {"hash.table": torch.arange(6, dtype=torch.int64)}
    plain, other = llama("plain", change=table), llama("other", change={**table, **frequencies})

    def plan(*models: Path) -> Plan:
        return yeam.plan(
            {"merge_method": "linear", "models": [{"model": str(m)} for m in models], "parameters": {"weight": 1}}
        )

    without, with_them = plan(plain, other), plan(other, plain)
    assert not set(frequencies) & set(jobs(without)) and any("left out, a constant" in note for note in without.notes)
    assert jobs(with_them)[next(iter(frequencies))].method == jobs(with_them)["hash.table"].method == "copy"
    assert any("hash.table: not of floating-point" in note for note in with_them.notes)
    assert with_them.total_parameters == sum(t.numel() for t in llama_tensors().values())


# the files


def ordered(plan: Plan, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {job.name: tensors[job.name] for job in plan.jobs}


def test_files_are_those_of_save_pretrained(tmp_path: Path, llama: Llama) -> None:
    """Shard by shard and byte by byte what huggingface_hub writes for the same tensors in the same order."""
    odd = {
        "z.scalar": torch.tensor(3.0, dtype=torch.float64), "z.int": torch.arange(5, dtype=torch.int16),
        "z.é\n": torch.ones(3), "z.bool": torch.tensor([True, False, True]), "z.none": torch.zeros(0, 4),
        "z.fp8": torch.ones(7).to(torch.float8_e4m3fn),
    }  # fmt: skip
    a = llama("a", dtype=torch.bfloat16, change=odd)
    weights = load_file(a / "model.safetensors")
    for size in (300, 1500, 4000, 10**9):
        recipe = {"merge_method": "passthrough", "models": [{"model": str(a)}]}
        plan = yeam.plan(recipe, shard_size=size)
        out, expected = tmp_path / f"out-{size}", tmp_path / f"hub-{size}"
        yeam.merge(recipe, out, shard_size=size)
        expected.mkdir()
        save_torch_state_dict(ordered(plan, weights), expected, max_shard_size=size, metadata={"format": "pt"})
        files = sorted(path.name for path in expected.glob("*.safetensors"))
        assert sorted(path.name for path in out.glob("*.safetensors")) == files
        for name in files:
            assert (out / name).read_bytes() == (expected / name).read_bytes(), (size, name)
            with safe_open(out / name, "pt") as file:
                assert file.metadata() == {"format": "pt"}
        index = out / "model.safetensors.index.json"
        assert index.exists() is (len(files) > 1)
        split = split_torch_state_dict_into_shards(ordered(plan, weights), max_shard_size=size)
        if len(files) > 1:
            made = json.loads(index.read_text())
            assert made["weight_map"] == split.tensor_to_filename
            assert made["metadata"]["total_size"] == split.metadata["total_size"]
            assert index.read_text() == json.dumps(made, indent=2, sort_keys=True) + "\n"


def test_plain_json_and_costs(llama: Llama) -> None:
    a, b = llama("a", shards=2), llama("b")
    recipe = {"merge_method": "yeam", "base_model": str(a), "models": [{"model": str(b)}], "chat_template": "chatml"}
    plan, costs = plan_costs(recipe, shard_size="3KB")
    plain = plan.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert len(plain["shards"]) > 1 and plain["chat_template"] and plain["config"]["model_type"] == "llama"
    for job, made in zip(plain["jobs"], plan.jobs, strict=True):
        header = json.loads(plain["shards"][job["shard"]]["header"])
        begin, end = header[job["name"]]["data_offsets"]
        assert end - begin == job["end"] - job["begin"] == made.nbytes
        assert (header[job["name"]]["dtype"], header[job["name"]]["shape"]) == (job["dtype"], job["shape"])
        assert job["parameters"] == {
            "frames": 256,
            "lambda_": 1,
            "rounds": None,
            "seed": 0,
            "softness": 32,
            "weight": [1],
        }
    assert sum(shard["nbytes"] - len(shard["header"].encode()) - 8 for shard in plain["shards"]) == plan.total_bytes
    assert costs["read_bytes"] == 2 * plan.total_bytes == sum(costs["read_by_role"].values())
    assert plan.total_bytes < costs["peak_memory"] < 4 << 30


SCRIPT = """
import sys, yeam
plan = yeam.plan(sys.argv[1])
print(plan.hash(), plan.models[plan.donor].label, [job.name for job in plan.jobs][:3])
"""


def test_every_process_makes_the_same_plan(tmp_path: Path, llama: Llama) -> None:
    models = [llama(name) for name in "abc"]
    recipe = {"merge_method": "linear", "models": [{"model": str(m)} for m in models], "parameters": {"weight": 1}}
    path = tmp_path / "r.json"
    path.write_text(json.dumps(recipe))
    lines = set()
    for seed in ("0", "1", "7"):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(path)], env=environment(PYTHONHASHSEED=seed), capture_output=True,
            text=True, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines.add(done.stdout)
    assert len(lines) == 1
    hashes = {yeam.plan(recipe).hash()}
    for change in (
        {"dtype": "float16"},
        {"parameters": {"weight": 2}},
        {"chat_template": "chatml"},
        {"models": recipe["models"][::-1]},
    ):
        hashes.add(yeam.plan({**recipe, **change}).hash())
    assert len(hashes) == 5
    before = yeam.plan(recipe).hash()
    save_model(models[0], llama_tensors(seed=99), llama_config())
    assert yeam.plan(recipe).hash() != before
