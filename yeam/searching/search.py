"""`yeam.search`: the open values of a recipe, found on text."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

from yeam.arguments import checked
from yeam.errors import UserError
from yeam.evaluation.windows import check_windows
from yeam.recipe import parse_size
from yeam.recipe.load import RecipeSource, read_draft
from yeam.recipe.settings import Scalar
from yeam.searching.samplers import Sampler, sampler_named
from yeam.searching.space import Space
from yeam.searching.targets import Targets, targets_of
from yeam.searching.written import filled_text

if TYPE_CHECKING:
    from yeam.searching.bench import Bench
    from yeam.searching.results import SearchResult
    from yeam.searching.study import Study
    from yeam.searching.trial import Trial

_POLL = 0.1  # seconds between looks at what other processes have done


@checked
def search(
    config: RecipeSource,
    text: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    trials: int = 50,
    sampler: str = "tpe",
    seed: int = 0,
    timeout: float | None = None,
    out: str | os.PathLike[str] | None = None,
    storage: str | os.PathLike[str] | None = None,
    plot: str | os.PathLike[str] | None = None,
    resume: bool = True,
    overwrite: bool = False,
    context: int | None = None,
    stride: int | None = None,
    batch: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    memory: int | str | None = None,
    overrides: Sequence[str] = (),
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> SearchResult:
    """Find the values that a recipe leaves open: those with which the merged model predicts text best.

    config: as in `merge`, with ranges in place of values: `{search: [0, 1]}`, with `log: true`, `int: true` or, for a list of
    alternatives, `choice: true`; `default:` is where the search begins (the middle, or the first alternative). text: files, or folders of
    them. The last tenth of each of them is held out: values are chosen by the loss on the rest, and judged there.
    trials: candidates in all, those of earlier runs and the one with the defaults among them. sampler: `tpe` (optuna) or `cmaes` (cma).
    seed: the same gives the same trials, in one process. timeout: seconds after which no new trial begins. out: the YAML to write;
    `<config>-best.yaml` beside the config otherwise. storage: the SQLite file of the trials, beside `out` otherwise; a rerun continues
    with it, and so do the processes of `accelerate launch`. plot: a picture. resume: continue, or forget the earlier trials. overwrite:
    replace an `out` that is not of this search. context, stride, batch, dtype, device, trust_remote_code: as in `evaluate`, but that
    windows do not overlap by default (stride = context). memory: for merging, as in `merge`; the candidate itself comes on top.
    progress: called with (trials done, trials in all).
    Candidates are merged into memory, and what two of them have in common is not computed twice. Raises UserError for what can be fixed
    (ConfigError with file:line for ranges), YeamError for what broke; then the finished trials are kept.

        >>> import yeam
        >>> yeam.search("merge_configs/search.yaml", "README.md", trials=20).best  # doctest: +SKIP
    """
    started = time.monotonic()
    propose = sampler_named(sampler)
    _check_numbers(trials, seed, timeout)
    check_windows(stride, context, batch)
    space = Space(read_draft(config, overrides))
    baseline = space.filled(space.defaults).checked()
    targets = targets_of(space, baseline, out, storage, plot, overwrite)

    from yeam.engine.ranks import joined
    from yeam.searching.bench import Bench, Options
    from yeam.searching.split import divided
    from yeam.searching.study import Study, locked

    paths = [text] if isinstance(text, str | os.PathLike) else list(text)
    parts = divided(paths)
    with ExitStack() as stack:
        together = stack.enter_context(joined(True))
        options = Options(
            device=together.device(device),
            dtype=dtype,
            memory=None if memory is None else parse_size(memory),
            context=context,
            stride=stride,
            batch=batch,
            trust_remote_code=trust_remote_code,
        )
        bench = stack.enter_context(closing(Bench(parts, options)))
        plan = bench.look(baseline)
        space.check_values()
        identity = {
            "the sampler": sampler,
            "the seed": str(seed),
            **space.record(),
            **{f"the model {label}": fingerprint for label, fingerprint in sorted(bench.inputs.items())},
            "the text": parts.digest(),
            "the window": json.dumps([context, stride]),
            "the dtype of the evaluation": dtype,
        }
        if together.is_first:
            stack.enter_context(locked(targets.storage))
            study = Study.begin(targets.storage, identity, resume=resume)
            together.wait("begun")
        else:
            together.wait("begun")
            study = Study(targets.storage)
        stack.enter_context(closing(study))
        worker = _Worker(space, study, bench, propose, seed)
        try:
            worker.work(trials, math.inf if timeout is None else started + timeout, progress)
        except BaseException:
            if together.size == 1:
                study.give_up()
            raise
        together.wait("done")
        found = _result(space, study, targets, sampler, seed, started, [*plan.notes, *bench.notes], trials)
        if together.is_first:
            _write(space, found, paths)
        together.wait("written")  # the lock stays until all have read
    return found


def _check_numbers(trials: int, seed: int, timeout: float | None) -> None:
    if trials < 1:
        raise UserError(f"{trials} trials find nothing", "give at least 1, and better 20 or more")
    if seed < 0:
        raise UserError(f"the seed {seed} is below 0", "give a whole number from 0 on")
    if timeout is not None and not timeout > 0:
        raise UserError(f"a timeout of {timeout} seconds leaves no time", "give a number above 0")


class _Worker:
    """Carries out trials until there are enough."""

    def __init__(self, space: Space, study: Study, bench: Bench, sampler: Sampler, seed: int) -> None:
        self._space, self._study, self._bench = space, study, bench
        self._sampler, self._seed = sampler, seed

    def work(self, count: int, deadline: float, listener: Callable[[int, int], None] | None) -> None:
        """Until `count` trials are taken or the time is over; one trial is carried out in any case."""
        while True:
            trials = self._study.trials()
            done = sum(trial.state in ("done", "failed") for trial in trials)
            if listener is not None:
                listener(min(done, count), count)
            if done and time.monotonic() >= deadline:
                return
            taken = self._study.next(count, self._propose)
            if taken is False:
                return
            if taken is True:
                time.sleep(_POLL)
            else:
                self._carry_out(taken, trials)

    def _propose(self, trials: Sequence[Trial]) -> tuple[Scalar, ...] | None:
        return self._sampler(self._space, trials, self._seed) if trials else self._space.defaults

    def _carry_out(self, trial: Trial, others: Sequence[Trial]) -> None:
        from yeam.searching.bench import Unusable

        values = json.dumps(trial.values)
        for other in others:  # choices and whole numbers come again and again
            if other.state in ("done", "failed") and json.dumps(other.values) == values:
                if other.measured is None:
                    self._study.fail(trial, other.message)
                else:
                    self._study.finish(trial, other.measured, self._study.losses_of(other))
                return
        try:
            measured, losses = self._bench.measure(self._space.filled(trial.values).checked())
        except Unusable as error:
            if trial.number == 0 and error.__cause__ is not None:
                raise error.__cause__ from None  # nothing can be compared with
            self._study.fail(trial, error.message)
        else:
            self._study.finish(trial, measured, losses)


def _result(
    space: Space,
    study: Study,
    targets: Targets,
    sampler: str,
    seed: int,
    started: float,
    notes: Sequence[str],
    wanted: int,
) -> SearchResult:
    import numpy as np
    import torch

    from yeam.evaluation.results import mean_of
    from yeam.searching.results import SearchResult
    from yeam.searching.trial import best_of

    trials = study.trials()
    best = best_of(trials)
    assert best is not None and best.measured is not None
    losses = [np.frombuffer(study.losses_of(trial), dtype=np.float32) for trial in (trials[0], best)]
    gain = mean_of(torch.from_numpy(losses[0].astype(np.float64) - losses[1]))
    own = list(dict.fromkeys(notes))
    done = sum(trial.state in ("done", "failed") for trial in trials)
    if done < wanted:
        own.append(f"stopped after {done} of {wanted} trials; the same command continues")
    if best.number and gain.stderr is not None and gain.value < 2 * gain.stderr:
        own.append("on the held-out text the best candidate is not clearly better than the defaults: use more text")
    for dimension, value in zip(space.dimensions, best.values):
        found = dimension.range
        if best.number and not found.choices and value in (found.low, found.high):
            own.append(
                f"the best value of {dimension.name}, {value}, is an end of its range: a wider one may have a better"
            )
    return SearchResult(
        best=best,
        baseline=trials[0],
        gain=gain,
        trials=tuple(trials),
        parameters=tuple(dimension.name for dimension in space.dimensions),
        recipe=filled_text(space, best.values),
        out=targets.out,
        storage=targets.storage,
        plot=targets.plot,
        sampler=sampler,
        seed=seed,
        seconds=round(time.monotonic() - started, 3),
        notes=tuple(own),
    )


def _write(space: Space, found: SearchResult, text: Sequence[str | os.PathLike[str]]) -> None:
    from yeam.evaluation.results import with_error
    from yeam.report.files import write_text

    best, baseline = found.best.measured, found.baseline.measured
    assert best is not None and baseline is not None
    origin = space.draft.path.name if space.draft.path is not None else "a recipe in Python"
    names = ", ".join(Path(path).name or str(path) for path in text)
    which = f"trial {found.best.number}" if found.best.number else "the defaults"
    header = [
        f"Found by `yeam search` from {origin}: {which} of {len(found.trials)} trials, sampler {found.sampler}, "
        f"seed {found.seed}.",
        f"Loss on the held-out tenth of {names}: {with_error(*best.held_out)} nats a token; with the defaults "
        f"{with_error(*baseline.held_out)}.",
    ]
    comment = "".join(f"# {' '.join(line.split())}\n" for line in header)
    write_text(found.out, f"{comment}\n{found.recipe.lstrip()}")
    if found.plot is not None:
        from yeam.searching.picture import draw

        draw(found.plot, f"{origin}: {found.sampler}, best trial {found.best.number}", space.dimensions, found.trials)
