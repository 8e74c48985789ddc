"""The guard: a merge may not make its host predict a text much worse; where it would, its strength is taken back.

out(α) = host + α (out − host) is an ordinary streaming merge of two folders, so nothing of the merge itself is computed again.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yeam.checkpoint.dtypes import DTYPES
from yeam.errors import ConfigError, UserError
from yeam.planning.jobs import Input, Job, Model, Plan
from yeam.recipe import LoadedRecipe, ModelRef, StageRef

if TYPE_CHECKING:
    from yeam.checkpoint import Checkpoint
    from yeam.engine.device import Device
    from yeam.engine.output import Output
    from yeam.evaluation.results import Scores
    from yeam.planning.members import Member
    from yeam.planning.stages import Pipeline
    from yeam.report.merge_report import MergeReport

LIMIT = 0.005  # of the host's loss
HALVINGS = 5
BISECTIONS = 2
STRIDE = 512  # tokens: less context for some of them than `yeam eval` gives, the same for all models, at an eighth of its time

Texts = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
Listener = Callable[[str], None]


@dataclass(frozen=True)
class Trial:
    """A strength that was tried: loss on the host's text in nats a token, and its change relative to the host's."""

    strength: float
    loss: float
    change: float


@dataclass(frozen=True)
class Gain:
    """Losses on the donors' text, in nats a token, of the host and of the result; `change` is relative."""

    host_loss: float
    loss: float
    change: float


@dataclass(frozen=True)
class GuardReport:
    """What the guard did: `strength` is the share of the merge's change that is kept, `change` that of the host's loss with it."""

    host: str
    texts: tuple[str, ...]
    limit: float
    host_loss: float
    strength: float
    loss: float
    change: float
    trials: tuple[Trial, ...]
    donor: Gain | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @property
    def sentence(self) -> str:
        """What happened, for people."""
        text, full = ", ".join(self.texts), self.trials[0]
        gain = "" if self.donor is None else f"; on the donors' text the loss changes by {self.donor.change:+.2%}"
        if self.strength == 1:
            return f"guard: the loss of {self.host} on {text} changes by {self.change:+.2%}, at most {self.limit:+.2%} is allowed{gain}"
        harm = f"guard: at full strength the loss of {self.host} on {text} would have changed by {full.change:+.2%}"
        if self.strength == 0:
            return f"{harm}, and no smaller strength stays below {self.limit:+.2%}: THE OUTPUT IS THE HOST, UNCHANGED"
        return f"{harm}: THE MERGE IS TAKEN BACK TO {self.strength:.4g} OF ITS STRENGTH, with {self.change:+.2%}{gain}"


