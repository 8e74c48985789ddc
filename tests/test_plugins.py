"""Plugins that rewrite a plan, and merge methods of the user's own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Llama, environment
from plans import refuses
from safetensors.torch import load_file

import yeam
import yeam.methods.registry
from yeam import PerSource, Plan, Whole, YeamError, merge_method, plugin
from yeam.checkpoint import Checkpoint
from yeam.errors import CheckpointError, ConfigError, UserError
from yeam.methods import Inputs, Tile
from yeam.planning import Companion, Input, Job
from yeam.plugins import PluginContext

PLUGIN = '''
"""Merge what has a role; take everything else from one of the models."""
from dataclasses import replace
from yeam import plugin

@plugin("only-NUMBER")
def only(plan, *, role="attention", model=0):
    def keep(job):
        if role in job.roles:
            return job
        inputs = [source for source in job.inputs if source.model == model]
        return replace(job, method="passthrough", sources=(inputs[0],), base=None, parameters={})
    return replace(plan, jobs=tuple(keep(job) for job in plan.jobs))
'''


@plugin("test-only-attention")
def only_attention(plan: Plan, *, donor: int = 0) -> Plan:
    """Everything but attention is copied from a model."""

    def keep(job: Job) -> Job:
        if "attention" in job.roles:
            return job
        source = next(source for source in job.inputs if source.model == donor)
        return replace(job, method="copy", sources=(source,), base=None)

    return replace(plan, jobs=tuple(keep(job) for job in plan.jobs))


@plugin("test-swap")
def swap(plan: Plan, *, job: str = "model.norm.weight", drop: bool = False, **changes: Any) -> Plan:
    """Changes one job in any way, for the sake of the checks."""
    if "source" in changes:
        changes["sources"] = (Input(*changes.pop("source")),)
    changed = [replace(j, **changes) if j.name == job else j for j in plan.jobs if not (drop and j.name == job)]
    return replace(plan, jobs=tuple(changed))


@plugin("test-bad")
def bad(plan: Plan, *, how: str) -> Plan:
    if how == "nothing":
        return None  # type: ignore[return-value]
    if how == "models":
        return replace(plan, models=plan.models[:1])
    if how == "crash":
        return 1 / 0  # type: ignore[return-value]
    raise ConfigError("no good", "choose another")


@merge_method("test-mix", base="required", sources=(1, 3))
def mix(
    x_KT: torch.Tensor, base_T: torch.Tensor, *, share: PerSource[float] = (0.5,), lambda_: float = 1.0
) -> torch.Tensor:
    """base + lambda · Σ share_k · (x_k − base)."""
    return base_T + lambda_ * sum(part * (x_T - base_T) for part, x_T in zip(share, x_KT))


@merge_method("test-beside", base="required", needs=Whole)
def beside(inputs: Inputs) -> Iterator[torch.Tensor]:
    """base + (x_0 − base) · mean of the companion's |x_0 − base|, read while the tensor's own tiles are under way."""
    for tile in inputs.tiles():
        total = count = 0.0
        for other in inputs.companions["other"].tiles():
            total += float((other.sources_KT[0] - other.base_T).abs().sum())
            count += other.stop - other.start
        yield tile.base_T + (tile.sources_KT[0] - tile.base_T) * (total / count)


class Doubled(Checkpoint):
    """Every tensor of another model, twice as large; closed with the models of the recipe."""

    def __init__(self, inner: Checkpoint) -> None:
        self.inner, self.reference, self.folder, self.config = inner, "doubled", inner.folder, inner.config
        self.tensors, self.aliases, self.notes, self.closed = inner.tensors, inner.aliases, [], 0

    def fingerprint(self) -> str:
        return "2" + self.inner.fingerprint()

    def read(self, name: str, start: int, stop: int, buffer: torch.Tensor | None = None) -> torch.Tensor:
        return self.inner.read(name, start, stop) * 2

    def close(self) -> None:
        self.closed += 1


MADE: list[Doubled] = []


@plugin("test-context", references=("helpers",))
def with_context(plan: Plan, context: PluginContext, *, helpers: dict[str, str], other: str, **changes: Any) -> Plan:
    """The down projections by `test-beside`, from a helper model times two."""
    helper = context.member(helpers["model"])
    MADE.append(Doubled(helper.checkpoint))
    doubled = context.add("doubled", MADE[-1])

    def beside(job: Job) -> Job:
        if job.role != "down":
            return job
        beside = other.format(layer=job.layer)
        shape = helper.info(beside).shape
        base = Input(plan.donor, beside)
        companion = Companion(shape, (Input(doubled.index, beside),), changes.get("base", base))
        return replace(
            job,
            method="test-beside",
            parameters={},
            sources=(Input(doubled.index, job.name),),
            base=Input(plan.donor, job.name),
            companions={"other": companion},
            resident=changes.get("resident", 0),
        )

    return replace(plan, jobs=tuple(beside(job) for job in plan.jobs))


def _norms(inputs: Inputs) -> list[float]:
    square_K = sum(tile.sources_KT.double().square().sum(1) for tile in inputs.tiles())
    return [float(value) ** 0.5 for value in square_K]  # type: ignore[union-attr]


@merge_method("test-unit", base="unused", needs=_norms)
def unit(x_KT: torch.Tensor, stats: list[float]) -> torch.Tensor:
    """The sum of the sources, each divided by its norm over the whole tensor."""
    return sum(x_T / norm for x_T, norm in zip(x_KT, stats))  # type: ignore[return-value]


@merge_method("test-whole", base="optional", needs=Whole, resident=lambda shape, count, values: 4 * values["rows"])
def whole(inputs: Inputs, *, rows: int = 2) -> Iterator[torch.Tensor]:
    """The first source's values less their mean over the tensor, in two passes; keeps `rows` numbers."""
    mean = sum(float(tile.sources_KT[0].sum()) for tile in inputs.tiles()) / max(1, _count(inputs.tiles()))
    inputs.record(mean=mean)
    for tile in inputs.tiles():
        yield tile.sources_KT[0] - mean


