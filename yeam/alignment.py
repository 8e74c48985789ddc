"""`yeam.align`: one model written, or only looked at, in another model's coordinates."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from yeam.arguments import checked
from yeam.errors import UserError

if TYPE_CHECKING:
    from yeam.transfer.report import AlignmentReport


@checked
def align(
    host: str | os.PathLike[str],
    source: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    judge: str | os.PathLike[str] | None = None,
    stream: str = "auto",
    **options: Any,
) -> AlignmentReport:
    """Write `source` in the coordinates of `host`: the same function, ready for any merge with it; without `out` only report.

    host, source, judge: references as in a recipe. judge, stream: as in the plugin `align`. options: those of `yeam.merge`.
    Raises what `yeam.merge` raises; CheckpointError for models of different shape, or of a family whose symmetries are not known.
    """
    from yeam.plugins.align import STREAMS
    from yeam.recipe import ModelRef

    if stream not in STREAMS:
        raise UserError(f"stream is {stream!r}", f"give one of {', '.join(STREAMS)}")
    if ModelRef.parse(os.fspath(host)) == ModelRef.parse(os.fspath(source)):
        raise UserError(f"{os.fspath(source)} is both the host and the source", "name two models")
    if out is None:
        if options:
            raise UserError(f"{', '.join(options)}: there is nothing to write without `out`", "name an output folder")
        return _survey(os.fspath(host), os.fspath(source), None if judge is None else os.fspath(judge), stream)
    from yeam.api import merge
    from yeam.recipe.problems import of_no_recipe
    from yeam.transfer.report import alignment_report

    settings = {"to": os.fspath(host), "stream": stream, **({} if judge is None else {"judge": os.fspath(judge)})}
    recipe = {
        "merge_method": "passthrough",
        "models": [{"model": os.fspath(source)}],
        "plugins": [{"align": settings}],
    }
    with of_no_recipe():
        report = merge(recipe, out, **options)
    stream_facts: dict[str, Any] = {}
    layers: dict[int, dict[str, float]] = {}
    for tensor in report.tensors:
        for facts in tensor.get("inputs", {}).values():
            if "gate" in facts:
                stream_facts = facts
            elif tensor["layer"] is not None:
                layers.setdefault(tensor["layer"], facts)
    return alignment_report(os.fspath(host), os.fspath(source), stream_facts, [layers[n] for n in sorted(layers)])


def _survey(host: str, source: str, judge: str | None, stream: str) -> AlignmentReport:
    """Match layer by layer without writing anything."""
    from contextlib import ExitStack, closing

    from yeam.checkpoint import open_checkpoint
    from yeam.planning.members import Member
    from yeam.recipe import ModelRef
    from yeam.transfer.aligned import AlignedCheckpoint
    from yeam.transfer.body import Body
    from yeam.transfer.report import alignment_report

    with ExitStack() as stack:
        bodies: list[Body] = []
        for text in (host, source, *([judge] if judge is not None else [])):
            ref = ModelRef.parse(text)
            checkpoint = stack.enter_context(
                closing(open_checkpoint(ref.path, ref.revision, ref.adapter, reference=str(ref)))
            )
            bodies.append(Body(checkpoint, Member(ref, len(bodies), checkpoint).anatomy))
        rotate = None if stream == "auto" else stream == "rotation"
        aligned = AlignedCheckpoint(bodies[1], bodies[0], judge=bodies[2] if judge else None, rotate=rotate)
        layers = [aligned.match(layer).summary() for layer in range(bodies[1].depth)]
        return alignment_report(host, source, aligned.fit, layers)
