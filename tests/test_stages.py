"""Recipes of several stages: the same bytes as stage by stage by hand, however an intermediate gets from one to the next."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from conftest import save_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner
from unfinished import Stop, stop_after

import yeam
import yeam.engine.run
import yeam.engine.stages
import yeam.planning.stages
from yeam.checkpoint.safetensors import SafetensorsCheckpoint
from yeam.cli.app import app
from yeam.compiled import Array
from yeam.engine.run import Progress
from yeam.errors import CheckpointError, UserError, YeamError

Recipe = dict[str, Any]


def linear(*models: object, **keys: Any) -> Recipe:
    """A linear merge with unequal weights."""
    entries = [{"model": str(model), "parameters": {"weight": 1 + 0.3 * k}} for k, model in enumerate(models)]
    return {"merge_method": "linear", "models": entries, **keys}


def on_base(method: str, base: object, *models: object, **keys: Any) -> Recipe:
    entries = [{"model": str(model)} for model in models]
    return {"merge_method": method, "base_model": str(base), "models": entries, **keys}


def by_hand(stages: list[Recipe], folder: Path) -> Path:
    """Every stage merged by itself, and its folder named in the others."""

    def placed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: placed(item) for key, item in value.items()}
        if isinstance(value, list):
            return [placed(item) for item in value]
        return str(folder / value) if value in names else value

    names = [stage["name"] for stage in stages if "name" in stage]
    for stage in stages:
        plain = {key: value for key, value in stage.items() if key != "name"}
        yeam.merge(placed(plain), folder / stage.get("name", "result"))
    return folder / "result"


def contents(folder: Path) -> dict[str, bytes]:
    """The files that make the model; card, recipe and report name what they are made of."""
    others = ("README.md", "yeam_config.yaml", "yeam_report.json")
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in others
    }


def in_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every intermediate go to a folder."""
    monkeypatch.setattr(yeam.planning.stages, "is_elementwise", lambda job: False)


@pytest.fixture
def models(llama: Callable[..., Path], tmp_path: Path) -> dict[str, Path]:
    """Three models, b with a tokenizer config of its own."""
    made = {
        name: llama(name, hidden=24, vocab=70, dtype=dtype, shards=shards)
        for name, dtype, shards in (("a", torch.float32, 1), ("b", torch.bfloat16, 3), ("c", torch.float16, 1))
    }
    (made["a"] / "generation_config.json").write_text('{"max_new_tokens": 7}')
    return made


def diamond(a: object, b: object, c: object, last: Recipe) -> list[Recipe]:
    return [
        linear(a, b, name="s0", dtype="bfloat16"),
        on_base("task_arithmetic", "s0", a, c, name="s1", parameters={"weight": 0.7}, out_dtype="float16"),
        on_base("nearswap", a, "s0", name="s2", parameters={"t": 0.2}, math="exact", dtype="bfloat16"),
        last,
    ]


LAST = {
    "streamed": linear("s1", "s2", "s0"),
    "folders": on_base("slerp", "s0", "s1", parameters={"t": [0.2, 0.6]}, out_dtype="float32", models=[
        {"model": "s1"}, {"model": "s0"}]),
    "exact": linear("s2", "s1", math="exact", dtype="float16"),
}  # fmt: skip


