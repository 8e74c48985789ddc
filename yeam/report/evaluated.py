"""Evaluation results of a model folder: kept beside its report, shown in its card.

`yeam_eval.json` holds one entry for each text, protocol, context and stride; a new result replaces the one of the same kind. The card
gets a section between two markers, and the Hub's `model-index` in its front matter.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yeam.checkpoint.folder import read_json
from yeam.errors import OutputError, UserError
from yeam.report.card import plain_text
from yeam.report.files import write_text

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from yeam.evaluation.results import Evaluation

FILE = "yeam_eval.json"
_BEGIN, _END = "<!-- yeam evaluation -->", "<!-- end of yeam evaluation -->"
_KIND = ("texts", "protocol", "context", "stride")


def check_folder(model: str) -> Path:
    """The folder whose card can be updated. Raises UserError where the model is no folder of one's own, or its card is damaged."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"{model}: is not a folder, so there is no card to update", "merge or download the model to a folder first"
        )
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{folder} cannot be written", "choose a model folder that you may write to")
    with_results(_card(folder), stored(folder), folder.resolve().name)
    return folder


def _card(folder: Path) -> str:
    path = folder / "README.md"
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else f"# {plain_text(folder.resolve().name)}\n"
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}", "repair the model card, or remove it") from error


def stored(folder: Path) -> list[dict[str, Any]]:
    """The results kept in a model folder, oldest first; [] where there are none. Raises CheckpointError for a damaged file."""
    if not (folder / FILE).is_file():
        return []
    entries = read_json(folder / FILE).get("evaluations", [])
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def update(folder: Path, evaluation: Evaluation) -> None:
    """Keep a result in the folder and show it in its card. Raises OutputError where the folder cannot be written."""
    entry = _published(evaluation.to_dict())
    others = [known for known in stored(folder) if any(known.get(key) != entry[key] for key in _KIND)]
    entries = [*others, entry]
    write_text(folder / FILE, json.dumps({"evaluations": entries}, indent=1, ensure_ascii=False) + "\n")
    write_text(folder / "README.md", with_results(_card(folder), entries, folder.resolve().name))


def _published(entry: dict[str, Any]) -> dict[str, Any]:
    """Without the places of folders on the author's machine, which are nobody else's business."""
    named = {**entry, "model": leaf_name(entry["model"]), "texts": list(entry["texts"])}
    named["against"] = [{**other, "reference": leaf_name(other["reference"])} for other in entry["against"]]
    return {key: value for key, value in named.items() if key not in ("notes", "seconds", "tokens_per_second")}


def leaf_name(label: str) -> str:
    """A model's label without the folders of an absolute path: those of its adapter too."""
    parts = [Path(part).name if part.startswith(("/", "~", "..")) else part for part in label.split("+")]
    return "+".join(parts)


def with_results(card: str, entries: Sequence[Mapping[str, Any]], name: str) -> str:
    """A card with a section for these results and a `model-index` in its front matter; the rest of it stays as it is.

    Raises UserError where the front matter is no YAML.
    """
    import yaml
    from huggingface_hub import ModelCard

    try:
        body = ModelCard(card, ignore_metadata_errors=True)
    except (ValueError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"README.md: its front matter cannot be read: {reason}", "repair the model card, or remove it"
        ) from error
    data: Any = body.data
    data.model_name = name
    data.eval_results = [result for entry in entries for result in _results(entry)]
    text = re.sub(rf"{_BEGIN}.*?{_END}\n*", "", str(body.text), flags=re.DOTALL)
    section = f"{_BEGIN}\n{section_of(entries)}\n{_END}\n"
    before, heading, after = text.partition("\n## Recipe\n")
    if not heading:
        before, after = text.rstrip() + "\n", ""
    front = f"---\n{data.to_yaml(line_break=chr(10))}\n---\n"
    return f"{front}{before.lstrip(chr(10))}\n{section}{heading}{after}"


def section_of(entries: Sequence[Mapping[str, Any]]) -> str:
    """The section "Evaluation" of a card, in Markdown; names are escaped."""
    lines = [
        "## Evaluation",
        "",
        "| text | context / stride | model | perplexity | nats a token | bits a byte |",
        "|---|---|---|---|---|---|",
    ]
    for entry in entries:
        place = [plain_text(_title(entry)), f"{entry['context']} / {entry['stride']}"]
        models = [("this model", entry), *((a["reference"], a["scores"]) for a in entry["against"])]
        for number, (label, scores) in enumerate(models):
            first = place if number == 0 else ["", ""]
            shown = [_measured(scores, key) for key in ("perplexity", "nll_per_token", "bits_per_byte")]
            lines.append("| " + " | ".join([*first, plain_text(label), *shown]) + " |")
    compared = [(entry, other) for entry in entries for other in entry["against"] if other.get("all")]
    if compared:
        lines += [
            "",
            "| against | text | tokens | top-1 agreement | KL (nats) | loss difference |",
            "|---|---|---|---|---|---|",
        ]
    for entry, other in compared:
        for kind in ("all", "easy", "hard"):
            part = other.get(kind)
            if part and part["tokens"]:
                first = [plain_text(other["reference"]), plain_text(_title(entry))] if kind == "all" else ["", ""]
                shown = [_measured(part, key) for key in ("top1_agreement", "kl", "nll_difference")]
                lines.append("| " + " | ".join([*first, f"{kind} ({part['tokens']:,})", *shown]) + " |")
    notes = ["Means ± standard errors."]
    if compared:
        notes.append(
            "A token is easy where the reference finds the right one most likely; KL is KL(reference ‖ this model)."
        )
    return "\n".join([*lines, "", " ".join(notes)])


def _title(entry: Mapping[str, Any]) -> str:
    return "WikiText-2, test split" if entry["protocol"] == "wikitext-2" else ", ".join(entry["texts"])


def _measured(scores: Mapping[str, Any], key: str) -> str:
    value, error = scores.get(key), scores.get(f"{key}_stderr")
    if value is None:
        return "–"
    return f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}")


def _results(entry: Mapping[str, Any]) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    wikitext = entry["protocol"] == "wikitext-2"
    dataset: dict[str, Any] = {"dataset_type": "text", "dataset_name": _title(entry)}
    if wikitext:
        dataset = {
            "dataset_type": "wikitext", "dataset_name": "WikiText-2", "dataset_config": "wikitext-2-raw-v1",
            "dataset_split": "test",
        }  # fmt: skip
    kinds = (("perplexity", "Perplexity"), ("bits_per_byte", "Bits per byte"))
    return [
        EvalResult(
            task_type="text-generation",
            metric_type=key,
            metric_name=label,
            metric_value=entry[key],
            metric_args={"context": entry["context"], "stride": entry["stride"]},
            **dataset,
        )
        for key, label in kinds
        if entry.get(key) is not None
    ]
