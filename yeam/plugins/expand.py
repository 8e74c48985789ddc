"""Plugin `expand`: a small model in the shape of a larger one, computing what it computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from yeam.errors import ConfigError
from yeam.families.configs import at
from yeam.planning.jobs import Input, Job, Plan
from yeam.plugins.registry import PluginContext, plugin

TOKENS = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")


@plugin("expand", references=("to",))
def expand(plan: Plan, context: PluginContext, *, to: str) -> Plan:
    """The recipe's model in the shape of the model `to`, with its own vocabulary: wider, deeper, more heads, the same outputs.

    The starting point for training a larger model, and for merging a small model's descendants into one of that shape. Raises
    ConfigError for a recipe of several models, CheckpointError where the shape cannot hold the model exactly.
    """
    from yeam.transfer.body import Body
    from yeam.transfer.expanded import ExpandedCheckpoint

    host = context.member(to)
    taking_part = {source.model for job in plan.jobs for source in job.reads}
    if len(taking_part) != 1:
        raise ConfigError("`expand` takes a recipe of one model", "expand each model by itself, in a stage of its own")
    member = context.members[taking_part.pop()]
    small, shape = Body(member.checkpoint, member.anatomy), Body(host.checkpoint, host.anatomy)
    expanded = context.add(f"{member.ref.label} (in the shape of {host.ref.label})", ExpandedCheckpoint(small, shape))
    jobs = []
    for name, info in expanded.checkpoint.tensors.items():
        meaning = expanded.anatomy.tensors[name]
        dtype = next((job.dtype for job in plan.jobs if job.name == name), plan.jobs[0].dtype)
        jobs.append(
            Job(
                name=name,
                shape=info.shape,
                dtype=dtype,
                role=meaning.role,
                method="passthrough",
                sources=(Input(expanded.index, name),),
                work=info.dtype,
                roles=tuple(sorted(meaning.roles)),
                layer=meaning.layer,
                depth=expanded.depth,
                transposed=meaning.transposed,
            )
        )
    return replace(plan, jobs=tuple(jobs), config=_config(host.checkpoint.config, plan.config, host.anatomy.text_path))


def _config(shape: Mapping[str, Any], own: Mapping[str, Any] | None, path: tuple[str, ...]) -> dict[str, Any]:
    """The host's config with the small model's vocabulary and epsilon, and a head of its own."""
    from yeam.transfer.place import EPSILONS

    own = own or {}
    kept = {key: own[key] for key in EPSILONS if key in own and key in (at(shape, path) or {})}
    kept |= {key: own[key] for key in (*TOKENS, "torch_dtype", "dtype") if key in own}
    config: dict[str, Any] = {**shape, "tie_word_embeddings": False}
    if not path:
        return config | kept
    return config | {path[0]: {**config[path[0]], **kept, "tie_word_embeddings": False}}
