"""Averages over training checkpoints: against torch's own averaging, by wildcard, in the order of the steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import llama_config, llama_tensors, save_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import yeam
from yeam.checkpoint.safetensors import SafetensorsCheckpoint
from yeam.errors import ConfigError
from yeam.methods.averaging import ema, hma, in_order, swa
from yeam.recipe import load_recipe
from yeam.recipe.globs import step_in_name

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[int, Tensors]]:
    """`runs(9, 10, 100)` writes checkpoints of a training run as a trainer leaves them, here in runs/; returns their tensors."""
    monkeypatch.chdir(tmp_path)

    def write(*steps: int, form: str = "checkpoint-{}", layers: int = 2) -> dict[int, Tensors]:
        made = {}
        for step in steps:
            folder = tmp_path / "runs" / form.format(step)
            made[step] = llama_tensors(step, layers=layers)
            save_model(folder, made[step], llama_config(layers=layers))
            for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
                (folder / name).write_bytes(b"not for us")
            (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        (tmp_path / "runs" / "checkpoint-log.txt").write_text("no model")
        return made

    return write


def averaged(tensors: Sequence[Tensors], **options: Any) -> Tensors:
    """What torch.optim.swa_utils makes of the same checkpoints, one after the other."""

    class Model(torch.nn.Module):
        def __init__(self, values: Tensors) -> None:
            super().__init__()
            self.values = torch.nn.ParameterList(values[name].clone() for name in sorted(values))

    mean = torch.optim.swa_utils.AveragedModel(Model(tensors[0]), **options)
    for values in tensors:
        mean.update_parameters(Model(values))
    return dict(zip(sorted(tensors[0]), [value.detach() for value in mean.module.values]))


def close(out: Path, expected: Tensors) -> None:
    merged = load_file(out / "model.safetensors")
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=2e-6, atol=2e-6)


def test_a_wildcard_gives_the_checkpoints_in_the_order_of_their_steps(
    runs: Callable[..., dict[int, Tensors]], tmp_path: Path
) -> None:
    made = runs(1000, 9, 100, 20)
    in_time = [made[step] for step in (9, 20, 100, 1000)]
    recipe = {"merge_method": "ema", "models": [{"model": "runs/checkpoint-*"}]}
    options = {"decay": 0.7, "bias_correction": False}
    report = yeam.merge({**recipe, "parameters": options}, "ema")
    assert report.models == [f"runs/checkpoint-{step}" for step in (9, 20, 100, 1000)]
    close(tmp_path / "ema", averaged(in_time, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.7)))
    yeam.merge({**recipe, "merge_method": "swa"}, "swa")
    close(tmp_path / "swa", averaged(in_time))
    # a list in any order is the same: the steps decide
    listed = [{"model": f"runs/checkpoint-{step}"} for step in (100, 9, 1000, 20)]
    yeam.merge({**recipe, "models": listed, "parameters": options}, "listed")
    ours, theirs = (load_file(tmp_path / out / "model.safetensors") for out in ("ema", "listed"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_start_and_every_choose_and_the_others_are_not_read(
    runs: Callable[..., dict[int, Tensors]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = runs(*range(100, 1100, 100))
    touched = set()
    read_into = SafetensorsCheckpoint.read_into

    def watched(self: SafetensorsCheckpoint, *arguments: Any) -> bool:
        touched.add(self.folder.name)
        return read_into(self, *arguments)

    monkeypatch.setattr(SafetensorsCheckpoint, "read_into", watched)
    recipe = {
        "merge_method": "swa",
        "models": [{"model": "runs/checkpoint-*"}],
        "parameters": {"start": 400, "every": 300},
    }
    report = yeam.merge(recipe, "out")
    assert touched == {"checkpoint-400", "checkpoint-700", "checkpoint-1000"}
    close(tmp_path / "out", averaged([made[step] for step in (400, 700, 1000)]))
    assert "runs/checkpoint-100 and 6 more: not read, method swa takes 3 of 10 models" in report.notes
    with pytest.raises(ConfigError, match=r"no checkpoint has a step from 5000 on: the steps are 100, 200, 300.* …"):
        yeam.plan(recipe, overrides=["parameters.start=5000", "parameters.every=1"])


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.floats(0, 0.99), st.integers(0, 20), st.integers(1, 4))
def test_the_weights_are_those_of_the_recursions(steps: list[int], decay: float, start: int, every: int) -> None:
    values = torch.linspace(-1, 2, len(steps), dtype=torch.float64)[:, None]
    order = sorted((step, k) for k, step in enumerate(steps) if step >= start and (step - start) % every == 0)
    common = {"start": start, "every": every, "step": tuple(steps)}
    if not order:
        with pytest.raises(ConfigError, match="no checkpoint has a step"):
            in_order(len(steps), common)
        return
    chosen = [float(values[k]) for _, k in order]
    corrected, plain = 0.0, chosen[0]
    for value in chosen:
        corrected = decay * corrected + (1 - decay) * value
    for value in chosen[1:]:
        plain = (1 - decay) * value + decay * plain
    wanted = {True: corrected / (1 - decay ** len(chosen)), False: plain}
    for correction, expected in wanted.items():
        found = ema(values.clone(), decay=decay, bias_correction=correction, **common)
        assert float(found) == pytest.approx(expected, abs=1e-12)
    assert float(swa(values.clone(), **common)) == pytest.approx(sum(chosen) / len(chosen), abs=1e-12)
    if decay < 1:
        assert float(hma(values.clone(), ratio=1 - decay, **common)) == pytest.approx(plain, abs=1e-12)


def test_hma_interpolates_each_layer_by_its_own_ratio(runs: Callable[..., dict[int, Tensors]], tmp_path: Path) -> None:
    made = runs(0, 500, layers=3)
    yeam.merge(
        {
            "merge_method": "hma",
            "models": [{"model": "runs/checkpoint-*"}],
            "parameters": {"ratio": [{"filter": "lm_head", "value": 1.0}, {"value": [0.2, 0.5, 0.9]}]},
        },
        "out",
    )
    ratios = {"lm_head": 1.0, "layers.1.": 0.5, "layers.2.": 0.9}
    expected = {}
    for name, before in made[0].items():
        ratio = next((value for part, value in ratios.items() if part in name), 0.2)
        expected[name] = before + ratio * (made[500][name] - before)
    close(tmp_path / "out", expected)


def test_steps_come_from_names_states_revisions_or_places(
    runs: Callable[..., dict[int, Tensors]], tmp_path: Path
) -> None:
    names = {
        "checkpoint-500": 500, "step_1000": 1000, "global_step20": 20, "tinyllama-1.1b-step-50K-105b": 50_000,
        "stage1-step1000-tokens4B": 1000, "epoch3-step7": 7, "iter-12": 12, "model-final": None, "v2": None,
        "timestep": None, "footsteps9": None,
    }  # fmt: skip
    assert {name: step_in_name(name) for name in names} == names
    made = runs(3, 200, form="state-{}-of-run")  # only trainer_state.json tells
    recipe: dict[str, Any] = {"merge_method": "ema", "models": [{"model": "runs/state-*"}], "parameters": {"decay": 0}}
    yeam.merge(recipe, "out")
    close(tmp_path / "out", made[200])
    for folder in (tmp_path / "runs").glob("state-*"):
        (folder / "trainer_state.json").unlink()
    yeam.merge(recipe, "by_place")  # natural order of the names
    close(tmp_path / "by_place", made[200])
    recipe["models"] = [{"model": "runs/state-200-of-run"}, {"model": "runs/state-3-of-run", "parameters": {"step": 5}}]
    with pytest.raises(ConfigError, match=r"1 of 2 checkpoints have a training step \(5\), the others have none"):
        yeam.plan(recipe)


def test_wildcards_keep_lines_parameters_and_the_recipe(
    runs: Callable[..., dict[int, Tensors]], tmp_path: Path
) -> None:
    runs(1, 2)
    path = tmp_path / "elsewhere" / "r.yaml"
    path.parent.mkdir()
    text = (
        "merge_method: linear\nmodels:\n  - model: runs/checkpoint-1\n    parameters: {weight: 1}\n"
        "  - model: runs/checkpoint-?\n    parameters: {weight: 2, nope: 1}\n"
    )
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        yeam.plan(path)
    assert error.value.message.startswith(f"{path}:6: method 'linear' has no parameter 'nope'")
    loaded = load_recipe(path, ["models.1.parameters={weight: 3}"])
    assert loaded.recipe.models is not None
    assert [entry.parameters["weight"] for entry in loaded.recipe.models] == [1, 3, 3]
    assert "checkpoint-?" in loaded.text and load_recipe(path).text == text
    (tmp_path / "elsewhere" / "runs").symlink_to(tmp_path / "runs")
    (tmp_path / "runs").rename(tmp_path / "moved")
    (tmp_path / "elsewhere" / "runs").unlink()
    (tmp_path / "moved").rename(tmp_path / "elsewhere" / "runs")  # beside the recipe, not here
    models = load_recipe(path, ["models.1.parameters={}"]).recipe.models
    assert models is not None and [entry.model.label for entry in models] == [
        f"elsewhere/runs/checkpoint-{step}" for step in (1, 1, 2)
    ]
    path.write_text(text.replace("checkpoint-?", "chkpt-*"))
    with pytest.raises(ConfigError) as error:
        yeam.plan(path)
    assert f"{path}:5: models[1].model has the pattern 'runs/chkpt-*', which no folder matches" in error.value.message


def test_a_wildcard_may_stand_for_adapters(tmp_path: Path) -> None:
    for step in (20, 3):
        (tmp_path / f"run/checkpoint-{step}").mkdir(parents=True)
    (tmp_path / "base").mkdir()
    loaded = load_recipe({"merge_method": "swa", "models": [{"model": f"{tmp_path}/base+{tmp_path}/run/checkpoint-*"}]})
    assert loaded.recipe.models is not None
    assert [entry.model.lora.path for entry in loaded.recipe.models if entry.model.lora] == [
        str(tmp_path / f"run/checkpoint-{step}") for step in (3, 20)
    ]
