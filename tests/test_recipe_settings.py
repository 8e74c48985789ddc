"""Settings of a recipe: gradients, filters, and which level's value holds for a tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_texts import FRANKENMERGE, HEAD, MODULES

from yeam.errors import ConfigError
from yeam.recipe import ModelRef, Resolver, evaluate, layer_position, mentioned_parameters, parse_recipe
from yeam.recipe.settings import parse_setting

KNOTS = st.lists(st.floats(-1e6, 1e6) | st.integers(-1000, 1000), min_size=2, max_size=7)


@settings(deadline=None)
@given(KNOTS, st.floats(0, 1), st.floats(0, 1))
def test_gradients_are_piecewise_linear(knots: list[float], one: float, other: float) -> None:
    setting = parse_setting(knots)
    assert evaluate(setting, "x", 0.0) == knots[0] and evaluate(setting, "x", 1.0) == knots[-1]
    segments = len(knots) - 1
    scale = max(abs(knot) for knot in knots) or 1.0
    assert evaluate(setting, "x", one) == pytest.approx(
        np.interp(one * segments, range(len(knots)), knots), abs=1e-9 * scale
    )
    segment = min(int(one * segments), segments - 1)
    low, high = sorted((segment + one) / segments for one in (one, other))
    if low * segments >= segment and high * segments <= segment + 1:  # rounding may step over a knot
        first, last = (evaluate(setting, "x", t) for t in (low, high))
        assert isinstance(first, float) and isinstance(last, float)
        rising = knots[segment + 1] - knots[segment]
        assert (last - first) * np.sign(rising) >= -1e-12 * scale


@given(st.floats(-1e30, 1e30), st.integers(2, 9), st.floats(0, 1))
def test_a_constant_gradient_is_that_constant(value: float, count: int, t: float) -> None:
    assert evaluate(parse_setting([value] * count), "x", t) == value


def test_evaluate() -> None:
    assert evaluate("spectral", "x", 0.5) == "spectral" and evaluate(True, "x", 0.5) is True
    assert evaluate(("spectral",), "x", 0.5) == "spectral" and evaluate((True,), "x", 1.0) is True
    with pytest.raises(ConfigError, match="'a' cannot be a point of a gradient"):
        evaluate(("a", "b"), "x", 0.5)
    bare = parse_setting({"filter": "mlp", "value": [0, 10]})
    assert evaluate(bare, "layers.0.mlp.up", 0.5) == 5.0 and evaluate(bare, "norm", 0.5) is None
    by_role = parse_setting([{"filter": "role:attention", "value": 1}, {"filter": "*", "value": 2}])
    assert evaluate(by_role, "wq", 0.0, {"attention", "q"}) == 1 and evaluate(by_role, "up", 0.0, {"mlp"}) == 2
    assert [layer_position(*of) for of in ((0, 5), (2, 5), (4, 5), (0, 1), (None, 5))] == [0, 0.5, 1, 1, 0]


RESOLVED = """\
merge_method: m
models:
  - model: lab/a
    parameters:
      weight: [{filter: attn.c, value: 1}]
  - model: lab/b
    parameters:
      weight: {filter: nowhere, value: 9}
      normalize: true
parameters:
  weight:
    - filter: attn
      value: 2
    - filter: role:norm
      value: 3
    - filter: role:router
      value: 4
  t: [{filter: in_, value: 5}, {filter: out_, value: 6}]
"""


def test_names_fall_through_and_unmatched_filters() -> None:
    loaded = parse_recipe(RESOLVED)
    resolver = Resolver.of(loaded, known_roles={"norm", "router"})

    def weight(source: int, output: str, name: str, *roles: str) -> Any:
        return resolver.value("weight", output_name=output, input_name=name, source=source, roles=roles, default=0)

    assert weight(0, "out_attn", "in.attn.c_proj") == 1  # the source's own filter, on the input's name
    assert weight(0, "out.attn.c", "in.attn.q") == 2  # no match there: falls through to the top level
    assert weight(0, "x", "ln", "norm") == 3
    assert weight(1, "x", "y") == 0
    assert resolver.value("t", output_name="out_x", input_name="in_x") == 6  # global: the output's name
    left = resolver.unmatched_filters()
    assert [(loaded.locate(path), filter) for path, filter in left] == [
        ("recipe.yaml:16", "role:router"),
        ("recipe.yaml:18", "in_"),
        ("recipe.yaml:8", "nowhere"),
    ]


def test_a_filter_that_a_nearer_level_hides_still_counts_as_matched() -> None:
    text = HEAD + "    parameters: {weight: 1}\nparameters: {weight: [{filter: mlp, value: 2}]}"
    resolver = Resolver.of(parse_recipe(text))
    assert resolver.value("weight", output_name="mlp.up", source=0) == 1
    assert resolver.unmatched_filters() == []


def test_filters_are_counted_over_all_slices() -> None:
    root = Resolver.of(parse_recipe(FRANKENMERGE))
    assert len(root.unmatched_filters()) == 1
    root.at(slice_index=1).value("scale", output_name="o_proj", source=0)
    assert root.unmatched_filters() == []


def test_global_parameter_of_one_model_and_unknown_role_are_errors() -> None:
    loaded = parse_recipe(RESOLVED)
    with pytest.raises(ConfigError, match=r"^recipe\.yaml:9: 'normalize' is not a per-model parameter"):
        Resolver.of(loaded).value("normalize", output_name="x")
    message = r"^recipe\.yaml:16: parameters\.weight\[2\] names the unknown role 'router' \(did you mean 'rooter'\?\)"
    with pytest.raises(ConfigError, match=message):
        Resolver.of(loaded, known_roles={"norm", "rooter"})


def test_a_model_listed_twice_is_addressed_by_index() -> None:
    text = "merge_method: m\nmodels:\n- {model: a, parameters: {weight: 1}}\n- {model: a, parameters: {weight: 2}}"
    resolver = Resolver.of(parse_recipe(text))
    assert [resolver.value("weight", output_name="x", source=index) for index in (0, 1)] == [1, 2]
    with pytest.raises(ValueError, match="2 times"):
        resolver.value("weight", output_name="x", source=ModelRef("a"))


def test_mentioned_parameters() -> None:
    loaded = parse_recipe(MODULES)
    assert [tuple(mention) for mention in mentioned_parameters(loaded.recipe)] == [
        (("parameters", "weight"), "weight", False),
        (("modules", "text_decoder", "parameters", "weight"), "weight", False),
        (("modules", "text_decoder", "slices", 0, "parameters", "weight"), "weight", False),
        (("modules", "text_decoder", "slices", 0, "sources", 0, "parameters", "weight"), "weight", True),
    ]
    path = mentioned_parameters(loaded.recipe)[-1].path
    assert str(loaded.error(path, "unknown parameter", "do")) == "recipe.yaml:6: unknown parameter\n  remedy: do"
