"""The Python API: load a recipe, plan it, merge it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yeam.arguments import checked
from yeam.errors import ConfigError, OutputError, UserError
from yeam.recipe import LoadedRecipe, MergeRecipe, load_recipe, parse_size

if TYPE_CHECKING:
    from yeam.engine.ranks import Alone, Ranks
    from yeam.engine.run import Progress
    from yeam.evaluation.results import Evaluation
    from yeam.guard import Guard
    from yeam.hub.push import PushProgress, PushReport
    from yeam.hub.target import Target
    from yeam.planning.jobs import Plan
    from yeam.planning.stages import Pipeline
    from yeam.report.compare import ModelComparison
    from yeam.report.inspect import Inspection
    from yeam.report.merge_report import MergeReport
    from yeam.report.verify import Verification

RecipeSource = (
    str | os.PathLike[str] | Mapping[str, Any] | MergeRecipe | Sequence[Mapping[str, Any] | MergeRecipe] | LoadedRecipe
)

Texts = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@checked
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
    keep_downloads: bool = True,
    cache_budget: int | str | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
    revision: str | None = None,
    guard: Texts | None = None,
    donor_text: Texts | None = None,
    guard_limit: float | None = None,
    durable: bool = True,
    distributed: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> MergeReport:
    """Merge models as the recipe says and write one Hugging Face folder.

    config: path of a YAML file, or the recipe as a mapping; a list of mappings is a recipe of several stages. out: the folder to
    make; the recipe's `output:` or `./<recipe name>` otherwise. device: `auto`, `cpu`, `cuda` or `cuda:N`. memory, shard_size: bytes
    or text such as `4GiB`; what the calling process holds already is not counted as the merge's. overwrite: replace an existing model
    folder. resume: continue an interrupted run. allow_nan: merge inputs with NaN or Inf. like: `mergekit` rounds as mergekit does
    (`math: exact`). overrides: `KEY=VALUE` changes to the recipe. keep_downloads: leave in the Hub's cache what was downloaded.
    cache_budget: bytes or text; no more of Hub models is on disk at a time. push_to_hub: `owner/name` on the Hub to push the result
    to, as `push` does; token and rights are checked before the merge. private, revision: as in `push`. guard: text files on which the
    host, the recipe's base model or else its only model, may lose at most guard_limit (0.005) of its loss; the merge's strength is
    taken back until that holds, down to the host itself. donor_text: text on which the gain is told. durable: `out` appears when all
    of it is on the disk, so that a power loss leaves it whole or not there. distributed: share the work among the processes that
    torchrun or accelerate has started (RANK, WORLD_SIZE, …), on one machine or on several with a folder in common; each makes this
    same call, the bytes are those that one process makes, and `memory` is for each. progress: called after every tensor.
    Returns the report that is also written as yeam_report.json. Raises UserError (ConfigError, CheckpointError, OutputError) for what
    can be fixed, YeamError for what broke; then no `out` appears, and the finished part waits in `out.partial`.

        >>> import yeam
        >>> yeam.merge("merge_configs/quickstart.yaml", "merged/quickstart")  # doctest: +SKIP
    """
    from yeam.engine.memory import held_already
    from yeam.engine.ranks import joined

    held = held_already()
    with joined(distributed) as ranks:
        loaded = _load(config, overrides, like)
        target = output_folder(loaded, out)
        from yeam.engine.target import check_output_apart, check_output_free

        check_output_free(target, overwrite)
        if push_to_hub is None and (private or revision is not None):
            raise UserError(
                "private and revision are for pushing", "name a repository with --push-to-hub (push_to_hub=)"
            )
        if ranks.size > 1 and (not keep_downloads or cache_budget is not None):
            raise UserError(
                "several processes share the Hub's cache, and none knows what the others still need of it",
                "leave --cache-budget and --no-keep-downloads out, or merge in one process",
            )
        watch = _guard(guard, donor_text, guard_limit)
        with _downloading(keep_downloads, cache_budget), _planned(loaded, shard_size, allow_nan) as pipeline:
            check_output_apart(target, pipeline.folders)
            if watch is not None:
                watch.check(loaded, pipeline)
            place = None
            if push_to_hub is not None and ranks.is_first:
                from yeam.hub.target import check_token, make_target

                place = make_target(push_to_hub, check_token(push_to_hub), private=private, revision=revision)
            settings = _Settings(target, device, memory, held, overwrite, resume, durable, progress, watch)
            report = _carry_out(pipeline, loaded, settings, ranks)
    return report if place is None else _pushed(report, place)


@checked
def push(
    folder: str | os.PathLike[str],
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    progress: Callable[[PushProgress], None] | None = None,
) -> PushReport:
    """Push a model folder to the Hub: every file, then one commit. Interrupted, the same call goes on where it was.

    repo: `owner/name`; it is made if need be. private: make it private; a public one that is there is refused. revision: a branch,
    made if need be. message: of the commit. progress: called after every file.
    Raises UserError for what can be fixed: a folder that `verify` finds something wrong with, no or a wrong token, no right to write.

        >>> import yeam
        >>> yeam.push("merged/quickstart", "owner/quickstart", private=True).url  # doctest: +SKIP
    """
    from yeam.hub.push import files_of, push_folder, refuse_broken
    from yeam.hub.target import check_token, make_target

    place = Path(folder).expanduser()
    files_of(place)
    user = check_token(repo)  # before all bytes are read; the repository only after it
    refuse_broken(place)
    target = make_target(repo, user, private=private, revision=revision)
    return push_folder(place, target, message=message, listener=progress)


def _pushed(report: MergeReport, target: Target) -> MergeReport:
    """Push a finished merge; the report says where it is."""
    from dataclasses import replace

    from yeam.hub.push import push_folder, refuse_broken

    try:
        refuse_broken(report.out)
        found = push_folder(report.out, target)
    except UserError as error:
        rest = f"the merge is in {report.out}: `yeam push {report.out} {target.repo}` goes on"
        raise type(error)(error.message, f"{error.remedy}; {rest}" if error.remedy else rest) from error
    return replace(report, notes=[*report.notes, *found.notes, f"pushed to {found.url}, commit {found.commit}"])


@dataclass(frozen=True)
class _Settings:
    """How a planned recipe is carried out; as in `merge`. held: bytes that the process held before."""

    target: Path
    device: str
    memory: int | str | None
    held: int
    overwrite: bool
    resume: bool
    durable: bool
    progress: Callable[[Progress], None] | None
    guard: Guard | None


def _carry_out(pipeline: Pipeline, loaded: LoadedRecipe, settings: _Settings, ranks: Alone | Ranks) -> MergeReport:
    from yeam.engine.assemble import assemble
    from yeam.engine.device import choose_device
    from yeam.engine.memory import default_budget
    from yeam.engine.output import Output
    from yeam.engine.ranks import Ranks
    from yeam.engine.stages import make_stages
    from yeam.engine.together import opened, run_together
    from yeam.report.licence import licensing
    from yeam.report.merge_report import build_report, read_report

    plan, checkpoints, target = pipeline.plan, pipeline.result.members.checkpoints, settings.target
    chosen = choose_device(ranks.device(settings.device))
    allowed = default_budget(ranks.neighbours) if settings.memory is None else parse_size(settings.memory)
    budget = settings.held + allowed
    if isinstance(ranks, Ranks):
        ranks.agree(_facts(plan, target, chosen.type))
    if ranks.is_first:
        for bring in checkpoints[plan.donor].pending.values():  # now rather than when all else is done
            bring()
    options = {"resume": settings.resume, "overwrite": settings.overwrite, "durable": settings.durable}
    written = [stage.plan for stage in pipeline.written]
    with opened(plan, target, ranks, stages=written, **options) as output:
        resumed = len(output.finished)
        made, listener = make_stages(pipeline, output, ranks, device=chosen, memory=budget, listener=settings.progress)
        seconds = made.seconds + run_together(
            plan, checkpoints, output, ranks, device=chosen, memory=budget, listener=listener
        )
        if isinstance(output, Output):
            report = build_report(plan, output.finished, target, seconds, made.resumed + resumed, made.finished)
            licences = licensing(pipeline)
            if licences.is_conflict:
                report.notes.append(f"the inputs' licences: {licences.sentence}")
            assemble(plan, loaded, checkpoints, output, report, licences)
            if settings.guard is not None:
                report = settings.guard.hold(plan, output, report, device=chosen, memory=budget)
                assemble(plan, loaded, checkpoints, output, report, licences)
        pipeline.check_inputs()
        ranks.wait("checked")  # each has looked at the inputs on its own machine
        if isinstance(output, Output):
            output.publish()
    if isinstance(ranks, Ranks):
        if ranks.is_first:
            ranks.tell("published", None)
        else:
            ranks.hear("published")
            report = read_report(target)
    return report


def _facts(plan: Plan, target: Path, device: str) -> dict[str, Any]:
    """What has to be the same in every rank, the most telling differences first."""
    from yeam.report.merge_report import versions

    return {
        **{f"version of {name}": versions().get(name) for name in ("yeam", "torch")},
        "output folder": str(target),
        "kind of device": device,
        **{f"state of the model {model.label}": model.fingerprint for model in plan.models},
        "plan": plan.hash(),
    }


@checked
def plan(
    config: RecipeSource,
    *,
    shard_size: int | str | None = None,
    allow_nan: bool = False,
    like: str | None = None,
    overrides: Sequence[str] = (),
) -> Plan:
    """The plan of a recipe, from headers alone: what `merge` would do, tensor by tensor. Options and errors as in `merge`."""
    with _planned(_load(config, overrides, like), shard_size, allow_nan) as pipeline:
        return pipeline.plan


def plan_costs(config: RecipeSource, **options: Any) -> tuple[Plan, dict[str, Any]]:
    """The plan of a recipe and what it costs: `read_bytes`, `read_by_role` ((role, method) → bytes) and `peak_memory`.

    Options and errors as in `plan`. peak_memory is an estimate of anonymous bytes with the default memory budget. With stages,
    read_bytes and peak_memory are of all of them, and `stages` has read_bytes and read_by_role of each by name; what passes
    through memory is not counted as read.
    """
    from yeam.engine.budget import costs_of
    from yeam.engine.memory import default_budget
    from yeam.engine.stages import attach

    loaded = _load(config, options.pop("overrides", ()), options.pop("like", None))
    with _planned(loaded, options.pop("shard_size", None), options.pop("allow_nan", False)) as pipeline:
        attach(pipeline)
        found = [costs_of(stage.plan, stage.members.checkpoints, default_budget()) for stage in pipeline.stages]
        costs = {**found[-1], "read_bytes": sum(each["read_bytes"] for each in found)}
        # an intermediate that is streamed is never worked on by itself
        runs = [each for each, made in zip(found, pipeline.intermediates) if not made.streamed] + found[-1:]
        costs["peak_memory"] = max(each["peak_memory"] for each in runs)
        costs["stages"] = {
            made.reference: {key: each[key] for key in ("read_bytes", "read_by_role")}
            for made, each in zip(pipeline.intermediates, found)
        }
        return pipeline.plan, costs


@checked
def inspect(model: str | os.PathLike[str]) -> Inspection:
    """What a model is made of: family, roles, shapes, dtypes, coverage. `model` is a reference as in a recipe.

    Raises CheckpointError where it cannot be opened.
    """
    from yeam.checkpoint import open_checkpoint
    from yeam.recipe import ModelRef
    from yeam.report.inspect import inspect_model

    ref = ModelRef.parse(os.fspath(model))
    checkpoint = open_checkpoint(ref.path, ref.revision, ref.adapter, reference=str(ref))
    try:
        return inspect_model(checkpoint)
    finally:
        checkpoint.close()


@checked
def evaluate(
    model: str | os.PathLike[str],
    text: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    against: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    stride: int | None = None,
    context: int | None = None,
    wikitext2: bool = False,
    batch: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    memory: int | str | None = None,
    trust_remote_code: bool = False,
    update_card: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """How well a model predicts text, and how it differs from other models on the same text.

    model, against: references as in a recipe. text: files, or folders of them; each file is a document. stride, context: in tokens; every
    token is predicted once, from at least context - stride tokens before it where the document has them; context is 2,048 or the model's
    positions if those are fewer, stride 64 or the context if that is shorter.
    wikitext2: the text is wikitext-2's test split, joined with blank lines. batch: windows at a time.
    dtype: `auto` (float32 on the CPU, as stored elsewhere), `float32`, `bfloat16`, `float16`. memory: bytes or text such as `4GiB`; models
    whose weights take more are read from the disk layer by layer. trust_remote_code: run Python code that a model's folder brings.
    update_card: keep the result in the model's folder and show it in its card. progress: called with (tokens scored, tokens in all)
    after every batch.
    Raises UserError (CheckpointError, OutputError) for what can be fixed: no text, a model that cannot be loaded or holds NaN.

        >>> import yeam
        >>> yeam.evaluate("merged/quickstart", "README.md").perplexity  # doctest: +SKIP
    """
    from yeam.evaluation.run import run
    from yeam.report.evaluated import check_folder, update

    folder = check_folder(os.fspath(model)) if update_card else None
    found = run(
        os.fspath(model),
        _several(text),
        _several(against),
        stride=stride,
        context=context,
        wikitext2=wikitext2,
        batch=batch,
        dtype=dtype,
        device=device,
        memory=None if memory is None else parse_size(memory),
        trust_remote_code=trust_remote_code,
        listener=progress,
    )
    if folder is not None:
        update(folder, found)
    return found


@checked
def compare(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    spectrum: bool = True,
    device: str = "auto",
    memory: int | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ModelComparison:
    """How two models differ, by tensor and by role: distance, direction, signs, effective rank; of their updates where there is a base.

    References as in a recipe. Tensors are streamed in tiles; a spectrum needs the Gram matrix of a matrix's shorter side, and for a wide
    matrix as many of its rows as `memory` (bytes or text such as `4GiB`) allows. spectrum: without it, one pass of reading is all.
    progress: called with (bytes read, bytes in all) after every tensor. Raises CheckpointError where a model cannot be read or the two
    have no tensor in common.

        >>> import yeam
        >>> family = "examples/tiny-family/models/"
        >>> yeam.compare(family + "code", family + "prose", base=family + "base").total.cosine  # doctest: +SKIP
    """
    import torch

    from yeam.engine.device import choose_device
    from yeam.engine.memory import default_budget
    from yeam.report.compare import compare_models

    return compare_models(
        os.fspath(a),
        os.fspath(b),
        None if base is None else os.fspath(base),
        spectrum=spectrum,
        device=torch.device(str(choose_device(device))),
        memory=default_budget() if memory is None else parse_size(memory),
        listener=progress,
    )


@checked
def verify(
    out: str | os.PathLike[str],
    *,
    load: bool = False,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Check a model folder: index, shards, checksums against its report, NaN and Inf, ties, missing modules and code; with `load` that
    transformers takes it all.

    Folders that YeAM did not write have no checksums to compare with; the rest is checked. progress: called with (bytes read, bytes in
    all). The result says what is wrong (`ok`, `problems`). Raises UserError where there is no such folder.

        >>> import yeam
        >>> yeam.verify("merged/quickstart", load=True).ok  # doctest: +SKIP
    """
    from yeam.report.verify import verify_folder

    folder = Path(out).expanduser()
    return verify_folder(folder, load=load, trust_remote_code=trust_remote_code, listener=progress)


