"""Measure injection: two experts into a third one, YeAM's defaults against tuned rivals, on the tiny family.

    python tests/benchmarks/inject.py [--json] [--out TABLE.md] [--family DIR] [--targets NAME …] [--set policy=consensus]

For every target and every pair of other experts, on held-out text of the three domains, in nats:

    kept  = share of the target's own gain (base to target, on its domain) that the result still has
    gain  = mean over the two sources of (loss_target - loss_result) / (loss_base - loss_source), on the source's domain

A gain of 1 would add to the target what each source had added to the base; the target itself has 0. Rivals walk a line from the
target and stop at the best point with kept ≥ 0.95, found with the same held-out text (an advantage that they would not have in use):

    linear           target + s · (mean of the sources - target)
    task arithmetic  target + s · sum of the sources' updates
    ties             target + s · the sources' updates merged by TIES, density 0.2 (and 0.5, the better counts)

YeAM is `yeam.inject` with nothing but the models. Everything is stored in bf16 and evaluated in fp32. The margin over each rival comes with
a 95 % interval from resampling the held-out sequences, the same ones for all methods.
Exit status 0 if YeAM keeps to the limit everywhere and its mean gain is above that of every rival with the whole interval, 1 if not.

DIR holds models/base, models/EXPERT … and heldout.safetensors, as examples/tiny-family does. With `--quality WORK/FAMILY/SEED/REGIME` the
experts are those of tests/benchmarks/quality (`--only models` makes them).

Legend: B sequences, T tokens, D sequences of a domain.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

import yeam

FAMILY = Path(__file__).resolve().parents[2] / "examples" / "tiny-family"
LIMIT = 0.95
DENSITIES = (0.2, 0.5)
RESAMPLED = 2000

Weights = Mapping[str, Tensor]
Text = tuple[Tensor, Tensor]
"""Token ids [D, T], and which of them are scored (of question-answer text the answers)."""
Losses = dict[str, Tensor]
"""Loss of every held-out sequence [D], by domain."""
Point = tuple[float, float, float, Losses]
"""(strength, kept, gain, losses) on a rival's line."""


class Bench:
    """The family in memory, and one model that takes any weights and reads held-out text."""

    def __init__(self, folders: dict[str, Path], heldout: Mapping[str, Text], sequences: int | None) -> None:
        """folders: of `base` and every expert; heldout: of every expert's domain."""
        self.folders = folders
        self.experts = [name for name in self.folders if name != "base"]
        self.model = AutoModelForCausalLM.from_pretrained(self.folders["base"], dtype=torch.float32).eval()
        self.parameters = dict(self.model.named_parameters())
        self.heldout = {d: (ids[:sequences].long(), scored[:sequences]) for d, (ids, scored) in heldout.items()}
        self.weights = {name: self.read(folder) for name, folder in self.folders.items()}
        self.base = self.weights["base"]
        self.base_loss = self.losses(self.base, self.experts)
        self.expert_loss = {e: self.losses(self.weights[e], self.experts) for e in self.experts}

    @classmethod
    def of_family(cls, family: Path, sequences: int | None) -> Bench:
        folders = {path.name: path for path in sorted((family / "models").iterdir()) if path.is_dir()}
        tensors = load_file(family / "heldout.safetensors")
        return cls(folders, {d: (ids, torch.ones_like(ids, dtype=torch.bool)) for d, ids in tensors.items()}, sequences)

    @classmethod
    def of_quality(cls, made: Path, domains: list[str], sequences: int | None) -> Bench:
        """Experts that `quality --only models` made in the folder WORK/FAMILY/SEED/REGIME, on both splits of its text."""
        own = made.parent / "base"
        base = own if own.is_dir() else made.parents[1] / "base"  # seeds of pretrained families share theirs
        tensors = load_file(made.parents[1] / "data-128.safetensors")

        def text(domain: str, what: str) -> Tensor:
            return torch.cat([tensors[f"{domain}/{split}/{what}"] for split in ("test", "tuning")])

        heldout = {d: (text(d, "ids"), text(d, "answers") > 0) for d in domains}
        return cls({"base": base, **{d: made / d for d in domains}}, heldout, sequences)

    def read(self, folder: Path) -> dict[str, Tensor]:
        """The weights of a folder as they are stored, by parameter name; a tied head is not read twice."""
        tensors = load_file(folder / "model.safetensors")
        return {name: tensors[name] for name in self.parameters}

    @torch.inference_mode()
    def losses(self, weights: Weights, domains: Any) -> Losses:
        """Next-token cross-entropy (nats) of bf16-rounded weights on each domain's held-out sequences."""
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name].to(torch.bfloat16))
        out = {}
        for domain in domains:
            rows = []
            for ids_BT, scored_BT in zip(*(part.split(16) for part in self.heldout[domain])):
                logits_BTV = self.model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
                loss_BT = cross_entropy(logits_BTV.transpose(1, 2), ids_BT[:, 1:], reduction="none")
                counts_BT = scored_BT[:, 1:].double()
                rows.append((loss_BT * counts_BT).sum(dim=1) / counts_BT.sum(dim=1))
            out[domain] = torch.cat(rows)
        return out

    def mean(self, losses: Losses, domain: str, pick: Tensor | None) -> float:
        return float(losses[domain].mean() if pick is None else losses[domain][pick].mean())

    def kept(self, target: str, found: Losses, pick: Tensor | None = None) -> float:
        """The share of the target's own gain, on all sequences or on a resampled choice [D] of them."""
        base, own = self.mean(self.base_loss, target, pick), self.mean(self.expert_loss[target], target, pick)
        return (base - self.mean(found, target, pick)) / (base - own)

    def gain(self, target: str, sources: tuple[str, ...], found: Losses, pick: Tensor | None = None) -> float:
        """The sources' mean gain."""
        gains = []
        for s in sources:
            own, base = self.mean(self.expert_loss[target], s, pick), self.mean(self.base_loss, s, pick)
            gains.append((own - self.mean(found, s, pick)) / (base - self.mean(self.expert_loss[s], s, pick)))
        return sum(gains) / len(gains)

    def score(self, target: str, sources: tuple[str, ...], found: Losses) -> tuple[float, float]:
        """(kept, gain) from the losses of a result."""
        return self.kept(target, found), self.gain(target, sources, found)

    def injected(self, target: str, sources: tuple[str, ...], **options: Any) -> tuple[dict[str, Tensor], Any]:
        """What `yeam.inject` writes, with every parameter at its default, and its report."""
        folders = [self.folders[s] for s in sources]
        with tempfile.TemporaryDirectory() as parent:
            options = {"base": self.folders["base"], **options}
            report = yeam.inject(self.folders[target], folders, Path(parent) / "out", **options)
            return self.read(Path(parent) / "out"), report


