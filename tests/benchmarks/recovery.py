"""Measure how much of its experts a merge keeps, on the tiny family: YeAM's defaults against tuned rivals.

    python tests/benchmarks/recovery.py [--json] [--out TABLE.md]

For every subset of two, three and four experts, on held-out text:

    recovery = mean over the merged domains of (loss_base - loss_merged) / (loss_base - loss_own_expert)

1 is as good as the expert on each domain, 0 is the base. Rivals, each at ten strengths, the best of which is picked
with the same held-out text (an advantage that they would not have in use):

    task arithmetic  base + s · sum of the updates,   s = 0.1, 0.2, … 1.0
    linear           base + s · mean of the updates,  s = 0.2, 0.4, … 2.0  (an average in which the base weighs 1 - s)

YeAM is `yeam.merge` with nothing but the method, the base and the models. All results are stored in bf16, as the
experts are, and evaluated in fp32. Exit status 0 if YeAM is above every strength of both rivals for every subset, 1
if not.

Legend: B sequences, T tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

import yeam

FAMILY = Path(__file__).resolve().parents[2] / "examples" / "tiny-family"
EXPERTS = ("code", "prose", "numbers", "names")
TASK_ARITHMETIC = tuple(round(0.1 * i, 1) for i in range(1, 11))
LINEAR = tuple(round(0.2 * i, 1) for i in range(1, 11))

Weights = Mapping[str, torch.Tensor]


class Bench:
    """The family in memory, and one model that takes any weights and reads held-out text."""

    def __init__(self, family: Path) -> None:
        self.folders = {name: family / "models" / name for name in ("base", *EXPERTS)}
        self.model = LlamaForCausalLM.from_pretrained(self.folders["base"], dtype=torch.float32).eval()
        self.parameters = dict(self.model.named_parameters())
        self.heldout = {d: ids.long() for d, ids in load_file(family / "heldout.safetensors").items()}
        self.base = self.read(self.folders["base"])
        experts = {name: self.read(self.folders[name]) for name in EXPERTS}
        self.updates = {e: {n: w - self.base[n] for n, w in experts[e].items()} for e in EXPERTS}
        self.base_loss = self.losses(self.base, EXPERTS)
        self.own_loss = {e: self.losses(experts[e], (e,))[e] for e in EXPERTS}

    def read(self, folder: Path) -> dict[str, torch.Tensor]:
        """The weights of a folder in fp32, by parameter name; a tied head is not read twice."""
        tensors = load_file(folder / "model.safetensors")
        return {name: tensors[name].float() for name in self.parameters}

    @torch.inference_mode()
    def losses(self, weights: Weights, domains: tuple[str, ...]) -> dict[str, float]:
        """Next-token cross-entropy (nats) of bf16-rounded weights on each domain's held-out text."""
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name].to(torch.bfloat16))
        out = {}
        for domain in domains:
            total = 0.0
            for ids_BT in self.heldout[domain].split(16):
                logits_BTV = self.model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
                target_n = ids_BT[:, 1:].flatten()
                total += float(cross_entropy(logits_BTV.flatten(0, 1), target_n, reduction="sum"))
            out[domain] = total / self.heldout[domain][:, 1:].numel()
        return out

    def recovery(self, weights: Weights, subset: tuple[str, ...]) -> dict[str, float]:
        """Share of each expert's gain that the weights keep, by domain."""
        merged = self.losses(weights, subset)
        return {d: (self.base_loss[d] - merged[d]) / (self.base_loss[d] - self.own_loss[d]) for d in subset}

    def summed(self, subset: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """The sum of the subset's updates."""
        return {n: torch.stack([self.updates[e][n] for e in subset]).sum(0) for n in self.base}

    def yeam(self, subset: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """What `yeam.merge` writes for the subset, with every parameter at its default."""
        recipe: dict[str, Any] = {
            "merge_method": "yeam",
            "base_model": str(self.folders["base"]),
            "models": [{"model": str(self.folders[e])} for e in subset],
        }
        with tempfile.TemporaryDirectory() as parent:
            out = Path(parent) / "merged"
            yeam.merge(recipe, out)
            return self.read(out)

    def displacement(self, expert: str) -> float:
        """Length of an expert's update relative to the base, over all weights."""
        moved = sum(float(u.square().sum()) for u in self.updates[expert].values())
        return math.sqrt(moved / sum(float(b.square().sum()) for b in self.base.values()))


def mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)


def measure(bench: Bench, subset: tuple[str, ...]) -> dict[str, Any]:
    """All methods on one subset. Both rivals walk one line from the base; a point of both grids is evaluated once."""
    update = bench.summed(subset)
    seen: dict[float, float] = {}

    def at(strength: float) -> float:
        key = round(strength, 9)
        if key not in seen:
            weights = {n: torch.add(b, update[n], alpha=strength) for n, b in bench.base.items()}
            seen[key] = mean(bench.recovery(weights, subset))
        return seen[key]

    arithmetic = {s: at(s) for s in TASK_ARITHMETIC}
    linear = {s: at(s / len(subset)) for s in LINEAR}
    ours = bench.recovery(bench.yeam(subset), subset)
    return {
        "merged": list(subset),
        "task_arithmetic": arithmetic,
        "linear": linear,
        "yeam": mean(ours),
        "yeam_by_domain": ours,
        "above_every_strength": mean(ours) > max(*arithmetic.values(), *linear.values()),
    }


def best(grid: Mapping[float, float]) -> str:
    """`.448 (0.5)`: the best recovery of a grid and the strength that gave it."""
    strength = max(grid, key=lambda s: grid[s])
    return f"{grid[strength]:.3f} ({strength:g})"


def table(bench: Bench, rows: list[dict[str, Any]]) -> str:
    """The measurement as Markdown."""
    lines = ["| expert | held-out loss of the base | of the expert | displacement |", "|---|---|---|---|"]
    lines += [
        f"| {e} | {bench.base_loss[e]:.3f} | {bench.own_loss[e]:.3f} | {bench.displacement(e):.3f} |" for e in EXPERTS
    ]
    lines += [
        "",
        "| merged | task arithmetic, best (strength) | linear, best (strength) | plain mean | YeAM, defaults |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        ours = f"**{row['yeam']:.3f}**" if row["above_every_strength"] else f"{row['yeam']:.3f}"
        lines.append(
            f"| {' '.join(row['merged'])} | {best(row['task_arithmetic'])} | {best(row['linear'])} "
            f"| {row['linear'][1.0]:.3f} | {ours} |"
        )
    won = sum(row["above_every_strength"] for row in rows)
    lines += ["", f"YeAM is above every strength of task arithmetic and of linear for {won} of {len(rows)} subsets."]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", type=Path, default=FAMILY, help="another family made by its train.py")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the table")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    disable_progress_bar()

    start = time.perf_counter()
    bench = Bench(args.family)
    rows = []
    for count in (2, 3, 4):
        for subset in combinations(EXPERTS, count):
            rows.append(measure(bench, subset))
            print(f"{' '.join(subset)}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    text = table(bench, rows)
    reached = all(row["above_every_strength"] for row in rows)
    if args.out:
        args.out.write_text(text)
    if args.json:
        report = {
            "base_loss": bench.base_loss,
            "own_loss": bench.own_loss,
            "displacement": {e: bench.displacement(e) for e in EXPERTS},
            "subsets": rows,
            "above_every_strength": reached,
        }
        print(json.dumps(report, indent=2))
    else:
        print(text, end="")
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
