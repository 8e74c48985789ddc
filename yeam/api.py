"""The Python API: load a recipe, plan it, merge it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yeam.errors import ConfigError, UserError
from yeam.recipe import LoadedRecipe, MergeRecipe, load_recipe, parse_size

if TYPE_CHECKING:
    from yeam.engine.run import Progress
    from yeam.planning.jobs import Plan
    from yeam.planning.members import Members
    from yeam.report.inspect import Inspection
    from yeam.report.merge_report import MergeReport

RecipeSource = str | os.PathLike[str] | Mapping[str, Any] | MergeRecipe | LoadedRecipe


def merge(
    config: RecipeSource,
    out: str | os.PathLike[str] | None = None,
    *,
    device: str = "auto",
    memory: int | str | None = None,
    shard_size: int | str | None = None,
    overwrite: bool = False,
    resume: bool = True,
    allow_nan: bool = False,
    like: str | None = None,
    overrides: Sequence[str] = (),
    progress: Callable[[Progress], None] | None = None,
) -> MergeReport:
    """Merge models as the recipe says and write one Hugging Face folder.

    config: path of a YAML file, or the recipe as a mapping. out: the folder to make; the recipe's `output:` or `./<recipe name>`
    otherwise. device: `auto`, `cpu`, `cuda` or `cuda:N`. memory, shard_size: bytes or text such as `4GiB`. overwrite: replace an
    existing model folder. resume: continue an interrupted run. allow_nan: merge inputs with NaN or Inf. like: `mergekit` rounds as
    mergekit does (`math: exact`). overrides: `KEY=VALUE` changes to the recipe. progress: called after every tensor.
    Returns the report that is also written as yeam_report.json. Raises UserError (ConfigError, CheckpointError, OutputError) for what
    can be fixed, YeamError for what broke; then no `out` appears, and the finished part waits in `out.partial`.

        >>> import yeam
        >>> yeam.merge("merge_configs/quickstart.yaml", "merged/quickstart")  # doctest: +SKIP
    """
    loaded = _load(config, overrides, like)
    target = output_folder(loaded, out)
    from yeam.engine.target import check_output_apart, check_output_free

    check_output_free(target, overwrite)
    with _opened(loaded) as members:
        check_output_apart(target, [folder for m in members for folder in m.checkpoint.folders])
        plan = _plan(loaded, members, shard_size, allow_nan)
        return _carry_out(plan, loaded, members, target, device, memory, overwrite, resume, progress)


def _carry_out(
    plan: Plan,
    loaded: LoadedRecipe,
    members: Members,
    target: Path,
    device: str,
    memory: int | str | None,
    overwrite: bool,
    resume: bool,
    progress: Callable[[Progress], None] | None,
) -> MergeReport:
    from contextlib import closing

    from yeam.engine.assemble import assemble
    from yeam.engine.memory import default_budget
    from yeam.engine.output import Output
    from yeam.engine.run import run
    from yeam.engine.stage import choose_device
    from yeam.report.merge_report import build_report

    chosen = choose_device(device)
    budget = default_budget() if memory is None else parse_size(memory)
    with closing(Output(plan, target, resume=resume, overwrite=overwrite)) as output:
        resumed = len(output.finished)
        seconds = run(plan, members.checkpoints, output, device=chosen, memory=budget, listener=progress)
        report = build_report(plan, output.finished, target, seconds, resumed)
        assemble(plan, loaded, members.checkpoints, output, report)
        output.publish()
    return report


def plan(
    config: RecipeSource,
    *,
    shard_size: int | str | None = None,
    allow_nan: bool = False,
    like: str | None = None,
    overrides: Sequence[str] = (),
) -> Plan:
    """The plan of a recipe, from headers alone: what `merge` would do, tensor by tensor. Options and errors as in `merge`."""
    loaded = _load(config, overrides, like)
    with _opened(loaded) as members:
        return _plan(loaded, members, shard_size, allow_nan)


def plan_costs(config: RecipeSource, **options: Any) -> tuple[Plan, dict[str, Any]]:
    """The plan of a recipe and what it costs: `read_bytes`, `read_by_role` ((role, method) → bytes) and `peak_memory`.

    Options and errors as in `plan`. peak_memory is an estimate of anonymous bytes with the default memory budget.
    """
    from yeam.engine.memory import default_budget
    from yeam.engine.run import costs_of

    loaded = _load(config, options.pop("overrides", ()), options.pop("like", None))
    with _opened(loaded) as members:
        made = _plan(loaded, members, options.pop("shard_size", None), options.pop("allow_nan", False))
        return made, costs_of(made, members.checkpoints, default_budget())


def inspect(model: str | os.PathLike[str]) -> Inspection:
    """What a model is made of: family, roles, shapes, dtypes, coverage. `model` is a reference as in a recipe.

    Raises CheckpointError where it cannot be opened.
    """
    from yeam.checkpoint import open_checkpoint
    from yeam.recipe import ModelRef
    from yeam.report.inspect import inspect_model

    ref = ModelRef.parse(os.fspath(model))
    lora = (ref.lora.path, ref.lora.revision) if ref.lora is not None else None
    checkpoint = open_checkpoint(ref.path, ref.revision, lora, reference=str(ref))
    try:
        return inspect_model(checkpoint)
    finally:
        checkpoint.close()


def output_folder(loaded: LoadedRecipe, out: str | os.PathLike[str] | None) -> Path:
    """Where a recipe's output goes: `out`, else its `output:`, else `./<recipe name>`."""
    return Path(os.path.abspath(os.path.expanduser(out or loaded.recipe.output or loaded.name)))


def _load(config: RecipeSource, overrides: Sequence[str], like: str | None) -> LoadedRecipe:
    if like not in (None, "mergekit"):
        raise ConfigError(f"unknown value {like!r} for like", "the only one is `mergekit`")
    return load_recipe(config, [*overrides, *(["math=exact"] if like else [])])


def _plan(loaded: LoadedRecipe, members: Members, shard_size: int | str | None, allow_nan: bool) -> Plan:
    from yeam.planning.planner import make_plan

    size = None if shard_size is None else parse_size(shard_size)
    if size is not None and size < 1:
        raise UserError(f"a shard size of {shard_size} cannot hold anything", "give a positive size such as 5GB")
    return make_plan(loaded, members, shard_size=size, allow_nan=allow_nan)


@contextmanager
def _opened(loaded: LoadedRecipe) -> Iterator[Members]:
    from yeam.planning.members import Members

    members = Members(loaded)
    try:
        yield members
    finally:
        members.close()
