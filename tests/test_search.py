"""`yeam search`: reported losses against merged folders, what is computed again and what is not, kills, processes, and bad input."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
import transformers as tf
import yaml
from conftest import REPOSITORY
from typer.testing import CliRunner

import yeam
from yeam.cli.app import app
from yeam.engine import held
from yeam.errors import ConfigError, OutputError, UserError
from yeam.recipe.document import dump_yaml, read_document
from yeam.recipe.load import read_draft
from yeam.recipe.problems import Faulty
from yeam.recipe.ranges import number_in, parse_range, part_of
from yeam.searching import model as vessel
from yeam.searching.bench import Bench, Options
from yeam.searching.samplers import cmaes
from yeam.searching.space import Space
from yeam.searching.split import divided
from yeam.searching.study import Study
from yeam.searching.trial import Measured, Trial
from yeam.searching.written import filled_text

FAMILY = REPOSITORY / "examples" / "tiny-family" / "models"
WINDOW: dict[str, Any] = {"context": 64, "device": "cpu"}
RECIPE = """# a recipe
merge_method: task_arithmetic
base_model: {family}/base
models:
  - model: {family}/code
    parameters:
      weight: {{search: [0, 1.5]}} # of the code
  - model: {family}/prose
    parameters: # of the prose
      weight:
        - filter: self_attn
          value:
            search: [0, 1]
            default: 1 # all of it
        - value: [0.5, {{search: [0.1, 1], log: true}}]
dtype: float32
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.md"
    path.write_text((REPOSITORY / "examples" / "tiny-family" / "README.md").read_text()[:2000])
    return path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "open.yaml"
    path.write_text(RECIPE.format(family=FAMILY))
    return path


def losses(found: yeam.SearchResult) -> list[tuple[Any, ...]]:
    return [(t.number, t.values, t.state, t.loss, t.measured and t.measured.held_out) for t in found.trials]


@pytest.mark.parametrize(("sampler", "trials"), [("tpe", 12), ("cmaes", 10)])
def test_the_best_config_merges_to_what_was_reported(
    sampler: str, trials: int, config: Path, text: Path, tmp_path: Path
) -> None:
    parts = divided([text])
    plot = tmp_path / "search.png"
    found = yeam.search(config, text, trials=trials, sampler=sampler, plot=plot, seed=3, **WINDOW)
    assert found.best.number > 0 and found.best.loss < found.baseline.loss
    assert found.baseline.values == (0.75, 1, 0.31623)
    assert all(low <= v <= high for t in found.trials for v, (low, high) in zip(t.values, [(0, 1.5), (0, 1), (0.1, 1)]))
    assert len({t.values for t in found.trials}) == trials
    # the text is the author's, with numbers
    best = tmp_path / "open-best.yaml"
    assert found.out == best and found.recipe in best.read_text() and best.read_text().startswith("# Found by")
    a, b, c = (dump_yaml(v).split()[0] for v in found.best.values)
    lines = found.recipe.split("\n")
    for line in ("# a recipe", f"      weight: {a} # of the code", f"          value: {b} # all of it"):
        assert line in lines
    assert f"        - value: [0.5, {c}]" in lines
    # merged into a folder and evaluated, each part gives the loss that the search saw
    yeam.merge(best, tmp_path / "out")
    for part, measured in ((parts.tuning, found.best.measured.tuning), (parts.held_out, found.best.measured.held_out)):
        (tmp_path / "part.txt").write_text("".join(document.text for document in part))
        scores = yeam.evaluate(tmp_path / "out", tmp_path / "part.txt", stride=64, **WINDOW).scores
        assert scores.nll_per_token == pytest.approx(measured.value, abs=1e-6)
        assert scores.nll_per_token_stderr == pytest.approx(measured.stderr, rel=1e-4)
    gain = found.baseline.measured.held_out.value - found.best.measured.held_out.value
    assert found.gain.value == pytest.approx(gain, abs=1e-6)
    assert 0 < found.gain.stderr < found.best.measured.held_out.stderr
    assert plot.read_bytes().startswith(b"\x89PNG")
    # a rerun has nothing to do, and gives the same
    again = yeam.search(config, text, trials=trials, sampler=sampler, seed=3, **WINDOW)
    assert losses(again) == losses(found) and again.recipe == found.recipe and again.gain == found.gain


