"""How much anonymous memory TIES needs for one very large tensor: an embedding of 128,256 × 4,096 in float32, of three models.

    python tests/benchmarks/ties_memory.py DIR [--rows 128256] [--columns 4096] [--bound 1.5] [--memory SIZE]

Makes a base and two models in DIR (2.1 GB each), merges them, prints the peak (RssAnon, sampled every 10 ms) and the seconds, removes
all of it, and ends with status 1 where the peak is above the bound in GiB.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from measured import timed

PIECE = 1 << 22


def make(folder: Path, rows: int, columns: int, seed: int) -> str:
    """A checkpoint of one float32 tensor: the same noise in every model, and a fiftieth of noise of its own."""
    folder.mkdir()
    size = rows * columns
    tensor = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, 4 * size]}
    text = json.dumps({"__metadata__": {"format": "pt"}, "model.embed_tokens.weight": tensor}).encode()
    text += b" " * (-len(text) % 8)
    common, own = np.random.default_rng(0), np.random.default_rng(1000 + seed)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, size, PIECE):
            count = min(PIECE, size - start)
            values = common.standard_normal(count, np.float32)
            if seed:
                values += own.standard_normal(count, np.float32) / 50
            file.write(values.data)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where there is room for four times the tensor")
    parser.add_argument("--rows", type=int, default=128_256)
    parser.add_argument("--columns", type=int, default=4_096)
    parser.add_argument("--bound", type=float, default=1.5, help="in GiB")
    parser.add_argument("--memory", help="as of `yeam merge`")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        base, *others = (make(Path(scratch) / f"m{k}", options.rows, options.columns, k) for k in range(3))
        recipe = {
            "merge_method": "ties", "base_model": base, "models": [{"model": path} for path in others],
            "parameters": {"weight": 0.5, "density": 0.3},
        }  # fmt: skip
        path = Path(scratch) / "recipe.yaml"
        path.write_text(json.dumps(recipe))
        command = [sys.executable, "-m", "yeam", "merge", str(path), f"{scratch}/out", "--quiet"]
        run = timed(command + (["--memory", options.memory] if options.memory else []))
    gib = options.rows * options.columns * 4 / 2**30
    print(
        f"{options.rows:,} × {options.columns:,} ({gib:.2f} GiB): "
        f"peak {run.anonymous / 2**30:.2f} GiB of anonymous memory, {run.seconds:.0f} s"
    )
    if run.anonymous > options.bound * 2**30:
        sys.exit(f"more than {options.bound:g} GiB")


if __name__ == "__main__":
    main()