def _count(tiles: Iterator[Tile]) -> int:
    return sum(tile.stop - tile.start for tile in tiles)


def recipe(*folders: Path, **keys: Any) -> dict[str, Any]:
    return {"merge_method": "yeam", "models": [{"model": str(f)} for f in folders], **keys}


def test_attention_only(tmp_path: Path, llama: Llama) -> None:
    """A plugin picks jobs by role; what it copies is the file's bytes, and only those models are read for it."""
    base, a, b = llama("base"), llama("a"), llama("b")
    config = recipe(a, b, base_model=str(base), plugins=[{"test-only-attention": {"donor": 2}}])
    report = yeam.merge(config, tmp_path / "out")
    yeam.merge({**config, "plugins": []}, tmp_path / "plain")
    ours, plain, x = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain", "base"))
    for name in ours:
        assert torch.equal(ours[name], plain[name] if "self_attn" in name else x[name]), name
    assert {t["method"] for t in report.tensors if "self_attn" in t["name"]} == {"yeam"}
    plan = yeam.plan(config)
    assert plan.plugins == ("test-only-attention",) and plan.hash() != yeam.plan({**config, "plugins": []}).hash()


def test_companions_and_computed_models(tmp_path: Path, llama: Llama) -> None:
    """A method reads another tensor beside its own, and of a model that a plugin computes from one in its options."""
    base, helper = llama("base"), llama("helper")
    other = "model.layers.{layer}.self_attn.q_proj.weight"
    options = {"helpers": {"model": str(helper)}, "other": other}
    config = {**recipe(base, plugins=[{"test-context": options}]), "merge_method": "passthrough"}
    report = yeam.merge(config, tmp_path / "out", memory="1G")
    assert MADE[-1].closed == 1 and report.models == [str(base), str(helper), "doubled"]
    ours, x, y = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", base, helper))
    for name in ours:
        wanted = x[name]
        if "down_proj" in name:
            beside = other.format(layer=name.split(".")[2])
            wanted = x[name] + (2 * y[name] - x[name]) * (2 * y[beside] - x[beside]).abs().mean()
        torch.testing.assert_close(ours[name], wanted, rtol=1e-5, atol=1e-6)

    def planned(**more: Any) -> Plan:
        return yeam.plan({**config, "plugins": [{"test-context": options | more}]})

    assert planned().hash() != planned(other="model.layers.{layer}.mlp.up_proj.weight").hash()
    assert {job.resident for job in planned(resident=77).jobs} == {0, 77}
    refuses(
        {**config, "plugins": [{"test-context": options | {"base": None}}]},
        "companion 'other'",
        "or of a base",
        error=YeamError,
    )
    refuses(
        {**config, "plugins": [{"test-context": options | {"helpers": {"model": str(tmp_path / "none")}}}]},
        str(tmp_path / "none"),
        error=CheckpointError,
    )