def test_kill_and_resume(config: Path, text: Path, tmp_path: Path) -> None:
    """A search that was killed in the middle of a trial goes on as if nothing had happened."""
    storage = tmp_path / "killed.db"
    options = {"text": text, "trials": 500, "context": 64, "device": "cpu", "storage": storage}
    words = ["search", config, *(word for name, value in options.items() for word in (f"--{name}", value))]
    child = forked.forked(words, tmp_path / "log")
    try:
        deadline = time.monotonic() + 300
        while not (storage.exists() and _states(storage).count("done") >= 2 and "running" in _states(storage)):
            assert child.exitcode is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(OutputError, match="another search"):
            yeam.search(config, text, trials=2, storage=storage, **WINDOW)
    finally:
        child.kill()
        child.join()
    states = _states(storage)
    assert states.count("running") == 1 and not (tmp_path / "open-best.yaml").exists()
    count = len(states) + 1
    resumed = yeam.search(config, text, trials=count, storage=storage, **WINDOW)
    straight = yeam.search(config, text, trials=count, out=tmp_path / "straight.yaml", **WINDOW)
    assert [t.values for t in resumed.trials] == [t.values for t in straight.trials]
    assert [t.loss for t in resumed.trials] == pytest.approx([t.loss for t in straight.trials], abs=1e-9)
    assert resumed.best.number == straight.best.number and not list(tmp_path.glob("*-lock"))


def _states(storage: Path) -> list[str]:
    try:
        with closing(Study(storage)) as study:
            return [trial.state for trial in study.trials()]
    except OutputError:  # not there yet
        return []


def test_processes_share_the_trials(config: Path, text: Path, tmp_path: Path) -> None:
    """As `accelerate launch` starts them; CMA-ES makes them wait for each other's generations."""
    words = ["search", config, "--text", text, "--trials", 10, "--sampler", "cmaes", "--context", 64, "--json"]
    children = forked.together([*words, "--device", "cpu"], 2, tmp_path / "log", LOCAL_WORLD_SIZE="2")
    for child in children:
        child.join(300)
    first, second = ((tmp_path / f"log-{n}").read_text() for n in range(2))
    assert [child.exitcode for child in children] == [0, 0], (first, second)
    assert "{" not in second
    trials = json.loads(next(line for line in first.splitlines() if line.startswith("{")))["trials"]
    assert [(t["number"], t["state"]) for t in trials] == [(n, "done") for n in range(10)]
    # whichever process carried them out, the proposals are those of one process
    alone = yeam.search(config, text, trials=10, sampler="cmaes", out=tmp_path / "alone.yaml", **WINDOW)
    assert [tuple(t["values"].values()) for t in trials] == [t.values for t in alone.trials]
    assert yaml.safe_load((tmp_path / "open-best.yaml").read_text())


class Counted:
    """Counts the tensors that are computed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        done = held.Held.done

        def note(this: held.Held, made: Sequence[Any]) -> None:
            self.names.extend(each.job.name for each in made)
            done(this, made)

        monkeypatch.setattr(held.Held, "done", note)

    def take(self) -> list[str]:
        names, self.names = self.names, []
        return names


def scored(recipe: Mapping[str, Any] | Path, text: Path, tmp_path: Path) -> float:
    """The tuning loss of a recipe by way of a folder."""
    out = tmp_path / "scored"
    yeam.merge(recipe, out, overwrite=True)
    (tmp_path / "tuning.txt").write_text("".join(d.text for d in divided([text]).tuning))
    return yeam.evaluate(out, tmp_path / "tuning.txt", stride=64, **WINDOW).nll_per_token


def test_only_what_changes_is_computed(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where an intermediate that is no elementwise function is kept in memory, and after a candidate that fails on the way."""
    documents = [
        {
            "name": "soup",
            "merge_method": "slerp",
            "base_model": f"{FAMILY}/base",
            "models": [{"model": f"{FAMILY}/code"}],
            "parameters": {"t": [{"filter": "mlp", "value": {"search": [0, 1]}}, {"value": 0.5}]},
            "dtype": "float16",
        },
        {
            "merge_method": "linear",
            "models": [{"model": "soup"}, {"model": f"{FAMILY}/prose"}],
            "parameters": {"weight": [{"filter": "self_attn", "value": {"search": [0, 1e9], "default": 1}}, {"value": 1.0}],
                           "normalize": False},
            "out_dtype": "float16",
        },
    ]  # fmt: skip
    space, counted = Space(read_draft(documents)), Counted(monkeypatch)
    with closing(Bench(divided([text]), Options(context=64, device="cpu"))) as bench:
        plan = bench.look(space.filled(space.defaults).checked())
        assert len(plan.stages) == 1 and not plan.stages[0].streamed

        def measure(*values: float) -> float:
            return bench.measure(space.filled(values).checked())[0].tuning.value

        both = [job.name for job in plan.jobs]
        first = measure(0.5, 1)
        assert sorted(counted.take()) == sorted([*both, *both])
        measure(0.5, 0.5)
        assert sorted(counted.take()) == sorted(name for name in both if "self_attn" in name)
        changed = measure(0.25, 0.5)
        names = counted.take()  # of the intermediate what has changed, and all that is made from it
        assert sorted(names) == sorted([*both, *(name for name in both if "mlp" in name)])
        with pytest.raises(yeam.YeamError, match="overflows"):
            measure(0.25, 1e9)
        assert measure(0.25, 0.5) == changed
        assert measure(0.5, 1) == first
    data = [document.data for document in space.filled((0.25, 0.5)).documents]
    assert scored(data, text, tmp_path) == pytest.approx(changed, abs=1e-6)


