"""The evaluation itself: documents, models, one or several side by side, and the sums."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from yeam.evaluation.folders import loadable
from yeam.evaluation.loading import Loaded, load, place, quiet
from yeam.evaluation.passes import Listener, Meter, SideBySide, Track
from yeam.evaluation.results import Against, Evaluation, Scores, scores_of
from yeam.evaluation.texts import read_documents
from yeam.evaluation.tokens import context_of, tokenized
from yeam.evaluation.windows import check_windows
from yeam.report.merge_report import versions

STRIDE = 64  # tokens, where the context is not shorter


def run(
    model: str,
    text: Sequence[str],
    against: Sequence[str],
    *,
    stride: int | None,
    context: int | None,
    wikitext2: bool,
    batch: int | None,
    dtype: str,
    device: str,
    memory: int | None,
    trust_remote_code: bool,
    listener: Listener | None,
) -> Evaluation:
    """`yeam.evaluate`, with every option resolved; see there."""
    check_windows(stride, context, batch)
    stride = STRIDE if stride is None else stride
    documents = read_documents(text, wikitext2=wikitext2)
    started = time.monotonic()
    with ExitStack() as stack:
        sources = [stack.enter_context(loadable(name, code=trust_remote_code)) for name in (model, *against)]
        placements = place(sources, dtype, device, memory)
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="yeam-eval-"))
        stack.enter_context(quiet())
        models = [
            load(source, placement, f"{scratch}/{number}", trust_remote_code=trust_remote_code)
            for number, (source, placement) in enumerate(zip(sources, placements))
        ]
        notes = [f"{m.label}: {note}" for m in models for note in m.source.checkpoint.notes]
        offloaded = any(m.placement.offloaded for m in models)
        if offloaded:
            notes.append("the weights do not fit into memory: layers are read from the disk as they are needed")
        length = context_of(models, context)
        tokens = [tokenized(m, models[0], documents, notes) for m in models]
        if max(len(ids) for ids in tokens[0].ids) <= length:
            notes.append(f"the text is shorter than the context of {length} tokens: every document is one window")
        meter = Meter(sum(t.targets for t in tokens), listener)
        together = [n for n, t in enumerate(tokens) if t.same_as(tokens[0])]
        groups = [together, *([n] for n in range(len(models)) if n not in together)]
        found: dict[int, Track] = {}
        with torch.inference_mode():
            for group in groups:
                members = [models[n] for n in group]
                side_by_side = SideBySide(members, tokens[group[0]], length, min(stride, length), batch, meter)
                found |= dict(zip(group, side_by_side.run()))
        scores = [scores_of(found[n].nll_N, tokens[n].nbytes) for n in range(len(models))]
        entries = [_against(found[0], models[n], scores[n], found[n]) for n in range(1, len(models))]
        notes += [
            f"{models[n].label}: reads the text as other tokens, so only bits a byte compare"
            for n in range(1, len(models))
            if n not in together
        ]
        seconds = time.monotonic() - started
        first = models[0]
        return Evaluation(
            model=first.label,
            texts=tuple(Path(path).name or str(path) for path in text),
            protocol="wikitext-2" if wikitext2 else "text",
            documents=len(documents),
            context=length,
            stride=min(stride, length),
            scores=scores[0],
            against=tuple(entries),
            device=str(first.placement.device),
            dtype=str(first.placement.dtype).removeprefix("torch."),
            offloaded=offloaded,
            seconds=round(seconds, 3),
            tokens_per_second=round(meter.fed / max(meter.seconds, 1e-9), 1),
            notes=tuple(dict.fromkeys(notes)),
            versions=versions(),
        )


def _against(model: Track, loaded: Loaded, scores: Scores, track: Track) -> Against:
    comparison = track.comparison
    if comparison is None:
        return Against(loaded.label, scores, None, None, None)
    whole, easy, hard = (comparison.summary(model.nll_N, track.nll_N, kind) for kind in (None, True, False))
    return Against(loaded.label, scores, whole, easy, hard)
