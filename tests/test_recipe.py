"""Recipes: real YAML texts, files and plain data in, checked values out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_texts import FRANKENMERGE, GRADIENT_SLERP, MODULES, TIES

from yeam.errors import ConfigError
from yeam.recipe import (
    LoadedRecipe,
    MergeRecipe,
    ModelRef,
    ModelToken,
    Resolver,
    ZeroToken,
    layer_position,
    load_recipe,
    parse_recipe,
)
from yeam.recipe.document import dump_yaml, read_document
from yeam.recipe.settings import Filtered


def test_gradient_slerp_evaluates_by_filter_and_layer() -> None:
    loaded = parse_recipe(GRADIENT_SLERP)
    assert loaded.recipe.dtype == "float16" and loaded.recipe.base_model == ModelRef("lab/orca-13b")
    assert loaded.recipe.slices is not None and loaded.recipe.slices[0].sources[1].layer_range == (0, 40)
    resolver = Resolver.of(loaded).at(slice_index=0)

    def t_of(name: str, layer: int | None) -> Any:
        return resolver.value("t", output_name=name, t=layer_position(layer, 40))

    assert [t_of("model.layers.0.self_attn.q_proj.weight", layer) for layer in (0, 39)] == [0, 1]
    assert [t_of("model.layers.0.mlp.up_proj.weight", layer) for layer in (0, 39)] == [1, 0]
    assert t_of("model.layers.7.self_attn.q_proj.weight", 7) == pytest.approx(
        np.interp(7 / 39 * 4, range(5), [0, 0.5, 0.3, 0.7, 1])
    )
    assert t_of("model.norm.weight", None) == 0.5
    assert resolver.unmatched_filters() == []


def test_ties_per_model_gradients_and_filters() -> None:
    loaded = parse_recipe(TIES)
    resolver = Resolver.of(loaded)
    name = "model.layers.3.mlp.up_proj.weight"

    def ask(parameter: str, source: int, t: float, name: str = name) -> Any:
        return resolver.value(parameter, output_name=name, input_name=name, source=source, t=t)

    assert ask("density", 0, 0.25) == pytest.approx(0.85)
    assert ask("weight", 1, 1 / 3) == pytest.approx(0.3)
    assert ask("weight", 2, 0.0) == 0.5
    assert ask("weight", 2, 0.0, "model.norm.weight") == 0
    assert resolver.value("normalize", output_name=name) is True
    assert resolver.value("lambda", output_name=name, default=1.0) == 1.0


def test_frankenmerge_slices_and_empty_parameters() -> None:
    loaded = parse_recipe(FRANKENMERGE)
    assert loaded.recipe.slices is not None
    assert [piece.layer_count for piece in loaded.recipe.slices] == [24, 20]
    assert loaded.recipe.slices[1].base_model == ModelRef("lab/llama-2-13b")
    second = Resolver.of(loaded).at(slice_index=1)
    assert second.value("scale", output_name="layers.24.o_proj", input_name="layers.20.o_proj", source=0) == 0.0
    assert second.value("scale", output_name="x", input_name="x", source=0) == 1
    assert [ref.path for _, ref in loaded.recipe.references()] == [
        "lab/orca-13b",
        "lab/platypus-13b",
        "lab/llama-2-13b",
    ]


def test_modules_and_precedence_of_all_levels() -> None:
    loaded = parse_recipe(MODULES)
    assert (loaded.recipe.dtype, loaded.recipe.out_dtype) == ("bfloat16", "float32")
    root = Resolver.of(loaded)
    text, vision = root.at("text_decoder", 0), root.at("vision_tower")
    assert text.value("weight", output_name="x", source=0) == 1
    assert text.value("weight", output_name="x", source=1) == 2
    assert text.value("weight", output_name="x", source=ModelRef("lab/vlm-a")) == 1
    assert text.value("weight", output_name="x", source=ModelRef("lab/unlisted-base")) == 2
    assert root.at("text_decoder").value("weight", output_name="x", source=ModelRef("lab/vlm-a")) == 3
    assert vision.value("weight", output_name="x", source=0) == 4


def test_every_key_of_the_schema() -> None:
    recipe = parse_recipe(
        """\
