"""One candidate after another: merged into memory, and run over both parts of the text.

Legend: N tokens of a part of the text in order.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from yeam.engine.device import choose_device
from yeam.engine.held import Held
from yeam.engine.memory import anonymous_bytes, default_budget
from yeam.engine.run import run
from yeam.engine.stages import attach
from yeam.errors import CheckpointError, ConfigError, UserError, YeamError
from yeam.evaluation.loading import Loaded
from yeam.evaluation.passes import Meter, SideBySide
from yeam.evaluation.results import mean_of
from yeam.evaluation.tokens import Tokens, context_of, tokenized
from yeam.planning.jobs import Plan
from yeam.planning.stages import Pipeline
from yeam.recipe import LoadedRecipe
from yeam.searching.model import Vessel
from yeam.searching.split import LEAST, Parts
from yeam.searching.trial import Measured


class Unusable(YeamError):
    """A candidate without a loss: values that do not go together, or that make no numbers. The search goes on."""


@dataclass(frozen=True)
class Options:
    """How candidates are merged and measured; see `yeam.search`."""

    device: str = "auto"
    dtype: str = "auto"
    memory: int | None = None
    context: int | None = None
    stride: int | None = None
    batch: int | None = None
    trust_remote_code: bool = False


class Bench:
    """Measures candidates of one recipe. What does not change from one to the next is not computed again."""

    def __init__(self, parts: Parts, options: Options) -> None:
        self.notes: list[str] = []
        self.inputs: dict[str, str] = {}  # the models that candidates are made from → their fingerprints
        self._parts, self._options = parts, options
        self._vessel = Vessel(options.device, options.dtype, options.trust_remote_code)
        self._held = Held()
        self._stages: dict[str, Held] = {}
        self._tokens: tuple[Tokens, Tokens] | None = None
        self._context = 0
        self._references: set[str] = set()

    def look(self, loaded: LoadedRecipe) -> Plan:
        """The plan of the baseline. From now on the models that it reads have to stay as they are. Raises what `yeam.plan` raises."""
        with contextlib.closing(Pipeline(loaded)) as pipeline:
            self._references = {str(ref) for ref in loaded.sources()}
            self.inputs = self._inputs_of(pipeline)
            return pipeline.plan

    def _inputs_of(self, pipeline: Pipeline) -> dict[str, str]:
        models = [model for stage in pipeline.stages for model in stage.plan.models]
        return {m.label: m.fingerprint for m in models if m.reference in self._references}

    def measure(self, loaded: LoadedRecipe) -> tuple[Measured, bytes]:
        """What a candidate comes to, and the losses of the held-out tokens as float32 [N].

        Raises Unusable where the candidate is to blame, and what `yeam.merge` and `yeam.evaluate` raise where it is not.
        """
        started = time.monotonic()
        with _blaming(ConfigError):
            pipeline = Pipeline(loaded)
        with contextlib.closing(pipeline):
            if self._inputs_of(pipeline) != self.inputs:
                raise CheckpointError(
                    "an input model has changed while the search was going on",
                    "start a new search with another --storage",
                )
            self._merge(pipeline, loaded.name)
        tuning_N, held_out_N = self._losses(self._vessel.filled(self._held))
        measured = Measured(mean_of(tuning_N), mean_of(held_out_N), time.monotonic() - started)
        return measured, held_out_N.float().numpy().tobytes()

    def _merge(self, pipeline: Pipeline, name: str) -> None:
        attach(pipeline)
        self._vessel.begin(name, pipeline.plan, pipeline.result.members, self._held)
        device = choose_device(self._options.device)
        for stage in pipeline.stages:
            held, made = self._held, stage.checkpoint
            if made is not None:
                if made.streamed:
                    continue
                held = self._stages.setdefault(made.reference, Held())
                held.begin(stage.plan)
                made.reader = held
            # the budget is of a merge; what the candidate itself takes comes on top
            memory = anonymous_bytes() + (self._options.memory or default_budget())
            with _blaming(YeamError, but=(CheckpointError,)):
                run(stage.plan, stage.members.checkpoints, held, device=device, memory=memory)

    def _losses(self, model: Loaded) -> tuple[Tensor, Tensor]:
        if self._tokens is None:
            self._tokens = self._tokenized(model)
        tuning, held_out = self._tokens
        both = Tokens([*tuning.ids, *held_out.ids], tuning.nbytes + held_out.nbytes)
        stride = self._context if self._options.stride is None else min(self._options.stride, self._context)
        with torch.inference_mode(), _blaming(CheckpointError):
            passes = SideBySide([model], both, self._context, stride, self._options.batch, Meter(both.targets, None))
            nll_N = passes.run()[0].nll_N
        return nll_N[: tuning.targets], nll_N[tuning.targets :]

    def close(self) -> None:
        """Let go of the model."""
        self._vessel.close()

    def _tokenized(self, model: Loaded) -> tuple[Tokens, Tokens]:
        self._context = context_of([model], self._options.context)
        parts = []
        for name, documents in (("tuning", self._parts.tuning), ("held-out", self._parts.held_out)):
            tokens = tokenized(model, model, documents, self.notes) if documents else Tokens([], 0)
            if tokens.targets < LEAST:
                raise UserError(
                    f"the text is too short to search on: its {name} part has {tokens.targets} tokens",
                    f"give text whose last tenth has at least {LEAST} tokens, and better thousands",
                )
            parts.append(tokens)
        self.notes = list(dict.fromkeys(self.notes))
        return parts[0], parts[1]


@contextmanager
def _blaming(*kinds: type[YeamError], but: tuple[type[YeamError], ...] = ()) -> Iterator[None]:
    """What these errors say is the candidate's own fault."""
    try:
        yield
    except kinds as error:
        if isinstance(error, but):
            raise
        raise Unusable(error.message, error.remedy) from error
