"""Fitting the strengths of layer groups by gradients through the sum of the target and its steps.

Legend: G groups, S windows, T tokens of a window, N positions, V vocabulary.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yeam.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from yeam.distill.deltas import Deltas
    from yeam.distill.groups import Group
    from yeam.distill.teachers import Predictions
    from yeam.evaluation.loading import Loaded
    from yeam.planning.stages import Pipeline

Listener = Callable[[int, int], None]
"""Called with (tokens read so far, of how many)."""

WINDOW = 128  # tokens
LEAST_WINDOW = 16
HELD_OUT = 10  # every tenth window is held out
MOST_TOKENS = 8192  # of the text; more is thinned out evenly, so that the time stays bounded
BATCH_TOKENS = 512
STEPS = 24
RATE = 0.2
AVERAGED = 8  # of the last steps


@dataclass(frozen=True)
class Fitted:
    """`strengths` as the plugin takes them, what to tell the user, and KL on the held-out tenth: of the target (strength 0), of the
    injection as it is (1), and of the chosen strengths."""

    strengths: list[dict[str, Any]]
    notes: list[str]
    held_out: dict[str, float]


def fit_strengths(
    recipe: Mapping[str, Any],
    texts: Sequence[str],
    *,
    device: str = "auto",
    memory: int | str | None = None,
    allow_nan: bool = False,
    listener: Listener | None = None,
) -> Fitted:
    """Fit the strengths of a recipe that `yeam.injection.inject_recipe` made to text files. Options as in `yeam.merge`.

    The target (strength 0) and the injection as it is (strength 1) are candidates: the choice is never worse than the target on the
    text's held-out tenth. Raises UserError for text that is empty or too short, CheckpointError for models that cannot be run or
    read the text as other tokens.
    """
    from yeam.engine.memory import default_budget, held_already
    from yeam.evaluation.loading import quiet
    from yeam.evaluation.texts import read_documents
    from yeam.planning.stages import Pipeline
    from yeam.recipe import load_recipe, parse_size

    documents = read_documents(texts)
    budget = default_budget() if memory is None else parse_size(memory)
    with ExitStack() as stack:
        pipeline = Pipeline(load_recipe(recipe), allow_nan=allow_nan)
        stack.callback(pipeline.close)
        if all(job.method != "inject" for job in pipeline.plan.jobs):
            raise UserError(
                "no strength can be fitted: nothing is injected, or from sources of another shape than the target's",
                "inject without --distill; --guard takes the strength back where the target would get worse",
            )
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="yeam-distill-")))
        stack.enter_context(quiet())
        names = _models(recipe)
        _check_vocabularies(pipeline, names)
        with _loaded(names[0], device, scratch) as target:
            windows_ST = _windows(target, documents)
            steps = STEPS * max(1, BATCH_TOKENS // windows_ST.shape[1]) * windows_ST.shape[1]
            total = len(names) * windows_ST.numel() + steps
            meter = _Meter(total, listener)
            wanted, agreed = _wanted(target, names[1:], windows_ST, device, scratch, meter)
            from yeam.distill.deltas import make_deltas

            deltas = make_deltas(pipeline, scratch, device=device, memory=held_already() + budget)
            return _fit(target, deltas, _roles(recipe), windows_ST, wanted, agreed, meter)


class _Meter:
    def __init__(self, total: int, listener: Listener | None) -> None:
        self._total, self._done, self._listener = total, 0, listener

    def add(self, tokens: int) -> None:
        self._done = min(self._total, self._done + tokens)
        if self._listener is not None:
            self._listener(self._done, self._total)


def _models(recipe: Mapping[str, Any]) -> list[str]:
    """The target and the sources."""
    settings = recipe["plugins"][0]["inject"]
    return [recipe["models"][0]["model"], *dict.fromkeys(settings["sources"])]


def _roles(recipe: Mapping[str, Any]) -> list[str]:
    from yeam.plugins.inject import DEFAULT_ROLES

    roles = recipe["plugins"][0]["inject"].get("roles", DEFAULT_ROLES)
    return [word.strip() for word in roles.split(",")] if isinstance(roles, str) else list(roles)


def _check_vocabularies(pipeline: Pipeline, names: Sequence[str]) -> None:
    from yeam.recipe import ModelRef
    from yeam.vocabulary.files import tokenizer_folder
    from yeam.vocabulary.tokens import vocabularies_differ

    members = pipeline.result.members
    target, *sources = (members.of(ModelRef.parse(name)) for name in names)
    for source in sources:
        if vocabularies_differ(tokenizer_folder(target.checkpoint), tokenizer_folder(source.checkpoint)):
            raise CheckpointError(
                f"{source.ref} has other tokens than the target {target.ref}: their predictions cannot be compared",
                "inject without --distill, or leave this source out",
            )


@contextmanager
def _loaded(reference: str, device: str, scratch: Path) -> Iterator[Loaded]:
    """A model in memory, while the context lasts; float32, as strengths are fitted through sums with small steps."""
    from yeam.evaluation.folders import loadable
    from yeam.evaluation.loading import load, place

    with loadable(reference) as source:
        placement = place([source], "float32", device, None)[0]
        if placement.offloaded:
            raise UserError(
                f"{source.label} does not fit into memory in float32, and strengths are fitted with the whole model there",
                "inject without --distill, or on a larger machine",
            )
        yield load(source, placement, str(scratch / "offload"))


def _windows(target: Loaded, documents: Sequence[Any]) -> Tensor:
    """[S, T] windows of the text, at least ten; the documents joined by the prefix that `yeam eval` puts before each."""
    import torch

    from yeam.evaluation.tokens import tokenized

    ids = torch.cat(tokenized(target, target, documents, []).ids)
    width = min(WINDOW, target.positions or WINDOW, len(ids) // HELD_OUT)
    if width < LEAST_WINDOW:
        raise UserError(
            f"the text has {len(ids)} tokens, too few to fit to",
            f"give at least {LEAST_WINDOW * HELD_OUT} tokens; 20 kB is a good size",
        )
    windows_ST = ids[: len(ids) // width * width].view(-1, width)
    most = MOST_TOKENS // width
    if len(windows_ST) > most:
        windows_ST = windows_ST[torch.linspace(0, len(windows_ST) - 1, most).long()]
    return windows_ST


def _wanted(
    target: Loaded, sources: Sequence[str], windows_ST: Tensor, device: str, scratch: Path, meter: _Meter
) -> tuple[Predictions, float]:
    from yeam.distill.teachers import mixed, predictions_of

    own = predictions_of(target, windows_ST, meter.add)
    theirs = []
    for name in sources:
        with _loaded(name, device, scratch) as source:
            theirs.append(predictions_of(source, windows_ST, meter.add))
    return mixed(theirs, own, int(target.vocabulary or 0))


class _Student:
    """The target's model with the steps added at some strengths; knows the gradient of its loss in them.

    The weights hold target + s · Δ; what changes is added in place, so that nothing is in memory twice. A weight's gradient is
    multiplied with its step as soon as it is there, and dropped.
    """

    def __init__(self, target: Loaded, deltas: Deltas, groups: Sequence[Group], wanted: Predictions) -> None:
        import torch

        self.target, self.deltas, self.wanted = target, deltas, wanted
        self.group_of = {name: g for g, group in enumerate(groups) for name in group.jobs}
        self.gradient_G = torch.zeros(len(groups), dtype=torch.float64)
        limits = [max(deltas.limits[name] for name in group.jobs) for group in groups]
        self.most_G = torch.tensor(limits)  # beyond, the budget holds every step of the group
        self._strength = dict.fromkeys(self.group_of, 0.0)
        self._is_free = dict.fromkeys(self.group_of, True)
        parameters = dict(target.model.named_parameters(remove_duplicate=False))
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        self._weights = {}
        for job in deltas.jobs:
            weight = parameters.get(job.sources[0].tensor)
            if weight is None or tuple(weight.shape) != job.shape:
                raise CheckpointError(
                    f"{target.label}: transformers keeps {job.name} under another name or in another shape",
                    "inject without --distill",
                )
            self._weights[job.name] = weight
            weight.requires_grad_(True)
            weight.register_post_accumulate_grad_hook(self._hook(job.name))

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def gather(weight: Tensor) -> None:
            assert weight.grad is not None
            if self._is_free[name]:
                delta = self.deltas.read(name).to(weight.device, weight.dtype)
                self.gradient_G[self.group_of[name]] += float((weight.grad * delta).sum())
            weight.grad = None

        return gather

    def set(self, strength_G: Tensor) -> None:
        """Move the weights to these strengths, each as far as its budget lets it."""
        import torch

        with torch.no_grad():
            for name, weight in self._weights.items():
                asked, limit = float(strength_G[self.group_of[name]]), self.deltas.limits[name]
                wanted, self._is_free[name] = min(asked, limit), asked <= limit * (1 + 1e-6)
                if wanted != self._strength[name]:
                    delta = self.deltas.read(name).to(weight.device, weight.dtype)
                    weight.add_(delta, alpha=wanted - self._strength[name])
                    self._strength[name] = wanted

    def divergence(self, windows_ST: Tensor, rows: Tensor) -> Tensor:
        """Mean KL in nats a position over some windows."""
        import torch

        from yeam.distill.teachers import divergence

        width = windows_ST.shape[1] - 1
        batch_BT = windows_ST[rows].to(self.target.placement.device)
        logits_NV = self.target.model(input_ids=batch_BT, use_cache=False).logits[:, :-1].flatten(0, 1).float()
        pick_N = (rows[:, None] * width + torch.arange(width)).flatten()
        return divergence(logits_NV, self.wanted, pick_N) / len(pick_N)

    def score(self, windows_ST: Tensor, rows: Tensor, strength_G: Tensor) -> float:
        """KL over windows without gradients."""
        import torch

        self.set(strength_G)
        size = max(1, BATCH_TOKENS // windows_ST.shape[1])
        with torch.inference_mode():
            found = [(float(self.divergence(windows_ST, part)), len(part)) for part in torch.split(rows, size)]
        return sum(value * count for value, count in found) / len(rows)


def _fit(
    target: Loaded,
    deltas: Deltas,
    roles: Sequence[str],
    windows_ST: Tensor,
    wanted: Predictions,
    agreed: float,
    meter: _Meter,
) -> Fitted:
    import torch

    from yeam.distill.groups import groups_of

    groups = groups_of(deltas.jobs, roles)
    student = _Student(target, deltas, groups, wanted)
    order = torch.arange(len(windows_ST))
    held_out, training = order[order % HELD_OUT == HELD_OUT - 1], order[order % HELD_OUT != HELD_OUT - 1]
    strength_G = student.most_G.clamp(max=1.0).requires_grad_()
    optimizer = torch.optim.Adam([strength_G], lr=RATE, betas=(0.8, 0.95))
    generator = torch.Generator().manual_seed(0)
    size = max(1, BATCH_TOKENS // windows_ST.shape[1])
    queue = torch.empty(0, dtype=torch.long)
    seen: list[Tensor] = []
    for step in range(STEPS):
        if len(queue) < size:
            queue = torch.cat([queue, training[torch.randperm(len(training), generator=generator)]])
        rows, queue = queue[:size], queue[size:]
        student.set(strength_G.detach())
        student.gradient_G.zero_()
        student.divergence(windows_ST, rows).backward()  # type: ignore[no-untyped-call]
        if not bool(student.gradient_G.isfinite().all()):
            raise CheckpointError(f"{target.label}: predictions on the text are not finite", "check the models")
        strength_G.grad = student.gradient_G.float()
        optimizer.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        optimizer.step()
        with torch.no_grad():
            torch.minimum(strength_G.clamp_(min=0), student.most_G, out=strength_G)
        seen.append(strength_G.detach().clone())
        meter.add(windows_ST[rows].numel())
    averaged_G = torch.stack(seen[-AVERAGED:]).mean(dim=0)
    candidates = {
        "the target": torch.zeros(len(groups)),
        "the injection as it is": torch.ones(len(groups)),
        "half of the fitted strengths": averaged_G / 2,
        "the fitted strengths": averaged_G,
    }
    scores = {name: student.score(windows_ST, held_out, values) for name, values in candidates.items()}
    best = min(scores, key=lambda name: scores[name])
    chosen_G = candidates[best]
    note = (
        f"distill: {len(groups)} strengths fitted to {len(training)} windows of {windows_ST.shape[1]} tokens; "
        f"the sources agree to {agreed:.0%}; KL on the {len(held_out)} held-out ones is {scores['the target']:.4f} for the target, "
        f"{scores['the injection as it is']:.4f} for the injection as it is, {scores['the fitted strengths']:.4f} when fitted; "
        f"taken: {best}"
    )
    kept = {"target": scores["the target"], "injection": scores["the injection as it is"], "chosen": scores[best]}
    strengths = [group.entry(float(value)) for group, value in zip(groups, chosen_G)]
    return Fitted(strengths, [note], kept)
