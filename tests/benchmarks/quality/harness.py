"""The same merges through lm_eval (EleutherAI's harness), on three tasks whose data is made here from the test split.

    quality_strings    exact answers, greedy, after four solved examples       output_type loglikelihood, acc
    quality_questions  which of four first lines documents a function          output_type multiple_choice, acc_norm
    quality_code       the beginnings of held-out modules                       output_type loglikelihood_rolling, bits_per_byte

Models of the tiny family stay at chance (1 in 4) on the questions. lm_eval runs as a program of its own, with the interpreter given,
offline. The other domains go through `yeam` alone.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from quality.cells import Bench, Cell, code_of, measure, update_of
from quality.report import grouped, over_seeds
from quality.rivals import YEAM, Rival
from quality.rows import documents, part
from quality.texts import Item

DOCUMENTS = {"strings": 200, "questions": 200, "code": 16}
CHARACTERS = 2000  # of a module
METRICS = {"strings": "acc", "questions": "acc_norm", "code": "bits_per_byte"}
"""The likeliest choice is the shortest one too often: questions count by character."""


def tasks(folder: Path) -> None:
    """Write the tasks and their data: a YAML and a JSON lines file each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    solved = [i for doc in part(documents("strings"), "train").values() for i in doc][:400]
    lines = {
        "strings": [_exact(item, rng.sample(solved, 4)) for item in _items("strings", DOCUMENTS["strings"])],
        "questions": _choices(_items("questions", 4 * DOCUMENTS["questions"]), rng),
        "code": [{"text": item.answer[:CHARACTERS]} for item in _items("code", DOCUMENTS["code"])],
    }
    for name, docs in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs[: DOCUMENTS[name]]))
        (folder / f"quality_{name}.yaml").write_text(yaml.safe_dump(_task(name, folder), sort_keys=False))


def _items(domain: str, count: int) -> list[Item]:
    return [item for doc in part(documents(domain), "test").values() for item in doc][:count]


def _exact(item: Item, examples: list[Item]) -> dict[str, str]:
    shown = "".join(e.prompt + e.answer for e in examples)
    return {"prompt": shown + item.prompt, "answer": item.answer}


def _choices(items: list[Item], rng: random.Random) -> list[dict[str, Any]]:
    found = []
    for item in items:
        others = rng.sample([i.answer for i in items if i.answer != item.answer], 3)
        choices = [item.answer, *others]
        rng.shuffle(choices)
        found.append({"prompt": item.prompt, "choices": choices, "label": choices.index(item.answer)})
    return found


def _task(name: str, folder: Path) -> dict[str, Any]:
    task: dict[str, Any] = {
        "task": f"quality_{name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str((folder / f"{name}.jsonl").resolve())}},
        "test_split": "test",
        "target_delimiter": "",
        "metadata": {"version": 1.0},
    }
    if name == "code":
        bits = {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
        return task | {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [bits],
        }
    accuracy = {"metric": METRICS[name], "aggregation": "mean", "higher_is_better": True}
    task |= {"doc_to_text": "{{prompt}}", "metric_list": [accuracy]}
    if name == "strings":
        return task | {"output_type": "loglikelihood", "doc_to_target": "{{answer}}"}
    return task | {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{label}}"}


def repeated(bench: Bench, cell: Cell, rivals: list[Rival], python: Path, work: Path) -> list[dict[str, Any]]:
    """Base, experts, YeAM and every rival (at its published default, and tuned as in the cell) on the three tasks.

    One row a model and task: model, task, value, stderr. Finished models are kept.
    """
    told = measure(bench, cell, rivals)
    if told is None:
        return []
    folder = (work / "lm_eval" / "tasks").resolve()
    tasks(folder)
    text = {path.name: path.read_text() for path in sorted(folder.iterdir())}
    key = {"step": "lm_eval", "tasks": text}
    rows = []
    for domain, path in {"base": bench.family.base, **cell.own}.items():
        name = "base" if domain == "base" else f"expert: {domain}"
        found = bench.cache.step(
            key | {"model": bench.digest(path)}, lambda path=path: _evaluated(python, path, folder)
        )
        rows += [{"model": name, **row} for row in found]
    for rival in (YEAM, *rivals):
        for setting in ("default",) if rival is YEAM else ("default", "tuned"):
            result = told["methods"][rival.name]
            strength = result[setting]["strength"]
            parameters = result["best_parameters"] if setting == "tuned" else rival.settings[0]
            sources = [bench.digest(s) for s in (bench.family.base, *cell.sources)]
            made = key | {"recipe": [rival.method, parameters, strength, sources], "code": code_of(rival.method)}

            def run(rival: Rival = rival, parameters: Any = parameters, strength: float = strength) -> Any:
                update = update_of(bench, cell, rival, parameters)
                return _evaluated(python, _written(bench, update, strength, work / "lm_eval" / "model"), folder)

            rows += [{"model": f"{rival.name} {setting}", **row} for row in bench.cache.step(made, run)]
    return [{"family": cell.family, "seed": cell.seed, "merged": list(cell.own), **row} for row in rows]


def _written(bench: Bench, update: dict[str, Tensor], strength: float, folder: Path) -> Path:
    """base + strength · update as a folder in bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in bench.family.base.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    made = {n: torch.add(b, update[n], alpha=strength).to(torch.bfloat16) for n, b in bench.base.items()}
    save_file(made, folder / "model.safetensors", {"format": "pt"})
    return folder


def _evaluated(python: Path, model: Path, folder: Path) -> list[dict[str, Any]]:
    """Run lm_eval on a model."""
    out = folder.parent / "out"
    for old in out.rglob("results_*.json"):
        old.unlink()
    command = [str(python), "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "8"]
    command += ["--model_args", f"pretrained={model.resolve()},dtype=float32", "--include_path", str(folder)]
    command += ["--tasks", ",".join(f"quality_{name}" for name in METRICS), "--output_path", str(out)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder.parent / "cache")}
    done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True)
    found = sorted(out.rglob("results_*.json"))
    if done.returncode or not found:
        sys.exit(f"lm_eval failed on {model}:\n{done.stderr[-3000:]}")
    results = json.loads(found[-1].read_text())["results"]
    rows = []
    for name, metric in METRICS.items():
        result = results[f"quality_{name}"]
        error = result.get(f"{metric}_stderr,none")
        rows.append(
            {"task": name, "value": result[f"{metric},none"], "stderr": error if isinstance(error, float) else None}
        )
    return rows


def harness_table(rows: list[dict[str, Any]]) -> str:
    """As Markdown, a row a model: means over families and seeds, with lm_eval's standard error where there is one of each."""
    merged = " ".join(rows[0]["merged"])
    lines = [
        f"Through lm_eval, merging {merged}:",
        "",
        "| model | strings (acc) | questions (acc_norm) | code (bits a byte) |",
        "|---|---|---|---|",
    ]
    for model, group in grouped(rows, lambda row: row["model"]).items():
        told = []
        for task in METRICS:
            found = [row for row in group if row["task"] == task]
            mean = over_seeds((row["seed"], row["value"]) for row in found)
            if len(found) == 1 and found[0]["stderr"] is not None:
                mean = replace(mean, error=found[0]["stderr"])
            told.append(str(mean))
        lines.append(f"| {model} | " + " | ".join(told) + " |")
    return "\n".join(lines) + "\n"
