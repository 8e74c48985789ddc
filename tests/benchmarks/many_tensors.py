"""What many tensors cost: the same number of weights in 20,000 tensors of small experts, and in 300 tensors of a dense model.

    python tests/benchmarks/many_tensors.py DIR [--method linear] [--rounds 3]

Makes two bf16 copies of a Qwen3-MoE (52 layers of 128 experts) and of a Llama, 0.2 billion random weights each, in DIR where they are
missing. Printed: the time of `yeam.plan` in a process that has imported everything, and of whole merges (`--no-durable`, page cache warm,
start-up included), medians, with the ratio of the two in the same round.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measured import timed, warm
from safetensors.torch import save_file

import yeam

COMMON = {
    "hidden_size": 96,
    "vocab_size": 512,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "dtype": "bfloat16",
}
MODELS: dict[str, dict[str, Any]] = {
    "many": {
        **COMMON,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": 52,
        "num_experts": 128,
        "moe_intermediate_size": 96,
    },
    "few": {
        **COMMON,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 33,
        "intermediate_size": 18_000,
    },
}  # fmt: skip


def tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors."""
    hidden, head = config["hidden_size"], config["head_dim"]
    rows = {
        part: head * config[f"num_{kind}_heads"]
        for part, kind in (("q", "attention"), ("k", "key_value"), ("v", "key_value"))
    }
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    found["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        found |= {f"{at}{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
        found |= {f"{at}self_attn.{part}_proj.weight": (count, hidden) for part, count in rows.items()}
        found[f"{at}self_attn.o_proj.weight"] = (hidden, rows["q"])
        if "num_experts" in config:
            found |= {f"{at}self_attn.{part}_norm.weight": (head,) for part in "qk"}
            found[f"{at}mlp.gate.weight"] = (config["num_experts"], hidden)
        inner = config.get("moe_intermediate_size", config.get("intermediate_size"))
        for mlp in [f"{at}mlp.experts.{e}." for e in range(config.get("num_experts", 0))] or [f"{at}mlp."]:
            found |= {f"{mlp}{part}_proj.weight": (inner, hidden) for part in ("gate", "up")}
            found[f"{mlp}down_proj.weight"] = (hidden, inner)
    return found


def make(folder: Path, config: dict[str, Any], seed: int) -> None:
    """A checkpoint in two shards."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    names = tensors(config)
    half, weight_map = len(names) // 2, {}
    for number, part in enumerate((list(names)[:half], list(names)[half:]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        state = {name: (0.02 * torch.randn(names[name], generator=generator)).bfloat16() for name in part}
        save_file(state, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--method", default="linear")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    recipes = {}
    for kind, config in MODELS.items():
        folders = [options.folder / f"{kind}-{number}" for number in range(2)]
        for seed, folder in enumerate(folders):
            if not (folder / "config.json").exists():
                make(folder, config, seed)
        first, other = map(str, folders)
        recipe: dict[str, Any] = {
            "merge_method": options.method,
            "models": [{"model": first}, {"model": other}],
            "parameters": {"weight": 0.5},
        }
        if options.method != "linear":
            recipe |= {"base_model": first, "models": [{"model": other}]}
        recipes[kind] = options.folder / f"{kind}.yaml"
        recipes[kind].write_text(json.dumps(recipe))
        warm(file for folder in folders for file in folder.glob("*.safetensors"))
    out = options.folder / "out"
    planned: dict[str, list[float]] = {kind: [] for kind in recipes}
    merged: dict[str, list[float]] = {kind: [] for kind in recipes}
    for _ in range(options.rounds + 1):
        for kind, recipe_file in recipes.items():
            started = time.monotonic()
            plan = yeam.plan(recipe_file)
            planned[kind].append(time.monotonic() - started)
            command = [sys.executable, "-m", "yeam", "merge", str(recipe_file), str(out), "--quiet", "--no-durable"]
            merged[kind].append(timed(command).seconds)
            shutil.rmtree(out)
            if len(merged[kind]) == 1:
                weights = sum(job.numel for job in plan.jobs)
                print(f"{kind}: {len(plan.jobs):,} tensors, {weights / 1e6:.0f} million weights", flush=True)
    for kind in recipes:  # the first round was for imports and caches
        print(
            f"{kind}: planned in {statistics.median(planned[kind][1:]):.2f} s, merged in {statistics.median(merged[kind][1:]):.1f} s"
        )
    ratios = [many / few for many, few in zip(merged["many"][1:], merged["few"][1:])]
    print(f"many over few: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
