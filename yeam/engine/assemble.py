"""The small files of the output: index, config, tokenizer, chat template, card, recipe and report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from yeam.checkpoint.base import Checkpoint
from yeam.checkpoint.folder import read_json
from yeam.engine.output import Output
from yeam.errors import CheckpointError
from yeam.planning.jobs import Plan, index_json
from yeam.recipe import LoadedRecipe
from yeam.report.card import model_card
from yeam.report.merge_report import MergeReport
from yeam.vocabulary.files import OTHER_FILES, code_files, tokenizer_files

TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")


def assemble(
    plan: Plan, loaded: LoadedRecipe, checkpoints: Sequence[Checkpoint], output: Output, report: MergeReport
) -> None:
    """Write everything but the tensors into the output. Raises CheckpointError where a donor's file cannot be read."""
    if len(plan.shards) > 1:
        output.add_file("model.safetensors.index.json", index_json(plan))
    if plan.config is not None:
        output.add_file("config.json", json.dumps(plan.config, indent=2, ensure_ascii=False) + "\n")
    donor = checkpoints[plan.donor].folder
    files = {name: donor / name for name in OTHER_FILES if (donor / name).is_file()}
    files |= tokenizer_files(checkpoints[plan.tokenizer_donor].folder)
    files |= code_files(donor, dict(plan.config or {}))
    for name, path in files.items():
        if plan.chat_template is None:
            output.add_file(name, _read(path))
        elif name not in TEMPLATE_FILES:
            output.add_file(name, _without_template(path) if name == "tokenizer_config.json" else _read(path))
    if plan.chat_template is not None:
        output.add_file(TEMPLATE_FILES[0], plan.chat_template)
    output.add_file("README.md", model_card(plan, loaded, report.out.name))
    output.add_file("yeam_config.yaml", loaded.text)
    # the folder's place on the author's machine is nobody else's business
    published = {**report.to_dict(), "out": report.out.name}
    output.add_file("yeam_report.json", json.dumps(published, indent=1) + "\n")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", "check the model's files") from error


def _without_template(path: Path) -> bytes:
    """A template inside tokenizer_config.json would compete with the one that the recipe chose."""
    config = read_json(path)
    if config.pop("chat_template", None) is None:
        return _read(path)
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