merge_method: yeam
base_model: lab/base@v1
models:
  - model: lab/a@refs/pr/3+lab/adapter@main
  - model: {model: {path: lab/b, revision: abc}, lora: {path: lab/adapter}}
parameters: {softness: 4, frames: spectral, "lambda": 1e-1, rounds: null}
dtype: torch.bfloat16
out_dtype: half
math: exact
tokenizer:
  source: union
  pad_to_multiple_of: 64
  tokens:
    <|im_start|>: {source: lab/a, force: true}
    on: {source: {kind: model_token, model: lab/b, token_id: 7}}
    2024-01-01: {source: {kind: zero}}
    plain: {}
chat_template: chatml
plugins: [attention, {inject: {strength: 0.5, roles: [q, k]}}, quiet: ]
output: ./out
shard_size: 2GiB
name: mine
allow_nan: true
"""
    ).recipe
    assert recipe.models is not None
    assert recipe.models[0].model == ModelRef("lab/a", "refs/pr/3", ModelRef("lab/adapter", "main"))
    assert recipe.models[1].model == ModelRef("lab/b", "abc", ModelRef("lab/adapter"))
    assert recipe.parameters == {"softness": 4, "frames": "spectral", "lambda": 0.1, "rounds": None}
    assert (recipe.dtype, recipe.out_dtype, recipe.math) == ("bfloat16", "float16", "exact")
    assert recipe.tokenizer is not None and recipe.tokenizer.tokens is not None
    tokens = recipe.tokenizer.tokens
    assert list(tokens) == ["<|im_start|>", "on", "2024-01-01", "plain"] and tokens["<|im_start|>"].force
    assert tokens["on"].source == ModelToken(ModelRef("lab/b"), token_id=7)
    assert tokens["2024-01-01"].source == ZeroToken() and tokens["plain"].source is None
    assert [(use.name, dict(use.options)) for use in recipe.plugins] == [
        ("attention", {}),
        ("inject", {"strength": 0.5, "roles": ["q", "k"]}),
        ("quiet", {}),
    ]
    assert (recipe.shard_size, recipe.name, recipe.allow_nan, recipe.output) == (2 * 2**30, "mine", True, "./out")
    assert load_recipe(recipe).recipe == recipe  # through plain data and back
    assert parse_recipe(load_recipe(recipe).text).recipe == recipe  # and through YAML text


def test_anchors_and_merge_keys() -> None:
    loaded = parse_recipe(
        """\
merge_method: linear
models:
  - model: lab/a
    parameters: &shared
      weight: 1
      density: 0.5
  - model: lab/b
    parameters: {<<: *shared, weight: 2}
  - model: lab/c
    parameters: *shared