@pytest.mark.parametrize("last", LAST)
def test_stages_give_the_bytes_of_merges_by_hand(
    last: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(yeam.engine.stages, "STREAM_TILE", 96)  # tiles of a few rows, so that their edges are many
    monkeypatch.setattr(yeam.engine.stages, "MEMORY", 400)
    monkeypatch.setattr("yeam.engine.budget.CPU_TILE", 320)
    stages = diamond(models["a"], models["b"], models["c"], LAST[last])
    if last == "folders":  # a stage that nothing uses is an error
        del stages[2]
    report = yeam.merge(stages[::-1], tmp_path / "out")  # in any order
    assert {stage["name"]: stage["streamed"] for stage in report.stages} == {
        stage["name"]: last != "folders" for stage in stages[:-1]
    }
    assert report.models == [str(models[name]) for name in "abc"]
    assert not (tmp_path / "out.partial").exists()
    expected = contents(by_hand(stages, tmp_path / "hand"))
    assert contents(tmp_path / "out") == expected and "generation_config.json" in expected
    in_folders(monkeypatch)
    other = yeam.merge(stages, tmp_path / "other")
    assert not any(stage["streamed"] for stage in other.stages) and contents(tmp_path / "other") == expected
    model, problems = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not problems["missing_keys"] and not problems["unexpected_keys"]
    assert model.generate(torch.tensor([[3, 4]]), max_new_tokens=3, do_sample=False).shape == (1, 5)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    tile=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    order=st.permutations(["linear", "ram", "ema"]),
)
def test_any_shape_in_any_tiles(
    shape: list[int], tile: int, dtype: torch.dtype, order: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(tmp_path)
    torch.manual_seed(sum(shape))
    for name in "abc":
        save_model(tmp_path / name, {"x": torch.randn(shape).to(dtype), "n": torch.arange(5)})
    a, b, c = (str(tmp_path / name) for name in "abc")
    kinds = {
        "linear": lambda *models: linear(*models),
        "ram": lambda *models: on_base("ram", *models),
        "ema": lambda *models: {**linear(*models), "merge_method": "ema", "models": [{"model": m} for m in models]},
    }
    stages = [
        {**kinds[order[0]](a, b, c), "name": "one"},
        {**kinds[order[1]]("one", b, a), "name": "two"},
        kinds[order[2]]("one", "two", c),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(yeam.engine.stages, "STREAM_TILE", tile)
        patch.setattr(yeam.engine.stages, "MEMORY", 2 * tile)
        report = yeam.merge(stages, tmp_path / "streamed")
        assert all(stage["streamed"] for stage in report.stages)
    with monkeypatch.context() as patch:
        in_folders(patch)
        yeam.merge(stages, tmp_path / "folders")
    assert contents(tmp_path / "streamed") == contents(tmp_path / "folders")


def test_a_shared_stage_is_computed_once(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elements: dict[str, int] = {}
    read_into = SafetensorsCheckpoint.read_into

    def counted(self: SafetensorsCheckpoint, name: str, start: int, stop: int, place: Array) -> bool:
        elements[self.folder.name] = elements.get(self.folder.name, 0) + stop - start
        return read_into(self, name, start, stop, place)

    monkeypatch.setattr(SafetensorsCheckpoint, "read_into", counted)
    a, b, c = models.values()
    recipe = [linear(a, b, name="s0"), linear("s0", c, name="s1"), linear("s0", c, name="s2"), linear("s1", "s2", "s0")]
    report = yeam.merge(recipe, tmp_path / "out")
    size = report.totals["parameters"]
    assert elements == {"a": size, "b": size, "c": 2 * size}


def test_a_killed_run_continues_in_its_stages(models: dict[str, Path], tmp_path: Path) -> None:
    a, b, c = models.values()
    stages = [
        on_base("slerp", a, b, name="one", parameters={"t": 0.5}),
        on_base("ties", a, "one", c, name="two", parameters={"weight": 1, "density": 0.5}),
        on_base("slerp", "one", "two", parameters={"t": 0.25}),
    ]
    yeam.merge(stages, tmp_path / "whole")

    for limit in (5, 30, 50):
        with pytest.raises(Stop):
            yeam.merge(stages, tmp_path / "out", progress=stop_after(limit))
    folders = list((tmp_path / "out.partial" / "stages").iterdir())
    assert len(folders) == 2 and not (tmp_path / "out").exists()
    events: list[Progress] = []
    report = yeam.merge(stages, tmp_path / "out", progress=events.append)
    assert (
        50 <= report.resumed == 63 - len(events)
    )  # the lanes may have finished before the listener ended the last run
    assert all(event.total_tensors == 63 for event in events) and [event.tensors for event in events[-1:]] in ([63], [])
    assert all(event.nbytes == event.total_bytes for event in events[-1:])
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_a_changed_recipe_keeps_the_stages_that_it_still_has(models: dict[str, Path], tmp_path: Path) -> None:
    a, b, c = models.values()
    stages = [
        on_base("slerp", a, b, name="one", parameters={"t": 0.5}),
        on_base("slerp", a, c, name="two", parameters={"t": 0.5}),
        on_base("slerp", "one", "two", parameters={"t": 0.25}),
    ]

    def stop(event: Progress) -> None:
        if event.tensors > 25:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        yeam.merge(stages, tmp_path / "out", progress=stop)
    report = yeam.merge(stages, tmp_path / "out", overrides=["two.parameters.t=0.6", "parameters.t=0.3"])
    assert report.resumed == 21  # all of the first stage
    stages[1]["parameters"]["t"], stages[2]["parameters"]["t"] = 0.6, 0.3
    yeam.merge(stages, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_adapters_tokenizers_and_plugins_may_name_a_stage(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig, get_peft_model

    a, b, c = models.values()
    (b / "tokenizer_config.json").write_text('{"model_max_length": 11}')
    (b / "vocab.json").write_text(json.dumps({f"t{i}": i for i in range(70)}))
    adapted = get_peft_model(
        tf.AutoModelForCausalLM.from_pretrained(a), LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    )
    torch.nn.init.normal_(adapted.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    adapted.save_pretrained(tmp_path / "lora")

    @yeam.plugin(f"shuffle_{tmp_path.name}")
    def same(plan: yeam.Plan) -> yeam.Plan:
        return plan

    stages = [
        linear(b, a, name="one", out_dtype="float32"),
        linear(f"one+{tmp_path / 'lora'}", c, "one"),
    ]
    report = yeam.merge(stages, tmp_path / "out")
    assert report.stages[0]["streamed"]
    changes: list[Recipe] = [{"plugins": [f"shuffle_{tmp_path.name}"]}, {}]
    for change in changes:
        if not change:
            in_folders(monkeypatch)
        report = yeam.merge([stages[0], {**stages[1], **change}], tmp_path / "other", overwrite=True)
        assert not report.stages[0]["streamed"]  # a plugin may look at more than an element
        assert contents(tmp_path / "other") == contents(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {"model_max_length": 11}


def test_faults_in_what_passes_through_memory_are_named(
    llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = torch.randn(8, 16)
    broken[3, 5] = torch.nan
    a, b = llama("a"), llama("b", change={"model.layers.1.self_attn.v_proj.weight": broken})
    loud = llama("loud", change={"model.norm.weight": torch.full((16,), 1e5)})
    stages = [linear(a, b, name="one"), linear("one", a)]
    with pytest.raises(CheckpointError, match=rf"{b}: model.layers.1.self_attn.v_proj.weight holds nan at element 53"):
        yeam.merge(stages, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = yeam.merge(stages, tmp_path / "out", allow_nan=True)
    assert report.stages[0]["streamed"]
    stages = [linear(loud, name="one", out_dtype="float16"), linear("one", a, out_dtype="float32")]
    for _ in range(2):
        with pytest.raises(UserError, match=r"model.norm.weight: a merged value of 100000 overflows float16"):
            yeam.merge(stages, tmp_path / "loud_out")
        in_folders(monkeypatch)


def test_memory_and_disk_are_checked_before_any_stage_runs(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, c = models.values()
    stages = [
        on_base("slerp", a, b, name="one", parameters={"t": 0.5}),
        on_base("slerp", "one", c, parameters={"t": 0.5}),
    ]
    events: list[Progress] = []
    with pytest.raises(UserError, match="MiB allowed"):
        yeam.merge(stages, tmp_path / "out", memory=1, progress=events.append)
    usage = shutil.disk_usage(tmp_path)
    size = sum(shard.nbytes for shard in yeam.plan(stages).shards)
    frees: dict[str, Callable[[str], int]] = {
        "for intermediates, ": lambda path: size + 9,  # enough for the result alone
        "not enough disk space": lambda path: 9 if "stages" in path else usage.free,  # gone when the result is reserved
    }
    for said, free in frees.items():
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free(str(path))))
        with pytest.raises(YeamError, match=said):
            yeam.merge(stages, tmp_path / "out", progress=events.append)
        assert not events and not (tmp_path / "out.partial").exists()


def test_plan_and_report_show_the_stages(models: dict[str, Path], tmp_path: Path) -> None:
    a, b, c = models.values()
    path = tmp_path / "two.yaml"
    stages = [
        linear(a, b, name="one [x]"),
        linear("one [x]", c, name="two"),
        on_base("slerp", "two", c, parameters={"t": 0.5}),
    ]
    text = "# kept as it is\n" + "---\n".join(json.dumps(stage) + "\n" for stage in stages)
    path.write_text(text)
    shown = CliRunner().invoke(app, ["plan", str(path)])
    assert shown.exit_code == 0, shown.output
    flat = " ".join(shown.output.split())
    assert "stage one [x]: linear, 2 models; passes through memory" in flat
    assert "stage two: linear, 2 models; goes to a temporary folder beside the output" in flat
    planned = json.loads(CliRunner().invoke(app, ["plan", str(path), "--json"]).stdout)
    assert planned["stages"].keys() == {"one [x]", "two"}
    yeam.merge(path, tmp_path / "out", like="mergekit")
    assert text not in (tmp_path / "out" / "yeam_config.yaml").read_text()  # it was changed
    yeam.merge(path, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "yeam_config.yaml").read_text() == text
    card = (tmp_path / "out" / "README.md").read_text()
    assert "A merge of 3 models made with" in card and "in 3 stages, methods `linear`, `slerp`" in card
    assert "### Stage `one [x]`, method `linear`" in card and "| stage `two` |" in card
    written = json.loads((tmp_path / "out" / "yeam_report.json").read_text())
    assert [stage["streamed"] for stage in written["stages"]] == [True, False]