def test_plugins_follow_each_other(tmp_path: Path, llama: Llama) -> None:
    """In the recipe's order; parameters that a plugin leaves out take their defaults, one for each source."""
    a, b = llama("a"), llama("b")
    norm = "model.norm.weight"
    uses = [
        {"test-swap": {"method": "linear", "parameters": {"weight": [1, 3]}}},
        {"test-swap": {"job": "lm_head.weight", "drop": True}},
    ]
    plan = yeam.plan(recipe(a, b, plugins=uses))
    made = {job.name: job for job in plan.jobs}
    assert "lm_head.weight" not in made and "lm_head.weight" not in plan.shards[0].header
    assert made[norm].parameters == {"weight": (1, 3), "normalize": True} and made[norm].resident == 0
    uses = [{"test-swap": {"job": "model.layers.0.mlp.up_proj.weight", "parameters": {"frames": 16}}}]
    job = {j.name: j for j in yeam.plan(recipe(a, b, base_model=str(a), plugins=uses)).jobs}[
        "model.layers.0.mlp.up_proj.weight"
    ]
    assert job.parameters["weight"] == (1,) and job.parameters["frames"] == 16


def test_plugins_of_a_module_and_of_a_package(tmp_path: Path, llama: Llama) -> None:
    """`module:name` imports the module; an installed package offers its plugins under plain names."""
    a, b = llama("a"), llama("b")
    site = tmp_path / "site"
    (site / "other_plugins-1.0.dist-info").mkdir(parents=True)
    (site / "named_module.py").write_text(PLUGIN.replace("NUMBER", "one"))
    (site / "other_plugins.py").write_text(PLUGIN.replace("NUMBER", "two"))
    (site / "other_plugins-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: other-plugins\nVersion: 1.0\n"
    )
    (site / "other_plugins-1.0.dist-info" / "entry_points.txt").write_text("[yeam.plugins]\ntwo = other_plugins:only\n")
    uses = [{"named_module:only-one": {"role": "mlp"}}, {"only-two": {"role": "down"}}]
    (tmp_path / "recipe.json").write_text(json.dumps(recipe(a, b, plugins=uses)))
    script = (
        "import sys, yeam; print(yeam.plan(sys.argv[1]).to_dict() == 0 or yeam.merge(sys.argv[1], sys.argv[2]).totals)"
    )

    def run(**more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", script, str(tmp_path / "recipe.json"), str(tmp_path / "out")]
        path = f"{site}:{environment()['PYTHONPATH']}"
        return subprocess.run(
            command, env=environment(PYTHONPATH=path, **more), capture_output=True, text=True, timeout=120
        )

    done = run()
    assert done.returncode == 0, done.stderr
    ours, x, y = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "a", "b"))
    for name in ours:
        is_merged = not torch.equal(ours[name], x[name]) and not torch.equal(ours[name], y[name])
        assert is_merged is ("down_proj" in name), name
    (site / "other_plugins.py").write_text("raise RuntimeError('broken on purpose')")
    done = run()
    assert done.returncode != 0 and "'two'" in done.stderr and "broken on purpose" in done.stderr