"""
    )
    assert loaded.recipe.models is not None
    assert [entry.parameters for entry in loaded.recipe.models] == [
        {"weight": 1, "density": 0.5},
        {"density": 0.5, "weight": 2},
        {"weight": 1, "density": 0.5},
    ]
    assert loaded.locate(("models", 1, "parameters", "weight")) == "recipe.yaml:8"
    assert loaded.locate(("models", 1, "parameters", "density")) == "recipe.yaml:6"


def test_a_file_is_kept_verbatim_and_its_folder_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "conf" / "experts").mkdir(parents=True)
    (tmp_path / "conf" / "both").mkdir()
    (tmp_path / "here" / "both").mkdir()
    text = "merge_method: linear # é\r\nmodels:\r\n- model: experts\r\n- model: both\r\n- model: ./absent\r\n"
    config = tmp_path / "conf" / "two.yaml"
    config.write_bytes(b"\xef\xbb\xbf" + text.encode())
    monkeypatch.chdir(tmp_path / "here")
    loaded = load_recipe(os.path.relpath(config))
    assert loaded.text == text and loaded.name == "two"
    assert loaded.recipe.models is not None
    first, second, third = (entry.model for entry in loaded.recipe.models)
    assert first.path == str(tmp_path / "conf" / "experts")
    assert second.path == str(tmp_path / "here" / "both")
    assert third.path == "./absent" and third.is_local()
    assert loaded.locate(("models", 1, "model")) == "../conf/two.yaml:4"


def test_overrides() -> None:
    overrides = [
        "parameters.softness=2",
        "models.2.parameters.weight[0].value=0.25",
        "models[0].parameters.density=[0, 1e-1]",
        "merge_method=linear",
        "name=",
    ]
    loaded = parse_recipe(TIES, overrides=overrides)
    recipe = loaded.recipe
    assert recipe.models is not None and recipe.merge_method == "linear" and recipe.name is None
    assert recipe.parameters == {"normalize": True, "int8_mask": True, "softness": 2}
    assert recipe.models[2].parameters["weight"] == (Filtered("mlp", 0.25), Filtered(None, 0))
    assert recipe.models[0].parameters["density"] == (0, 0.1)
    header = loaded.text.splitlines()[: len(overrides) + 1]
    assert header == ["# recipe.yaml, changed by", *(f"#   --set {override}" for override in overrides)]
    assert parse_recipe(loaded.text).recipe == recipe
    assert loaded.locate(("parameters", "softness")) == "--set parameters.softness=2"
    assert loaded.locate(("models", 0, "parameters", "weight")) == "recipe.yaml:5"
    fresh = parse_recipe("merge_method: a\nmodels: [{model: lab/a}]", overrides=["models.0.parameters.weight=3"])
    assert fresh.recipe.models is not None and fresh.recipe.models[0].parameters == {"weight": 3}


def test_a_single_override_is_one() -> None:
    """A text in place of a list is that override, not its letters."""
    data = {"merge_method": "linear", "models": [{"model": "a/b"}]}
    assert load_recipe(data, "parameters.weight=2").recipe.parameters == {"weight": 2}


def test_plain_data() -> None:
    data = {"merge_method": "linear", "models": ({"model": Path("lab/a")}, {"model": "lab/b"})}
    data["parameters"] = {"weight": np.float64(0.5), "t": [np.int64(1), 2]}
    loaded = load_recipe(data)
    assert isinstance(loaded, LoadedRecipe) and loaded.path is None and loaded.name == "merge"
    assert loaded.recipe.parameters == {"weight": 0.5, "t": (1, 2)}
    assert parse_recipe(loaded.text).recipe == loaded.recipe
    assert load_recipe(loaded) is loaded
    with pytest.raises(ConfigError, match=r"^recipe, models\[0\]\.nope: unknown key 'nope' in models\[0\]"):
        load_recipe({"merge_method": "linear", "models": [{"model": "lab/a", "nope": 1}]})
    with pytest.raises(ConfigError, match=r"parameters\.x is a set"):
        load_recipe({"merge_method": "linear", "parameters": {"x": {1}}})
    with pytest.raises(ConfigError, match="has the key 1, which is not text"):
        load_recipe({1: 2})  # type: ignore[dict-item]


SCALARS = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False) | st.text(max_size=8)
TREES = st.recursive(
    SCALARS | st.sampled_from(["1e5", "1E-3", ".5e3", "2024-01-01", "12:30", "on", "<<", "=", "~", "0x1f", "- a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(TREES)
def test_dumped_data_reads_back(data: Any) -> None:
    assert read_document(dump_yaml(data), "x").data == data


KEYS = st.sampled_from(
    [*MergeRecipe.model_fields, "model", "sources", "layer_range", "filter", "value", "kind", "path"]
)
RECIPES = st.recursive(
    TREES | st.sampled_from(["lab/a", [0, 4], "zero", "union"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(KEYS, RECIPES, min_size=1, max_size=6))
def test_any_data_is_a_recipe_or_one_config_error(data: dict[str, Any]) -> None:
    try:
        loaded = load_recipe(data)
    except ConfigError as error:
        assert all(line.startswith("recipe") for line in error.message.splitlines())
    else:
        assert parse_recipe(loaded.text).recipe == loaded.recipe


def test_the_dump_is_yaml_for_others_too() -> None:
    text = load_recipe({"merge_method": "linear", "models": [{"model": "lab/a@1e5"}], "name": "2024-01-01"}).text
    assert yaml.safe_load(text)["name"] == "2024-01-01"
    assert MergeRecipe.model_validate(yaml.safe_load(text)).name == "2024-01-01"


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, yeam.recipe; print(sorted({'pydantic', 'yaml', 'torch'} & set(sys.modules)))"
    code += "; yeam.recipe.load_recipe; yeam.recipe.Resolver; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[:2] == ["[]", "False"]