@dataclass
class Guard:
    """texts: on which the host may not get worse by more than `limit` (a share of its loss). donor_texts: on which the gain is told.

    The host is the recipe's base model, else its only model. Options as in `yeam.merge`.
    """

    texts: Sequence[str]
    limit: float = LIMIT
    donor_texts: Sequence[str] = ()
    listener: Listener | None = None
    _host: Member | None = field(default=None, init=False)
    _inputs: dict[str, str] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        from yeam.evaluation.texts import read_documents

        if not (math.isfinite(self.limit) and self.limit >= 0):
            raise UserError(f"a guard limit of {self.limit} is no share of a loss", "give 0.005 for half a percent")
        for texts in (self.texts, self.donor_texts):
            if texts:
                read_documents(texts)

    def check(self, loaded: LoadedRecipe, pipeline: Pipeline) -> None:
        """Find the host and its tensors. Raises ConfigError where the recipe has no host, or one of another shape than the output."""
        members, plan = pipeline.result.members, pipeline.plan
        host = members.of(host_of(loaded))
        owner = members[plan.donor]
        for job in plan.jobs:
            name = host.find(job.name, owner)
            shape = None if name is None else host.info(name).shape
            if name is None or shape != job.shape:
                found = "does not have it" if shape is None else f"has {list(shape)}"
                raise ConfigError(
                    f"a guard goes back towards its host: the output's {job.name} is {list(job.shape)} and {host.ref.label} {found}",
                    "merge without --guard, or without what changes the model's shape",
                )
            self._inputs[job.name] = name
        self._host = host

    def hold(self, plan: Plan, output: Output, report: MergeReport, *, device: Device, memory: int) -> MergeReport:
        """Compare the assembled output with the host; where it is too much worse, replace its tensors by ones nearer to the host's.

        Returns the report with what was found. Raises what `yeam.evaluate` raises.
        """
        assert self._host is not None
        from yeam.engine.partial import GUARD

        losses = _Losses(str(self._host.ref), device)
        known = losses.host(self.texts)
        work = output.partial / GUARD
        shutil.rmtree(work, ignore_errors=True)
        trials: list[Trial] = []
        made: dict[float, Output] = {}

        def drop(strengths: Sequence[float]) -> None:
            for strength in strengths:
                made.pop(strength).close()
                shutil.rmtree(work / str(strength), ignore_errors=True)

        def attempt(strength: float) -> bool:
            folder = output.folder
            if strength < 1:
                made[strength] = self._scaled(plan, output, work, strength, device, memory)
                folder = made[strength].folder
            scores = losses.of(folder, self.texts)
            change = scores.bits_per_byte / known.bits_per_byte - 1
            trials.append(Trial(strength, scores.nll_per_token, change))
            if self.listener is not None:
                self.listener(f"guard: strength {strength:.4g} changes the host's loss by {change:+.2%}")
            passed = change <= self.limit
            drop([each for each in made if (each == strength) != passed])  # one of them on the disk is enough
            return passed

        try:
            strength = search(attempt)
            chosen = output.folder
            if strength == 0:
                made[0.0] = self._scaled(plan, output, work, 0.0, device, memory)
            if strength < 1:
                chosen = made[strength].folder
            best = next((t for t in trials if t.strength == strength), Trial(0.0, known.nll_per_token, 0.0))
            found = GuardReport(
                host=self._host.ref.short,
                texts=tuple(Path(text).name for text in self.texts),
                limit=self.limit,
                host_loss=known.nll_per_token,
                strength=strength,
                loss=best.loss,
                change=best.change,
                trials=tuple(trials),
                donor=losses.gain(chosen, self.donor_texts) if self.donor_texts else None,
            )
            if strength < 1:
                report = _taken_over(made[strength], output, report)
        finally:
            drop(list(made))
            shutil.rmtree(work, ignore_errors=True)
        return replace(
            report,
            guard=found.to_dict(),
            notes=[*report.notes, found.sentence],
            findings=[*report.findings, found.sentence],
        )

    def _scaled(self, plan: Plan, output: Output, work: Path, strength: float, device: Device, memory: int) -> Output:
        """host + strength · (output − host), whole but for its publishing; at strength 0 the host's own values."""
        from yeam.checkpoint import open_checkpoint
        from yeam.engine.output import Output
        from yeam.engine.run import run

        assert self._host is not None
        host = self._host.checkpoint
        (work / str(strength)).mkdir(parents=True, exist_ok=True)
        with closing(open_checkpoint(str(output.folder))) as full:
            jobs = tuple(_between(job, self._inputs[job.name], strength, host) for job in plan.jobs)
            models = tuple(Model(c.reference, c.fingerprint(), c.reference) for c in (host, full))
            blend = replace(plan, method="task_arithmetic", models=models, jobs=jobs, plugins=(), stages=())
            made = Output(blend, work / str(strength) / "model", resume=False)
            try:
                run(blend, [host, full], made, device=device, memory=memory)
                shards = {shard.file for shard in plan.shards}
                for path in output.folder.iterdir():
                    if path.name not in shards:
                        copy = shutil.copytree if path.is_dir() else shutil.copy2
                        copy(path, made.folder / path.name)
            except BaseException:
                made.close()
                raise
        return made


