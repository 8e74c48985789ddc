"""How long merges take: against `cat` and `cp` of the same files, and against mergekit.

    python tests/benchmarks/speed.py DIR [--size 1.1B] [--rounds 3] [--only ties] [--cold] [--environment ENV | --no-mergekit] [--json]

Makes three synthetic bf16 Llamas in DIR/SIZE where they are missing (tests/benchmarks/make_models.py). Every round measures each merge
three times over, one right after the other: `cat inputs > /dev/null; cp -r model`, the yardstick; YeAM; and mergekit, where it has the
method. Each is a process of its own, start-up included. Printed: medians of the seconds, the median ratio of YeAM to the yardstick of
its round, that of mergekit to YeAM, and the peak of anonymous memory.

The page cache is warm, or with `--cold` the inputs are put out of it before each process. mergekit comes from a virtual environment that
tests/conformance/make_golden.py makes (ENV keeps it). Both have their defaults: YeAM computes in float32, mergekit in the models'
bfloat16, and YeAM's output is on the disk when it ends (`--no-durable` leaves that to the system, as `cp` and mergekit do).
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measured import Run, cool, timed, warm

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "conformance"))
from make_golden import MERGEKIT, environment  # noqa: E402

METHODS = (
    "linear",
    "task_arithmetic",
    "slerp",
    "ties",
    "dare_ties",
    "della",
    "model_stock",
    "yeam, frames: none",
    "yeam",
)


def recipe(name: str, models: list[Path]) -> dict[str, Any]:
    """What the three are merged by; the first one is the base where there is one."""
    base, *others = [{"model": str(model)} for model in models]
    method = name.split(",")[0]
    found: dict[str, Any] = {"merge_method": method, "base_model": base["model"], "models": others}
    match name:
        case "linear":
            return {"merge_method": method, "models": [base, *others], "parameters": {"weight": 1.0}}
        case "task_arithmetic":
            return {**found, "parameters": {"weight": 0.5}}
        case "slerp":
            return {**found, "models": [base, others[0]], "parameters": {"t": 0.4}}
        case "model_stock" | "yeam":
            return {**found, "models": [base, *others] if method == "model_stock" else others}
        case "yeam, frames: none":
            return {**found, "parameters": {"frames": "none"}}
    return {**found, "parameters": {"weight": 0.5, "density": 0.5}}


class Bench:
    """The models, and the commands that read them all and write one."""

    def __init__(self, models: list[Path], python: Path | None, scratch: Path, options: argparse.Namespace) -> None:
        self.files = [file for model in models for file in sorted(model.glob("*.safetensors"))]
        self.models, self.python, self.cold = models, python, options.cold
        self.path, self.out = scratch / "recipe.yaml", scratch / "out"
        self.options = [] if options.durable else ["--no-durable"]

    def measure(self, name: str) -> dict[str, Run]:
        """One round of one line."""
        self.path.write_text(json.dumps(recipe(name, self.models)))
        inputs = " ".join(str(file) for file in self.files)
        merge = [str(self.path), str(self.out)]
        commands = {"cat + cp": ["sh", "-c", f"cat {inputs} > /dev/null; cp -r {self.models[0]} {self.out}"]}
        commands["yeam"] = [sys.executable, "-m", "yeam", "merge", *merge, "--quiet", *self.options]
        if self.python and not name.startswith("yeam"):
            commands["mergekit"] = [
                str(self.python),
                "-m",
                "mergekit.scripts.run_yaml",
                *merge,
                "--no-copy-tokenizer",
                "--quiet",
            ]
        found = {}
        for tool, command in commands.items():
            (cool if self.cold else warm)(self.files)
            found[tool] = timed(command)
            shutil.rmtree(self.out)
        return found


def row(name: str, rounds: list[dict[str, Run]]) -> dict[str, Any]:
    """One line of the table."""
    found: dict[str, Any] = {"merge": name, "rounds": len(rounds)}
    for tool in rounds[0]:
        found[f"{tool}_seconds"] = statistics.median(runs[tool].seconds for runs in rounds)
        found[f"{tool}_anonymous_mib"] = max(runs[tool].anonymous for runs in rounds) / 2**20
        found[f"{tool}_resident_mib"] = max(runs[tool].resident for runs in rounds) / 2**20
    for key, over, under in (("to_copy", "yeam", "cat + cp"), ("faster", "mergekit", "yeam")):
        if over in rounds[0]:
            ratios = [runs[over].seconds / runs[under].seconds for runs in rounds]
            found[key] = [statistics.median(ratios), min(ratios), max(ratios)]
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The measurement as Markdown."""

    def ratio(values: list[float] | None) -> str:
        return "" if values is None else f"{values[0]:.1f} ({values[1]:.1f} to {values[2]:.1f})"

    def mib(found: dict[str, Any], tool: str) -> str:
        return f"{found[f'{tool}_anonymous_mib']:,.0f} MiB" if f"{tool}_anonymous_mib" in found else ""

    lines = [
        "| merge | cat + cp | YeAM | ratio (least to most) | mergekit | times as fast (least to most) | memory, YeAM | mergekit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for found in rows:
        theirs = f"{found['mergekit_seconds']:.1f} s" if "mergekit_seconds" in found else ""
        lines.append(
            f"| {found['merge']} | {found['cat + cp_seconds']:.1f} s | {found['yeam_seconds']:.1f} s | {ratio(found['to_copy'])} "
            f"| {theirs} | {ratio(found.get('faster'))} | {mib(found, 'yeam')} | {mib(found, 'mergekit')} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=["tiny", "1.1B", "3B"], default="1.1B")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=METHODS, action="append")
    parser.add_argument("--cold", action="store_true", help="inputs not in the page cache")
    parser.add_argument("--durable", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--mergekit", default=MERGEKIT, help="what pip installs")
    parser.add_argument("--environment", type=Path, help="mergekit's; kept there and used again")
    parser.add_argument("--no-mergekit", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    folder = options.folder / options.size
    models = [folder / f"m{number}" for number in range(3)]
    if not all((model / "config.json").is_file() for model in models):
        make = [sys.executable, HERE / "make_models.py", folder, "--size", options.size, "--models", "3"]
        subprocess.run([str(word) for word in make], check=True)
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        scratch = Path(temporary)
        kept = options.environment or scratch / "mergekit"
        bench = Bench(models, None if options.no_mergekit else environment(kept, options.mergekit), scratch, options)
        for name in options.only or METHODS:
            rows.append(row(name, [bench.measure(name) for _ in range(options.rounds)]))
            print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    print(json.dumps(rows) if options.json else table(rows))


if __name__ == "__main__":
    main()
