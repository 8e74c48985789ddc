"""The small files of the output: index, config, tokenizer, chat template, card, recipe and report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from yeam.checkpoint.base import Checkpoint
from yeam.checkpoint.beside import MODULES
from yeam.engine.output import Output
from yeam.planning.files import small_files
from yeam.planning.jobs import Plan, index_json
from yeam.recipe import LoadedRecipe
from yeam.report.card import model_card
from yeam.report.licence import Licensing
from yeam.report.merge_report import MergeReport


def assemble(
    plan: Plan,
    loaded: LoadedRecipe,
    checkpoints: Sequence[Checkpoint],
    output: Output,
    report: MergeReport,
    licensing: Licensing | None = None,
) -> None:
    """Write everything but the tensors into the output. Raises CheckpointError where a donor's file cannot be read."""
    if len(plan.shards) > 1:
        output.add_file("model.safetensors.index.json", index_json(plan))
    library = "transformers"
    for name, content in small_files(plan, checkpoints):
        output.add_file(name, content)
        library = "sentence-transformers" if name == MODULES else library
    for name, bring in checkpoints[plan.donor].pending.items():
        output.add_file(name, bring().read_bytes())
    card = model_card(plan, loaded, report.out.name, licensing, report.findings, library=library)
    output.add_file("README.md", card)
    output.add_file("yeam_config.yaml", loaded.text)
    # the folder's place on the author's machine is nobody else's business
    output.add_file("yeam_report.json", replace(report, out=Path(report.out.name)).to_json())
