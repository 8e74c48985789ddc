"""How long a merge takes and how much memory it needs, against reading its inputs and copying one of them.

    python tests/benchmarks/make_models.py DIR --size 1.1B --models 3
    python tests/benchmarks/merge_speed.py DIR [--rounds 3] [--json]

Every round runs, one after the other with a warm page cache: `cat inputs > /dev/null; cp -r one-model`, then each merge as a
process of its own (start-up included). Printed: the median of the ratios to the first, round by round, and the peak of anonymous
memory (RssAnon, sampled every 10 ms) of the merge's process.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MERGES = ("linear", "yeam, frames: none", "yeam")


def recipe(name: str, models: list[Path]) -> dict[str, object]:
    """The recipe of one line of the table: the first model is the base where there is one."""
    if name == "linear":
        return {"merge_method": "linear", "models": [{"model": str(m), "parameters": {"weight": 1}} for m in models]}
    parameters = {"frames": "none"} if "none" in name else {}
    sources = [{"model": str(m)} for m in models[1:]]
    return {"merge_method": "yeam", "base_model": str(models[0]), "models": sources, "parameters": parameters}


def anonymous(pid: int) -> int:
    """RssAnon of a process in bytes, 0 when it is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def timed(command: list[str]) -> tuple[float, int]:
    """Seconds and peak anonymous bytes of a command; it must succeed."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.01)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed with status {process.returncode}")
    return time.monotonic() - started, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds the models, each a folder; the first in order is the base")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=MERGES, action="append")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    models = sorted(p for p in options.folder.iterdir() if (p / "config.json").is_file())[:3]
    merges = options.only or list(MERGES)
    seconds: dict[str, list[float]] = {name: [] for name in ("cat + cp", *merges)}
    peaks = dict.fromkeys(merges, 0)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        out = Path(scratch) / "out"
        shards = " ".join(str(s) for m in models for s in sorted(m.glob("*.safetensors")))
        for number in range(options.rounds + 1):  # the first fills the page cache and is not counted
            for name in seconds:
                if name == "cat + cp":
                    took, _ = timed(["sh", "-c", f"cat {shards} > /dev/null; cp -r {models[0]} {out}"])
                else:
                    path = Path(scratch) / "recipe.yaml"
                    path.write_text(json.dumps(recipe(name, models)))
                    took, peak = timed([sys.executable, "-m", "yeam", "merge", str(path), str(out), "--quiet"])
                    peaks[name] = max(peaks[name], peak)
                shutil.rmtree(out)
                if number:
                    seconds[name].append(took)
    rows = []
    for name in merges:
        ratios = [a / b for a, b in zip(seconds[name], seconds["cat + cp"])]
        rows.append(
            {
                "merge": name,
                "seconds": statistics.median(seconds[name]),
                "ratio": statistics.median(ratios),
                "least": min(ratios),
                "most": max(ratios),
                "peak_mib": peaks[name] / 2**20,
            }
        )
    if options.json:
        print(json.dumps({"cat_cp_seconds": statistics.median(seconds["cat + cp"]), "merges": rows}))
        return
    print(f"cat + cp: {statistics.median(seconds['cat + cp']):.1f} s (median of {options.rounds})\n")
    print("| merge | seconds | ratio to cat + cp (least to most) | peak anonymous memory |")
    print("|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['merge']} | {row['seconds']:.1f} | {row['ratio']:.1f} ({row['least']:.1f} to {row['most']:.1f}) "
            f"| {row['peak_mib']:.0f} MiB |"
        )


if __name__ == "__main__":
    main()