def test_bad_plugins(tmp_path: Path, llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each error names the plugin, and the tensor where there is one; nothing is written."""
    a, b, wide = llama("a"), llama("b"), llama("wide", hidden=32)

    def use(plugin_name: str, /, *folders: Path, **options: Any) -> dict[str, Any]:
        return recipe(*(folders or (a, b)), plugins=[{plugin_name: options}])

    refuses(use("test-only-atention"), "unknown plugin", "did you mean 'test-only-attention'")
    refuses(use("no_such_module:x"), "no_such_module", "cannot be imported")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "syntax_plugin.py").write_text("def (")
    refuses(use("syntax_plugin:x"), "cannot be imported")
    refuses(use("test-only-attention", dnor=1), "'dnor'", "its options are: donor")
    refuses(use("test-bad", how="nothing"), "'test-bad' returned NoneType", error=YeamError)
    refuses(use("test-bad", how="models"), "'test-bad'", "models cannot be changed", error=YeamError)
    refuses(use("test-bad", how="crash"), "'test-bad' fails", "ZeroDivisionError", error=YeamError)
    refuses(use("test-bad", how="config"), "'test-bad': no good", "choose another")
    with pytest.raises(YeamError, match="two plugins are named 'test-bad'"):
        plugin("test-bad")(lambda plan: plan)

    norm = "model.norm.weight"
    for options, words in [
        ({"name": "lm_head.weight"}, ["would be written twice"]),
        ({"source": (0, "model.nrom.weight")}, [norm, "has no tensor 'model.nrom.weight'", str(a)]),
        ({"source": (7, norm)}, [norm, "no model 7", "0 to 1"]),
        ({"source": (0, "lm_head.weight")}, [norm, "[32, 16], not [16]"]),
        ({"method": "linaer"}, [norm, "did you mean 'linear'"]),
        ({"method": "linear", "parameters": {}}, [norm, "needs 'weight'"]),
        ({"method": "linear", "parameters": {"weight": [1]}}, [norm, "one value for each of the 2 models"]),
        ({"method": "linear", "parameters": {"weight": [1, 1], "t": 1}}, [norm, "no parameter 't'"]),
        ({"parameters": {"softness": 0}}, [norm, "softness", "greater than 0"]),
        ({"method": "test-mix", "parameters": {}}, [norm, "needs a base"]),
        ({"method": "passthrough", "parameters": {}}, [norm, "does not take 2 models"]),
        ({"method": "copy"}, [norm, "`copy` takes one model"]),
        ({"method": "copy", "source": (0, norm), "dtype": "BF16"}, [norm, "a copy of F32 cannot be BF16"]),
        ({"dtype": "bfloat16"}, [norm, "'bfloat16' is no dtype"]),
    ]:  # fmt: skip
        refuses(use("test-swap", **options), "plugin 'test-swap': ", *words, error=YeamError)
    with pytest.raises(YeamError):
        yeam.merge(use("test-swap", method="copy"), tmp_path / "out")
    assert not list(tmp_path.glob("out*")) and wide.exists()


def test_methods_of_the_users_own(tmp_path: Path, llama: Llama) -> None:
    """A streaming method with a parameter for each model, one with statistics, one that drives its passes itself."""
    base, a, b = llama("base"), llama("a"), llama("b")
    x, y, z = (load_file(folder / "model.safetensors") for folder in (base, a, b))

    def merged(method: str, *folders: Path, **keys: Any) -> dict[str, torch.Tensor]:
        yeam.merge({**recipe(*folders), "merge_method": method, **keys}, tmp_path / method, overwrite=True)
        return load_file(tmp_path / method / "model.safetensors")

    share = [{"filter": "mlp", "value": 2}]
    config = {"merge_method": "test-mix", "base_model": str(base), "parameters": {"lambda": 0.5, "share": share}}
    config["models"] = [{"model": str(a)}, {"model": str(b), "parameters": {"share": 3}}]
    yeam.merge(config, tmp_path / "mix")
    for name, tensor in load_file(tmp_path / "mix" / "model.safetensors").items():
        first = 2 if "mlp" in name else 0.5
        torch.testing.assert_close(tensor, x[name] + 0.5 * (first * (y[name] - x[name]) + 3 * (z[name] - x[name])))
    refuses({**recipe(a), "merge_method": "test-mix"}, "'test-mix' needs a base model")
    refuses({**recipe(a, b, a, b), **{k: config[k] for k in ("merge_method", "base_model")}}, "1 to 3 models")

    for name, tensor in merged("test-unit", a, b).items():
        torch.testing.assert_close(tensor, y[name] / y[name].norm() + z[name] / z[name].norm())
    ours = merged("test-whole", a, base_model=str(base), parameters={"rows": 3})
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, y[name] - y[name].mean(), rtol=1e-4, atol=1e-5)
    plan = yeam.plan({**recipe(a), "merge_method": "test-whole", "parameters": {"rows": 3}})
    assert {job.resident for job in plan.jobs} == {12}
    report = json.loads((tmp_path / "test-whole" / "yeam_report.json").read_text())
    entry = next(t for t in report["tensors"] if t["name"] == "model.norm.weight")
    assert entry["update"]["mean"] == pytest.approx(float(y["model.norm.weight"].mean()), abs=1e-6)
    assert "mean_agreement" not in report["totals"]


def test_methods_that_are_not_well_formed() -> None:
    assert "linear" in yeam.methods.registry.methods()  # loads them, so that the name is taken whichever test is first
    for keywords, function, words in [
        ({"name": "linear"}, mix, "two merge methods are named 'linear'"),
        ({"name": "test-a"}, lambda y_T: y_T, "not \\['y_T'\\]"),
        ({"name": "test-b"}, lambda x_KT, stats: x_KT, "go together"),
        ({"name": "test-c"}, lambda x_KT, *, t: x_KT, "'t' has no type annotation"),
    ]:
        with pytest.raises((YeamError, UserError), match=words):
            merge_method(**keywords)(function)  # type: ignore[arg-type]