def along(bench: Bench, target: str, sources: tuple[str, ...], step: Weights) -> Point:
    """The best point of target + s · step within the limit, in eight tries: doubling, then between the last two."""
    own = bench.weights[target]
    best: Point = (0.0, 1.0, 0.0, {d: bench.expert_loss[target][d] for d in (target, *sources)})
    low, high, s = 0.0, None, 0.08
    for _ in range(8):
        weights = {n: own[n].float() + s * step[n] for n in own}
        losses = bench.losses(weights, (target,))
        if bench.kept(target, losses) >= LIMIT:
            low = s
            losses |= bench.losses(weights, sources)
            best = max(best, (s, *bench.score(target, sources, losses), losses), key=lambda point: point[2])
        else:
            high = s
        s = 2 * low if high is None else (low + high) / 2
    return best


def ties(updates: list[Weights], density: float) -> dict[str, Tensor]:
    """TIES (Yadav et al. 2023): trim each update to its largest entries, elect a sign by mass, mean of those that have it."""
    out = {}
    for name in updates[0]:
        trimmed = []
        for update in updates:
            x = update[name]
            kept = max(1, round(density * x.numel()))
            least = x.abs().flatten().kthvalue(x.numel() - kept + 1).values
            trimmed.append(torch.where(x.abs() >= least, x, 0.0))
        x_K = torch.stack(trimmed)
        agree_K = (x_K != 0) & (x_K.sign() == x_K.sum(0).sign())
        out[name] = (x_K * agree_K).sum(0) / agree_K.sum(0).clamp(min=1)
    return out


def rivals(bench: Bench, target: str, sources: tuple[str, ...]) -> dict[str, Point]:
    """The best point of each rival."""
    own, base = bench.weights[target], bench.base
    updates = [{n: bench.weights[s][n].float() - base[n].float() for n in base} for s in sources]
    mean = {n: sum(bench.weights[s][n].float() for s in sources) / len(sources) - own[n].float() for n in own}
    lines = {
        "linear": [mean],
        "task arithmetic": [{n: sum(u[n] for u in updates) for n in base}],
        "ties": [ties(updates, density) for density in DENSITIES],
    }
    return {
        name: max((along(bench, target, sources, step) for step in steps), key=lambda point: point[2])
        for name, steps in lines.items()
    }


