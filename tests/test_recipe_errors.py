"""Recipes that cannot be read: every error names its file, its line and what was meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from recipe_texts import HEAD, TIES

from yeam.api import output_folder
from yeam.errors import ConfigError
from yeam.recipe import load_recipe, parse_recipe


def problems(text: str, **options: Any) -> list[str]:
    """The lines of the error that a recipe raises."""
    with pytest.raises(ConfigError) as caught:
        parse_recipe(text, "r.yaml", **options)
    return caught.value.message.splitlines()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (HEAD + "    paramaters: {}\n", "r.yaml:4: unknown key 'paramaters' in models[0] (did you mean 'parameters'?)"),
        (
            "merge_metod: linear\nmodels: [{model: a}]",
            "r.yaml:1: unknown key 'merge_metod' at the top level (did you mean 'merge_method'?)",
        ),
        ("models: [{model: a}]", "r.yaml:1: 'merge_method' is missing at the top level"),
        ("merge_method: linear", "r.yaml:1: the recipe must have exactly one of models, slices, modules, and has none"),
        (
            HEAD + "slices: [{sources: [{model: a, layer_range: [0, 1]}]}]",
            "r.yaml:4: slices cannot be given together with 'models'",
        ),
        ("merge_method: linear\nmodels: []", "r.yaml:2: models is empty"),
        ("merge_method: linear\nmodels: {model: a}", "r.yaml:2: models must be a list, not a mapping"),
        (
            "merge_method: linear\nmodels:\n  - lab/a",
            "r.yaml:3: models[0] must be a mapping of keys to values, not the string 'lab/a' (write `model: lab/a`)",
        ),
        ("merge_method: linear\nmodels: [{model: 7}]", "r.yaml:2: a model must be text or a mapping, not 7"),
        (
            "merge_method: linear\nmodels: [{model: a b}]",
            "r.yaml:2: 'a b' is neither an existing path nor the name of a Hub repository",
        ),
        (
            "merge_method: linear\nmodels:\n- model:\n    model: lab/a\n    override_architecture: X",
            "r.yaml:3: 'override_architecture' is not supported: the family is read from "
            "config.json and the tensor names",
        ),
        ("merge_method: 5\nmodels: [{model: a}]", "r.yaml:1: merge_method must be text, not the number 5"),
        (
            HEAD + "math: exakt",
            "r.yaml:4: math must be one of fp32, exact, not the string 'exakt' (did you mean 'exact'?)",
        ),
        (HEAD + "dtype: bfloat61", "r.yaml:4: dtype is 'bfloat61', which is no dtype (did you mean 'bfloat16'?)"),
        (HEAD + "out_dtype: int64", "r.yaml:4: out_dtype is 'int64', in which no weights can be merged"),
        (HEAD + "shard_size: 5 GX", "r.yaml:4: '5 GX' is not a size"),
        (HEAD + "allow_nan: 'yes'", "r.yaml:4: allow_nan must be true or false, not the string 'yes'"),
        (HEAD + "chat_template: {}", "r.yaml:4: chat_template must be text, not a mapping"),
        (
            HEAD + "tokenizer_source: base\ntokenizer: {source: base}",
            "r.yaml:4: tokenizer_source cannot be given together with 'tokenizer'",
        ),
        (HEAD + "tokenizer:\n  sauce: base", "r.yaml:5: unknown key 'sauce' in tokenizer (did you mean 'source'?)"),
        (
            HEAD + "tokenizer:\n  tokens:\n    a: {source: {kind: zreo}}",
            "r.yaml:6: tokenizer.tokens.a.source.kind must be one of zero, model_token, not "
            "the string 'zreo' (did you mean 'zero'?)",
        ),
        (
            HEAD + "tokenizer:\n  tokens:\n    a: {source: zero}",
            "r.yaml:6: tokenizer.tokens.a.source 'zero' is a kind, not a model",
        ),
        (
            HEAD + "tokenizer:\n  tokens:\n    a: {source: {kind: model_token, model: x}}",
            "r.yaml:6: tokenizer.tokens.a.source must name exactly one of 'token' and 'token_id'",
        ),
        (
            HEAD + "tokenizer:\n  tokens:\n    a:\n      froce: true",
            "r.yaml:7: unknown key 'froce' in tokenizer.tokens.a (did you mean 'force'?)",
        ),
        (HEAD + "plugins: attention", "r.yaml:4: plugins must be a list, not the string 'attention'"),
        (
            HEAD + "plugins:\n  - a\n  - {b: {}, c: {}}",
            "r.yaml:6: plugins[1] must be a plugin's name, or name: {options}, not a mapping of 2 keys",
        ),
        (HEAD + "parameters:\n  t: []", "r.yaml:5: parameters.t is an empty list"),
        (
            HEAD + "parameters:\n  t:\n  - {filter: mlp, valu: 1}",
            "r.yaml:6: unknown key 'valu' in parameters.t[0] (did you mean 'value'?)",
        ),
        (
            HEAD + "parameters:\n  t:\n  - {pattern: mlp, value: 1}",
            "r.yaml:6: unknown key 'pattern' in parameters.t[0] (it is called 'filter')",
        ),
        (
            HEAD + "parameters:\n  t:\n  - {filter: mlp, value: 1}\n  - 2",
            "r.yaml:7: parameters.t[1] must be a mapping {filter, value} like the other "
            "items of the list, not the number 2",
        ),
        (
            HEAD + "parameters:\n  t: [true, false]",
            "r.yaml:5: parameters.t[0] must be a number: it is a point of a gradient, not "
            "true|r.yaml:5: parameters.t[1] must be a number: it is a point of a gradient, not false",
        ),
        (HEAD + "parameters:\n  t: .nan", "r.yaml:5: parameters.t must be a finite number"),
        (HEAD + "parameters:\n  t:\n  - {filter: '', value: 1}", "r.yaml:6: parameters.t[0].filter is empty"),
        (
            "merge_method: p\nslices:\n- sources:\n  - {model: a, layer_range: [4, 4]}",
            "r.yaml:4: slices[0].sources[0].layer_range is [4, 4): it must begin at 0 or "
            "later and hold at least one layer",
        ),
        (
            "merge_method: p\nslices:\n- sources:\n  - {model: a, layer_range: [0, 4.5]}",
            "r.yaml:4: slices[0].sources[0].layer_range must be two whole numbers [first, end), not [0, 4.5]",
        ),
        (
            "merge_method: p\nslices:\n- sources:\n"
            "  - {model: a, layer_range: [0, 4]}\n  - {model: b, layer_range: [0, 5]}",
            "r.yaml:5: slices[0].sources[1].layer_range has 5 layers, the first source of the slice has 4",
        ),
        (
            "merge_method: p\nslices:\n- sources: [{model: a, layer_range: [0, 4]}]\n  residual_weight: [1]",
            "r.yaml:4: slices[0].residual_weight must be a number, not a list",
        ),
        (
            "base_model: a\ngate_mode: hidden\nexperts:\n- {source_model: b, positive_prompts: [x]}",
            "r.yaml:3: 'experts' is for mergekit-moe: this recipe builds a mixture of experts from dense models, "
            "which YeAM does not",
        ),
        (
            "genome:\n  models: [a, b]\n  merge_method: ties",
            "r.yaml:1: 'genome' is for mergekit-evolve: this recipe searches for the parameters of a merge",
        ),
        (
            "merge_method: p\nmodules:\n  text:\n    paramters: {}",
            "r.yaml:4: unknown key 'paramters' in modules.text (did you mean 'parameters'?)",
        ),
        (
            "merge_method: p\nmodules:\n  text: {}",
            "r.yaml:3: modules.text must have exactly one of models, slices, and has none",
        ),
        (
            "merge_method: a\nname: b\nmerge_method: c",
            "r.yaml:3: duplicate key 'merge_method' at the top level, first given in line 1",
        ),
        (
            HEAD + "    parameters: {a: 1, a: 2}",
            "r.yaml:4: duplicate key 'a' in models[0].parameters, first given in line 4",
        ),
        (
            HEAD + "name: !!python/object/apply:os.getcwd []",
            "r.yaml:4: name has the YAML tag !!python/object/apply:os.getcwd, which a recipe cannot use",
        ),
        (HEAD + "? [a]\n: b", "r.yaml:4: the recipe has a key that is not text"),
        (
            "merge_method: linear\nmodels: [\n",
            "r.yaml:3: not valid YAML while parsing a flow node: expected the node content, but found '<stream end>'",
        ),
        (
            "a: 1\n\tb: 2",
            "r.yaml:2: not valid YAML while scanning for the next token: found character "
            "'\\t' that cannot start any token",
        ),
        ("a: 1\nb: \x07", "r.yaml:2: the character '\\x07' is not allowed in YAML"),
        (
            HEAD + "---\nmerge_method: slerp\nmodels: [{model: lab/b}]",
            "r.yaml:5: a second document without a `name:`; the first is at r.yaml:1",
        ),
        ("# nothing\n", "r.yaml: the recipe is empty"),
        ("- a\n", "r.yaml:1: a recipe is a mapping of keys to values, not a list"),
        ("a: &x [*x]", "r.yaml:1: this anchor contains an alias of itself"),
        ("a: " + "[" * 5000, "r.yaml: nested too deeply"),
        ('a: "\\UFFFFFFFF"', "r.yaml: an escape names a character that does not exist"),
    ],
)
def test_each_error_names_its_line(text: str, expected: str) -> None:
    assert problems(text) == expected.split("|")


def test_all_problems_at_once_in_the_order_of_the_file() -> None:
    text = (
        "merge_method: linear\nmath: no\nmodels:\n- {model: a, wieght: 1}\n- {model: b, parameters: {w: []}}\ndtyp: x"
    )
    lines = problems(text)
    assert [line.split(": ")[0] for line in lines] == ["r.yaml:2", "r.yaml:4", "r.yaml:5", "r.yaml:6"]


def test_alias_bomb_is_refused_before_it_expands() -> None:
    levels = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12))
    assert problems(f"a0: &a0 x\n{levels}") == [
        "r.yaml: 1.23e+11 values once its aliases are expanded, more than 1,000,000"
    ]


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "..", "a/b", r'"x\ty"', "ä" * 128])
def test_a_name_is_no_path(name: str) -> None:
    with pytest.raises(ConfigError, match=r"r.yaml:4: name must be a plain name on one line") as caught:
        parse_recipe(HEAD + f"name: {name}", "r.yaml")
    assert caught.value.remedy == "put a path into `output:`"


def test_a_name_is_that_of_a_folder_here() -> None:
    assert output_folder(parse_recipe(HEAD + 'name: "~"', "r.yaml"), None) == Path.cwd() / "~"


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "no such file"), (b"a: 1\nb: \xff\n", ":2: is not UTF-8 text"), (b"", "the recipe is empty")],
)
def test_unreadable_files(tmp_path: Path, content: bytes | None, expected: str) -> None:
    path = tmp_path / "r.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=expected) as caught:
        load_recipe(path)
    assert str(path) in caught.value.message and caught.value.remedy
    with pytest.raises(ConfigError, match="is a folder"):
        load_recipe(tmp_path)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("paramters.x=1", "--set paramters.x=1: unknown key 'paramters' at the top level (did you mean 'parameters'?)"),
        (
            "math=exat",
            "--set math=exat: math must be one of fp32, exact, not the string 'exat' (did you mean 'exact'?)",
        ),
        ("models.3.model=a", "--set models.3.model=a: models is a list, and '3' is none of its items"),
        ("models.x=a", "--set models.x=a: models is a list, and 'x' is none of its items"),
        ("dtype.x=1", "--set dtype.x=1: dtype is the string 'float16' and holds no 'x'"),
        ("a..b=1", "--set a..b=1: the key 'a..b' has an empty part"),
        ("models", "--set models: not of the form KEY=VALUE"),
        ("=1", "--set =1: not of the form KEY=VALUE"),
        (
            "name=[",
            "--set name=[:1: not valid YAML while parsing a flow node: expected the node "
            "content, but found '<stream end>'",
        ),
    ],
)
def test_wrong_overrides_are_named(override: str, expected: str) -> None:
    assert problems(TIES, overrides=[override]) == [expected]