def test_a_model_that_transformers_rearranges(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts are stacked while loading: then every candidate goes through transformers, and unchanged tensors are still kept."""
    folders = []
    for seed in range(2):
        torch.manual_seed(seed)
        shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                 "num_key_value_heads": 1, "num_local_experts": 4, "vocab_size": 2048}  # fmt: skip
        model = tf.MixtralForCausalLM(tf.MixtralConfig(**shape, max_position_embeddings=128))
        model.save_pretrained(tmp_path / str(seed))
        tf.AutoTokenizer.from_pretrained(FAMILY / "base").save_pretrained(tmp_path / str(seed))
        folders.append(str(tmp_path / str(seed)))
    recipe = {
        "merge_method": "linear",
        "models": [{"model": folders[0], "parameters": {"weight": [{"filter": "experts", "value": {"search": [0.1, 2]}}, {"value": 1}]}},
                   {"model": folders[1], "parameters": {"weight": 1}}],
    }  # fmt: skip
    made, counted = [], Counted(monkeypatch)
    through_transformers = vessel._made
    monkeypatch.setattr(vessel, "_made", lambda *words: made.append(words[0].label) or through_transformers(*words))
    found = yeam.search(recipe, text, trials=2, out=tmp_path / "best.yaml", **WINDOW)
    names = [job.name for job in yeam.plan(found.out).jobs]
    assert made == ["merge", "merge"]
    assert sorted(counted.take()) == sorted([*names, *(name for name in names if "experts" in name)])
    assert scored(found.out, text, tmp_path) == pytest.approx(found.best.loss, abs=1e-6)


def test_candidates_without_a_loss(text: Path, tmp_path: Path) -> None:
    """Weights of zero make no numbers: such a trial is noted, and the search goes on; equal trials are carried out once."""
    weight = {"search": [0, 1], "choice": True, "default": 1}
    recipe = {
        "merge_method": "linear",
        "models": [{"model": f"{FAMILY}/{name}", "parameters": {"weight": weight}} for name in ("code", "prose")],
    }  # fmt: skip
    found = yeam.search(recipe, text, trials=12, out=tmp_path / "best.yaml", **WINDOW)
    by_values = {t.values: t for t in found.trials}
    assert len(by_values) == 4 and by_values[0, 0].state == "failed" and by_values[0, 0].loss is None
    assert "NaN" in by_values[0, 0].message or "sum" in by_values[0, 0].message
    measured = {t.measured for t in found.trials if t.measured}
    assert len(measured) == 3  # seconds included
    assert found.best.values in ((1, 0), (0, 1), (1, 1)) and yeam.plan(found.out).jobs
    with pytest.raises(yeam.YeamError):  # with nothing to compare with, the search says what a merge would say
        both = json.loads(json.dumps(recipe).replace('"default": 1', '"default": 0'))
        yeam.search(both, text, trials=2, out=tmp_path / "none.yaml", **WINDOW)


def test_cma_es_finds_the_bottom() -> None:
    """A bowl in a log scale, whole numbers and a choice, from the record alone."""
    space = Space(
        read_draft(
            {
                "merge_method": "linear",
                "parameters": {
                    "a": {"search": [1e-6, 1], "log": True},
                    "b": {"search": [1, 100], "int": True},
                    "c": {"search": ["x", "y", "z"], "choice": True},
                },
            }
        )
    )

    def loss(values: tuple[Any, ...]) -> float:
        a, b, c = values
        return (np.log10(a) + 4) ** 2 + ((b - 70) / 20) ** 2 + 3.0 * "yzx".index(c)

    trials: list[Trial] = []
    while len(trials) < 90:
        np.random.rand()  # numpy's global generator plays no part
        values = cmaes(space, trials, 1) if trials else space.defaults
        mean = yeam.searching.trial.Mean(loss(values), None)
        trials.append(Trial(len(trials), values, "done", Measured(mean, mean, 0.0)))
    best = min(trials, key=lambda trial: trial.loss)
    assert best.loss < 0.1 and best.values[2] == "y"
    running = [*trials[:-1], Trial(len(trials) - 1, trials[-1].values, "running")]
    assert [t.values for t in trials[1:4]] == [cmaes(space, trials[:n], 1) for n in range(1, 4)]
    assert cmaes(space, running, 1) in (None, cmaes(space, trials, 1))


RANGES = [
    ("{search: [1, 0]}", "is inverted: 1 is more than 0"),
    ("{search: [1, 1]}", "holds nothing but 1"),
    ("{search: [0, 1], logg: true}", "unknown key 'logg' in models[0].parameters.weight (did you mean 'log'?)"),
    ("{search: [0, 1], log: true}", "with `log` all must be above 0"),
    ("{search: [0, 1.5], int: true}", "must begin and end with whole numbers"),
    ("{search: [0, 1], default: 2}", "must be a number from 0 to 1, not the number 2"),
    ("{search: 1}", "must be a list of two values or more, not the number 1"),
    ("{search: [a, b]}", "must be the least and the largest number"),
    ("{search: [a, a], choice: true}", "has 'a' a second time"),
    ("{search: [0, 1], int: 1}", "must be true or false, not the number 1"),
    ("{search: [a, b], choice: true}", "weight = 'a' is not usable"),
    ("0.5", "there is nothing to search for"),
]


@pytest.mark.parametrize(("written", "message"), RANGES)
def test_bad_ranges(written: str, message: str, config: Path, text: Path, refused: Callable[..., str]) -> None:
    lines = RECIPE.format(family=FAMILY).split("\n")[:7]
    config.write_text("\n".join([*lines[:6], f"      weight: {written}", "dtype: float32"]))
    said = refused(["search", config, "--text", text, "--context", 64], message)
    assert f"{config}:7: " in said or "nothing to search" in said
    assert [path.name for path in config.parent.iterdir()] == [config.name]


def test_ranges_elsewhere(config: Path, text: Path, refused: Callable[..., str]) -> None:
    refused(["merge", config], f"{config}:7: models[0].parameters.weight is a range and no value", "yeam search")
    config.write_text(config.read_text().replace("dtype: float32", "dtype: {search: [float32, float16], choice: true}"))
    refused(["search", config, "--text", text], f"{config}:16: dtype cannot be searched for")


def test_bad_input(config: Path, text: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    words = ["search", config, "--text", text, "--context", 64, "--trials", 1]
    short, digits = tmp_path / "short.txt", tmp_path / "digits.txt"
    short.write_text("Only a few words.")
    digits.write_text("\n" * 10 + "return self\n" * 13)  # enough characters, too few tokens
    (tmp_path / "other.db").write_text("not a database, but something that its owner needs" * 9)
    refused([*words[:3], short, *words[4:]], "characters are held out")
    refused([*words[:3], digits, *words[4:]], "too short to search on: its held-out part has")
    refused([*words, "--trials", 0], "0 trials find nothing")
    refused([*words, "--timeout", 0], "leaves no time")
    refused([*words, "--sampler", "tpee"], "unknown sampler 'tpee' (did you mean 'tpe'?)")
    refused([*words, "--out", config], "would replace the recipe itself")
    refused([*words, "--out", tmp_path / "no" / "best.yaml"], "there is no folder")
    refused([*words, "--storage", tmp_path / "other.db"], "is not the record of a search")
    refused([*words, "--plot", tmp_path / "p.html"], "as a picture, not as a page")
    refused([*words, "--set", "models.0.model=nowhere/to/be/found"], "nowhere/to/be/found")
    assert not list(tmp_path.glob("*best*")) and not list(tmp_path.glob("*-lock"))


def test_another_search(config: Path, text: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    """A record belongs to one space, one text and one set of models."""
    words = ["search", config, "--text", text, "--context", 64, "--trials", 1, "--device", "cpu"]
    first = CliRunner().invoke(app, [*map(str, words), "--timeout", "1000"])
    assert first.exit_code == 0, first.output
    assert "held-out gain 0.0000" in first.stdout and "the defaults of 1 trials with tpe" in first.stdout
    wider = "models.0.parameters.weight.search.1=3"
    refused(
        [*words, "--set", wider], 'models[0].parameters.weight was {"search": [0, 1.5]}, now it is {"search": [0, 3]}'
    )
    refused([*words, "--sampler", "cmaes"], "the sampler was tpe, now it is cmaes")
    (tmp_path / "longer.txt").write_text(text.read_text() * 2)
    refused([*words[:3], tmp_path / "longer.txt", *words[4:]], "the text was")
    # other outputs make no other search, and a record may be given up
    assert CliRunner().invoke(app, [*map(str, words), "--set", "output=elsewhere"]).exit_code == 0
    assert CliRunner().invoke(app, [*map(str, words), "--set", wider, "--no-resume"]).exit_code == 0
    (tmp_path / "open-best.db").unlink()
    refused(words, "exists, and not from this search")


def test_recipes_beside_their_models(text: Path, tmp_path: Path) -> None:
    """A path that is relative to the recipe's folder means nothing in another one."""
    (tmp_path / "here").mkdir()
    os.symlink(FAMILY / "code", tmp_path / "here" / "code-model")
    path = tmp_path / "here" / "r.yaml"
    path.write_text("merge_method: linear\nmodels: [{model: code-model, parameters: {weight: {search: [0.5, 1]}}}]\n")
    with pytest.raises(ConfigError, match="code-model would be looked for in another folder"):
        yeam.search(path, text, trials=1, out=tmp_path / "best.yaml", **WINDOW)
    found = yeam.search(path, text, trials=5, timeout=1e-3, **WINDOW)
    assert found.out == tmp_path / "here" / "r-best.yaml" and len(found.trials) == 1
    assert "stopped after 1 of 5 trials; the same command continues" in found.notes


def test_text_is_divided_within_every_path(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} line {n:02}\n" for n in range(40)))
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": f"row number {n:02}"}) + "\n" for n in range(30)))
    parts = divided([tmp_path / name for name in ("a.txt", "b.txt", "c.jsonl")])
    assert [d.text.splitlines()[0] for d in parts.held_out] == [
        "a line 36",
        "b line 36",
        *(f"row number {n}" for n in (27, 28, 29)),
    ]
    whole = parts.tuning[0].text + parts.held_out[0].text
    assert whole == (tmp_path / "a.txt").read_text()


def test_anchors_and_overrides() -> None:
    """Aliases of one range are one value, wherever it was defined; what the text cannot show is dumped."""
    text = (
        "merge_method: linear\nmodels:\n"
        "- {model: a, parameters: {weight: &w {search: [0, 1]}}} # one\n"
        "- {model: b, parameters: {weight: *w}}\n"
        "- model: c\n  parameters:\n    weight:\n      search: [0, 1] # least, most\n      # a remark\n\n# the end\n"
    )
    from yeam.recipe.load import Draft

    document = read_document(text, "r.yaml")
    space = Space(Draft((document,), text, None))
    assert [len(d.places) for d in space.dimensions] == [2, 1]
    filled = filled_text(space, (0.25, 0.75))
    assert "weight: &w 0.25}} # one" in filled and "weight: *w" in filled and "weight: 0.75 # least, most" in filled
    assert filled.endswith("# the end\n")
    assert yaml.safe_load(filled)["models"][1]["parameters"]["weight"] == 0.25
    mapping = Space(
        read_draft({"merge_method": "linear", "parameters": {"weight": {"search": [1e-7, 1], "log": True}}})
    )
    assert yeam.load_recipe is not None and "weight: 1.0e-07" in filled_text(mapping, (1e-7,)).replace(
        "1e-07", "1.0e-07"
    )


@pytest.mark.parametrize(
    "written", [{"search": [0, 0.3]}, {"search": [1e-9, 2e3], "log": True}, {"search": [1.0, 1.00001]}]
)
def test_numbers_are_short_and_inside(written: dict[str, Any]) -> None:
    found = parse_range(written)
    values = [number_in(found, n / 1000) for n in range(1001)]
    assert values == sorted(values) and len(set(values)) == 1001
    assert (values[0], values[-1]) == (found.low, found.high)
    assert max(abs(part_of(found, v) - n / 1000) for n, v in enumerate(values)) < 1e-3
    with pytest.raises(Faulty):
        parse_range({**written, "search": written["search"][::-1]})


def test_missing_packages(config: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yeam.searching.samplers.find_spec", lambda name: None if name == "optuna" else object())
    with pytest.raises(UserError, match="needs optuna, which is not installed") as caught:
        yeam.search(config, text)
    assert "yeam[search]" in caught.value.remedy and "cmaes" in caught.value.remedy