def _guard(texts: Texts | None, donor_texts: Texts | None, limit: float | None) -> Guard | None:
    if not texts:
        if donor_texts or limit is not None:
            raise UserError(
                "donor text and guard limit belong to a guard", "name the host's text with --guard (guard=)"
            )
        return None
    from yeam.guard import LIMIT, Guard

    more = _several(donor_texts) if donor_texts else []
    return Guard(_several(texts), LIMIT if limit is None else limit, more)


def _several(paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str]:
    return [os.fspath(path) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]


def output_folder(loaded: LoadedRecipe, out: str | os.PathLike[str] | None) -> Path:
    """Where a recipe's output goes: `out`, else its `output:`, else `./<recipe name>`. Raises OutputError for a name that is no text."""
    written = out or loaded.recipe.output
    path = Path(os.path.abspath(loaded.name if written is None else os.path.expanduser(written)))  # `~x` is a name, too
    if any("\ud800" <= letter <= "\udfff" for letter in str(path)):
        raise OutputError(
            f"{os.fsencode(path)!r}: is no text in UTF-8, which reports are written in", "name another folder"
        )
    return path


def _load(config: RecipeSource, overrides: Sequence[str], like: str | None) -> LoadedRecipe:
    if like not in (None, "mergekit"):
        raise ConfigError(f"unknown value {like!r} for like", "the only one is `mergekit`")
    return load_recipe(config, [*overrides, *(["*.math=exact"] if like else [])])


@contextmanager
def _downloading(keep: bool, budget: int | str | None) -> Iterator[None]:
    """Meanwhile, what is read from the Hub is kept or not, and is no more than the budget."""
    from yeam.checkpoint.hub_store import Store, using

    size = None if budget is None else parse_size(budget)
    with using(Store(keep=keep, budget=size)):
        yield


@contextmanager
def _planned(loaded: LoadedRecipe, shard_size: int | str | None, allow_nan: bool) -> Iterator[Pipeline]:
    from yeam.planning.stages import Pipeline

    size = None if shard_size is None else parse_size(shard_size)
    pipeline = Pipeline(loaded, shard_size=size, allow_nan=allow_nan)
    try:
        yield pipeline
    finally:
        pipeline.close()
