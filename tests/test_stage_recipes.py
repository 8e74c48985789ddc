"""Recipes of several stages: how they are written, and what does not fit together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

import yeam
from yeam.errors import ConfigError, UserError
from yeam.recipe import StageRef, load_recipe, parse_recipe

TWO = """\
name: first
merge_method: linear
models:
  - model: lab/a
    parameters: {weight: 1}
---
merge_method: linear
models:
  - model: first
    parameters: {weight: 1}
"""


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("name: first", "name: other"), "r.yaml:1: the stage 'other' is not used by any other"),
        (("---\n", "---\nname: last\n---\n"), "r.yaml:7: 'merge_method' is missing at the top level"),
        (("name: first\n", ""), "r.yaml:6: a second document without a `name:`; the first is at r.yaml:1"),
        (("---\n", "---\nname: first\n"), "r.yaml:7: two documents are named 'first'; the first is at r.yaml:1"),
        (("lab/a", "first"), "r.yaml:4: stages use each other in a circle: first → first"),
        (
            (
                "lab/a\n    parameters: {weight: 1}\n",
                "third\n---\nname: third\nmerge_method: linear\nmodels: [{model: first}]\n",
            ),
            "r.yaml:8: stages use each other in a circle: first → third → first",
        ),
        (("name: first", "name: first\noutput: x"), "r.yaml:2: the stage 'first' is an intermediate, which is not"),
        (("weight: 1}\n---", "weights: 1}\n---"), "r.yaml:5: method 'linear' has no parameter 'weights' (did you mean"),
        (("- model: first", "- model: first+"), "r.yaml:9: '' does not name a model"),
        (("---", "---\n- 1\n---"), "r.yaml:7: a recipe is a mapping of keys to values, not a list"),
    ],
)
def test_what_does_not_fit_together_is_said_with_its_line(
    change: tuple[str, str], expected: str, llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama("lab/a")
    monkeypatch.chdir(tmp_path)
    text = TWO.replace(*change)
    assert text != TWO
    Path("r.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        yeam.plan("r.yaml")
    assert error.value.message.startswith(expected)


def test_an_unused_stage_that_is_misspelt_elsewhere_is_found() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_recipe(TWO.replace("- model: first", "- model: frist"), "r.yaml")
    assert caught.value.remedy.endswith("; r.yaml:9 names 'frist' (did you mean 'first'?)")


def test_a_misspelt_stage_is_suggested(
    llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama("lab/a")
    monkeypatch.chdir(tmp_path)
    third = TWO.replace("model: first\n", "model: ./frst\n  - model: first\n")
    with pytest.raises(UserError) as error:
        yeam.plan([*yaml.safe_load_all(third)])
    assert "./frst: there is no such folder" in error.value.message
    assert error.value.remedy.endswith("or name a stage (did you mean 'first'?)")


def test_overrides_name_their_stage() -> None:
    def changed(*overrides: str) -> list[Mapping[str, Any]]:
        loaded = parse_recipe(TWO, overrides=overrides)
        return [document.recipe.plain() for document in loaded.documents]

    first, last = changed("first.dtype=float16", "math=exact", "*.parameters.normalize=false", "models.0.parameters={}")
    assert first["dtype"] == "float16" and "math" not in first and "dtype" not in last and last["math"] == "exact"
    assert first["parameters"] == last["parameters"] == {"normalize": False}
    assert first["models"][0]["parameters"] == {"weight": 1} and "weight" not in last["models"][0]["parameters"]
    named = TWO.replace("---\n", "---\nname: final\n").replace("first", "v1.0")
    loaded = parse_recipe(named, overrides=["v1.0.dtype=float16", "out_dtype=bfloat16"])
    assert loaded.name == "final" and loaded.recipe.out_dtype == "bfloat16"
    assert loaded.stages[0].recipe.dtype == "float16"
    assert parse_recipe(loaded.text).documents[0].recipe == loaded.stages[0].recipe  # what is kept can be run again
    with pytest.raises(ConfigError, match="'frist' is neither a stage nor a key of recipes \\(did you mean 'first'"):
        changed("frist.dtype=float16")


def test_one_document_needs_no_stages_and_names_are_free() -> None:
    one = load_recipe({"merge_method": "linear", "name": "lab", "models": [{"model": "lab"}]})
    assert one.stages == () and one.recipe.models is not None and not isinstance(one.recipe.models[0].model, StageRef)
    assert load_recipe([{"merge_method": "linear", "models": [{"model": "lab"}]}]).stages == ()
    with pytest.raises(ConfigError, match=r"r.yaml: the recipe is empty"):
        parse_recipe("---\n---\n# nothing\n", "r.yaml")
    loaded = parse_recipe("---\n" + TWO + "---\n")  # empty documents are none
    assert [document.name for document in loaded.documents] == ["first", "merge"]
    with pytest.raises(ConfigError, match=r"^recipe\[1\], models\[0\]\.nope: unknown key"):
        load_recipe([{"merge_method": "linear", "name": "x", "models": [{"model": "lab"}]},
                     {"merge_method": "linear", "models": [{"model": "x", "nope": 1}]}])  # fmt: skip
