"""A transformers model whose weights are those of a plan in memory, without a folder of them."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from yeam.engine.held import Held
from yeam.errors import CheckpointError, UserError
from yeam.evaluation.code import bring_code
from yeam.evaluation.folders import Source
from yeam.evaluation.loading import Loaded, Placement, explained, place, quiet, ready
from yeam.planning.jobs import Plan
from yeam.planning.members import Members
from yeam.planning.stages import StageCheckpoint

_ANY_AMOUNT = 1 << 62


class Vessel:
    """A model that takes the tensors of one plan after another.

    The first plan's tensors go through transformers, which may rename, stack or leave out what a file holds. Where its parameters turn
    out to be the plan's tensors one by one, later plans write straight into them; else the model is made anew each time.
    """

    def __init__(self, device: str, dtype: str, trust_remote_code: bool) -> None:
        self._device, self._dtype, self._trust = device, dtype, trust_remote_code
        self._source: Source | None = None
        self._checkpoint: StageCheckpoint | None = None
        self._placement: Placement | None = None
        self._loaded: Loaded | None = None
        self._key: Any = None
        self._unwanted: frozenset[str] = frozenset()
        self._direct = False

    def begin(self, name: str, plan: Plan, members: Members, held: Held) -> None:
        """Prepare `held` for the plan's tensors, and make sure that there is room for a model of them, called `name`.

        Raises UserError for an unknown device or dtype, and where the model does not fit into memory; CheckpointError without config.
        """
        if self._key != _key(plan):
            held.forget()
            self.close()
            self._checkpoint = StageCheckpoint(name, plan, members)
            self._checkpoint.reader = held
            if self._trust:
                for index in dict.fromkeys((plan.tokenizer_donor, plan.donor)):
                    bring_code(self._checkpoint.folder, members[index].checkpoint.folder)
            self._source = Source(name, self._checkpoint.folder, self._checkpoint)
            self._placement = self._placed(self._source)
            self._key = _key(plan)
        held.begin(plan, self._unwanted)

    def filled(self, held: Held) -> Loaded:
        """The model with the tensors that `held` has, which `begin` has prepared.

        Raises CheckpointError where transformers cannot make the model, or needs weights that the plan does not have.
        """
        if self._loaded is not None and self._direct:
            return self._loaded
        source, placement = self._source, self._placement
        assert source is not None and placement is not None and self._checkpoint is not None
        tokenizer = self._loaded.tokenizer if self._loaded is not None else None
        self._loaded = None  # before another is made
        with quiet():
            model, info = _made(source, placement, dict(held.tensors), self._trust)
        self._loaded = ready(source, model, info, placement, self._trust, tokenizer)
        self._unwanted = frozenset(info["unexpected_keys"])
        parameters = model.state_dict()
        wanted = {name: tensor for name, tensor in held.tensors.items() if name not in self._unwanted}
        self._checkpoint.tensors = {name: self._checkpoint.tensors[name] for name in wanted}
        self._direct = all(name in parameters and _equal(parameters[name], value) for name, value in wanted.items())
        if self._direct:
            held.move({name: parameters[name] for name in wanted})
        return self._loaded

    def close(self) -> None:
        """Let go of the model and its small files."""
        if self._checkpoint is not None:
            self._checkpoint.dispose()
        self._checkpoint, self._source, self._loaded, self._key = None, None, None, None
        self._unwanted, self._direct = frozenset(), False

    def _placed(self, source: Source) -> Placement:
        if not source.checkpoint.config:
            raise CheckpointError(
                "the merged model has no config.json, so transformers cannot load it", "add one to the first model"
            )
        placement = place([source], self._dtype, self._device, _ANY_AMOUNT)[0]
        try:
            fits = not place([source], self._dtype, self._device, None)[0].offloaded
        except UserError:  # it would need accelerate to stay on the disk, which does not help here
            fits = False
        if not fits:
            need = sum(info.numel for info in source.weights) * placement.dtype.itemsize
            raise UserError(
                f"a candidate is held in memory, and its weights, {need / 2**30:.1f} GiB in {placement.dtype}, do not fit",
                "pass --dtype bfloat16 for half of that, or use a machine with more memory",
            )
        return placement


def _made(source: Source, placement: Placement, tensors: dict[str, Tensor], trust: bool) -> tuple[Any, dict[str, Any]]:
    """(model, loading info) as from_pretrained of a folder gives them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with explained(source.label):
        config = AutoConfig.from_pretrained(source.folder, local_files_only=True, trust_remote_code=trust)
        with torch.device("meta"):
            cls = type(AutoModelForCausalLM.from_config(config, trust_remote_code=trust))
        model, info = cls.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=placement.dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the loading info, by name
        )
        return model.to(placement.device).eval().requires_grad_(False), info


def _key(plan: Plan) -> Any:
    """What a model is made from, but for the values of its weights."""
    config = json.dumps(plan.config, sort_keys=True)
    return config, plan.vocabulary, [(job.name, job.shape, job.dtype) for job in plan.jobs]


def _equal(parameter: Tensor, value: Tensor) -> bool:
    return parameter.shape == value.shape and torch.equal(parameter.cpu(), value.to(parameter.dtype))