def measure(bench: Bench, target: str, sources: tuple[str, ...], options: dict[str, Any]) -> dict[str, Any]:
    """All methods on one triple."""
    found = rivals(bench, target, sources)
    weights, report = bench.injected(target, sources, **options)
    losses = bench.losses(weights, (target, *sources))
    kept, gain = bench.score(target, sources, losses)
    change = report.totals["relative_change"]
    ours = {"kept": kept, "gain": gain, "relative_change": change, "losses": losses}
    rows = {
        name: {"strength": s, "kept": k, "gain": g, "losses": found_losses}
        for name, (s, k, g, found_losses) in found.items()
    }
    return {"target": target, "sources": list(sources), "yeam": ours, **rows}


def interval(
    bench: Bench, rows: list[dict[str, Any]], score: Callable[[dict[str, Any], Tensor], float]
) -> tuple[float, float]:
    """95 % of the mean over the rows of score(row, resampled sequences)."""
    generator = torch.Generator().manual_seed(0)
    count = min(len(ids) for ids, _ in bench.heldout.values())
    means = []
    for _ in range(RESAMPLED):
        pick = torch.randint(count, (count,), generator=generator)
        means.append(sum(score(row, pick) for row in rows) / len(rows))
    ordered = sorted(means)
    return ordered[int(0.025 * RESAMPLED)], ordered[int(0.975 * RESAMPLED)]


NAMES = ("linear", "task arithmetic", "ties")


def margins(bench: Bench, rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean margin of YeAM's gain over each rival's, with its interval."""
    found = {}
    for name in NAMES:

        def margin(row: dict[str, Any], pick: Tensor | None, name: str = name) -> float:
            target, sources = row["target"], tuple(row["sources"])
            ours = bench.gain(target, sources, row["yeam"]["losses"], pick)
            return ours - bench.gain(target, sources, row[name]["losses"], pick)

        low, high = interval(bench, rows, margin)
        found[name] = {"mean": sum(margin(row, None) for row in rows) / len(rows), "low": low, "high": high}
    return found


def table(rows: list[dict[str, Any]], found: Mapping[str, Mapping[str, float]]) -> str:
    """The measurement as Markdown."""
    lines = [
        "| target ← sources | linear | task arithmetic | ties | YeAM, defaults | the target keeps | relative change |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ours = row["yeam"]
        cells = [f"{row[name]['gain']:+.3f} ({row[name]['strength']:.2g})" for name in NAMES]
        best = ours["gain"] > max(row[name]["gain"] for name in NAMES) and ours["kept"] >= LIMIT
        gain = f"**{ours['gain']:+.3f}**" if best else f"{ours['gain']:+.3f}"
        label = f"{row['target']} ← {', '.join(row['sources'])}"
        lines.append(f"| {label} | {' | '.join(cells)} | {gain} | {ours['kept']:.1%} | {ours['relative_change']:.3f} |")
    means = [sum(row[name]["gain"] for row in rows) / len(rows) for name in (*NAMES, "yeam")]
    lines.append(
        f"| mean | {' | '.join(f'{m:+.3f}' for m in means[:-1])} | **{means[-1]:+.3f}** "
        f"| {sum(row['yeam']['kept'] for row in rows) / len(rows):.1%} | |"
    )
    lines.append("")
    lines += [
        f"YeAM over {name}: {m['mean']:+.3f}, 95 % interval {m['low']:+.3f} to {m['high']:+.3f}"
        for name, m in found.items()
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--family", type=Path, default=FAMILY, help="models/base, models/EXPERT and heldout.safetensors"
    )
    parser.add_argument("--quality", type=Path, help="instead: WORK/FAMILY/SEED/REGIME of tests/benchmarks/quality")
    parser.add_argument("--experts", nargs="+", default=["code", "russian", "questions"], help="of these domains")
    parser.add_argument("--targets", nargs="+", help="only these targets")
    parser.add_argument("--sequences", type=int, help="only so many held-out sequences a domain")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="options of yeam.inject, such as policy=consensus"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of the table")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    disable_progress_bar()

    options: dict[str, Any] = {}
    for setting in args.set:
        key, _, value = setting.partition("=")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    start = time.perf_counter()
    bench = (
        Bench.of_quality(args.quality, args.experts, args.sequences)
        if args.quality
        else Bench.of_family(args.family, args.sequences)
    )
    rows = []
    for target in args.targets or bench.experts:
        for sources in combinations([e for e in bench.experts if e != target], 2):
            rows.append(measure(bench, target, sources, options))
            print(f"{target} ← {', '.join(sources)}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    found = margins(bench, rows)
    text = table(rows, found)
    reached = all(row["yeam"]["kept"] >= LIMIT for row in rows) and all(m["low"] > 0 for m in found.values())
    if args.out:
        args.out.write_text(text)
    if args.json:
        for row in rows:
            for name in (*NAMES, "yeam"):
                del row[name]["losses"]
        print(json.dumps({"triples": rows, "margins": found, "reached": reached}, indent=2))
    else:
        print(text, end="")
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