def search(attempt: Callable[[float], bool]) -> float:
    """The largest strength tried that passes: 1, then halves of it, then between the last two; 0 where none passes."""
    failed = strength = 1.0
    for _ in range(HALVINGS + 1):
        if attempt(strength):
            break
        failed, strength = strength, strength / 2
    else:
        return 0.0
    if strength == 1:
        return strength
    for _ in range(BISECTIONS):
        middle = (strength + failed) / 2
        if attempt(middle):
            strength = middle
        else:
            failed = middle
    return strength


def host_of(loaded: LoadedRecipe) -> ModelRef:
    """The model that a merge may not harm: the recipe's base model, else the only model that it merges."""
    base = loaded.recipe.base_model
    refs = [base] if base is not None else list(dict.fromkeys(ref for _, ref in loaded.recipe.references()))
    if len(refs) != 1:
        raise ConfigError(
            f"{loaded.name}: a guard needs to know which of {len(refs)} models must not get worse",
            "name it as `base_model:`",
        )
    if isinstance(refs[0], StageRef):
        raise ConfigError(
            f"{loaded.name}: the host {refs[0].path!r} is a stage of the recipe, and a guard needs a model",
            "merge in two runs",
        )
    return refs[0]


def _between(job: Job, host_tensor: str, strength: float, host: Checkpoint) -> Job:
    """The job that writes one tensor of the way from the host (model 0) to the output (model 1)."""
    there, here = Input(0, host_tensor), Input(1, job.name)
    info = host.tensors[host_tensor]
    plain = replace(
        job, parameters={}, companions={}, base=None, exact=False, resident=host.resident_bytes(host_tensor)
    )
    work = "F64" if job.dtype == "F64" else "F32"
    if not DTYPES[job.dtype].is_float or (strength == 0 and info.dtype == job.dtype):
        return replace(plain, method="copy", sources=(there,))
    if strength == 0:
        return replace(plain, method="passthrough", sources=(there,), work=work)
    values = {"weight": (1.0,), "lambda_": strength}
    return replace(plain, method="task_arithmetic", sources=(here,), base=there, parameters=values, work=work)


def _taken_over(made: Output, output: Output, report: MergeReport) -> MergeReport:
    """The tensors of `made` in the place of the output's, and in its report."""
    output.restart()
    for job in output.plan.jobs:
        with open(made.folder / made.plan.shards[job.shard].file, "rb") as file:
            file.seek(job.begin)
            at = 0
            while at < job.nbytes:
                block = file.read(min(1 << 24, job.nbytes - at))
                output.write(job, at, memoryview(block))
                at += len(block)
    tensors = []
    for tensor in report.tensors:
        entry = made.finished[tensor["name"]]
        norm = {"norm": entry["facts"]["norm"]} if "norm" in entry["facts"] else {}
        tensors.append({**tensor, "xxh3": entry["xxh3"], **norm})
    return replace(report, tensors=tensors)


class _Losses:
    """Scores of folders on texts, on one device; the host's once for each text."""

    def __init__(self, host: str, device: Device) -> None:
        self._reference, self._device = host, str(device)
        self._known: dict[tuple[str, ...], Scores] = {}

    def host(self, texts: Sequence[str]) -> Scores:
        if tuple(texts) not in self._known:
            self._known[tuple(texts)] = self.of(self._reference, texts)
        return self._known[tuple(texts)]

    def of(self, folder: str | Path, texts: Sequence[str]) -> Scores:
        from yeam.api import evaluate

        return evaluate(folder, list(texts), stride=STRIDE, device=self._device).scores

    def gain(self, folder: Path, texts: Sequence[str]) -> Gain:
        before, after = self.host(texts), self.of(folder, texts)
        return Gain(before.nll_per_token, after.nll_per_token, after.bits_per_byte / before.bits_per_byte - 1)
