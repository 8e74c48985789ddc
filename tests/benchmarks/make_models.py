"""Make synthetic bf16 Llama checkpoints of a given size, to time merges with: a base and models a small step from it.

    python tests/benchmarks/make_models.py DIR --size 1.1B --models 3

writes DIR/m0 (the base), DIR/m1, DIR/m2: folders that transformers loads, with random normal weights. Each further
model is the base plus a random update of relative length `--displacement` (0.02). No model is ever held in memory:
every shard starts with its header, then each tensor is made and written in pieces of two million elements, for all
models at once. The random values come from one pool read at random offsets, so that the disk, not the generator,
sets the pace. The same arguments give the same bytes.

Legend: weights [rows, columns] as in a PyTorch Linear; sizes in elements unless they say bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import torch

TOKENIZER = Path(__file__).resolve().parents[2] / "examples" / "tiny-family" / "models" / "base"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
POOL = 1 << 22
PIECE = 1 << 21  # a piece is shorter than the pool, so that an offset always finds enough values after it
STD = 0.02


@dataclass(frozen=True)
class Size:
    """The numbers of a LlamaConfig that decide the shapes."""

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool = False


SIZES = {
    "tiny": Size(64, 2, 176, 4, 2, 2048, True),
    "1.1B": Size(2048, 22, 5632, 32, 4, 32000),
    "3B": Size(3072, 28, 8192, 24, 8, 32000),
}


def tensors(size: Size) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the checkpoint, in the order in which they are written."""
    hidden, inner = size.hidden_size, size.intermediate_size
    head = hidden // size.num_attention_heads
    yield "model.embed_tokens.weight", (size.vocab_size, hidden)
    for i in range(size.num_hidden_layers):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.self_attn.q_proj.weight", (hidden, hidden)
        yield f"{layer}.self_attn.k_proj.weight", (size.num_key_value_heads * head, hidden)
        yield f"{layer}.self_attn.v_proj.weight", (size.num_key_value_heads * head, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        yield f"{layer}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.up_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    if not size.tie_word_embeddings:
        yield "lm_head.weight", (size.vocab_size, hidden)


def shards(size: Size, shard_bytes: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    """The tensors cut into shards of at most `shard_bytes` (one tensor at least)."""
    out: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    used = 0
    for name, shape in tensors(size):
        nbytes = 2 * math.prod(shape)
        if out[-1] and used + nbytes > shard_bytes:
            out.append([])
            used = 0
        out[-1].append((name, shape))
        used += nbytes
    return out


def header(shard: list[tuple[str, tuple[int, ...]]]) -> bytes:
    """A safetensors header: eight bytes of length, then JSON, padded so that the data starts on a multiple of eight."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shard:
        end = offset + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensor(
    files: list[BinaryIO], pool: torch.Tensor, name: str, shape: tuple[int, ...], step: float, seed: int
) -> None:
    """One tensor of every model: normal weights (norms: ones) in the base, updates of relative length `step`."""
    offsets = random.Random(f"{seed}/{name}")

    def values(count: int) -> torch.Tensor:
        start = offsets.randrange(POOL - count)
        return pool[start : start + count]

    total = math.prod(shape)
    for start in range(0, total, PIECE):
        count = min(PIECE, total - start)
        base = torch.ones(count) if len(shape) == 1 else values(count) * STD
        scale = step * (1.0 if len(shape) == 1 else STD)
        for k, file in enumerate(files):
            piece = base if k == 0 else torch.add(base, values(count), alpha=scale)
            file.write(piece.to(torch.bfloat16).view(torch.uint8).numpy().data)


def write_small_files(folder: Path, size: Size) -> None:
    """config.json, generation_config.json and the tokenizer of the tiny family (which may know fewer tokens)."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(size),
        "head_dim": size.hidden_size // size.num_attention_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 0}, indent=2) + "\n")
    for name in TOKENIZER_FILES:
        if (TOKENIZER / name).is_file():
            shutil.copyfile(TOKENIZER / name, folder / name)


def make(folders: list[Path], size: Size, step: float, seed: int, shard_bytes: int) -> None:
    """Write one checkpoint to each of the (new) folders; the first is the base."""
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(seed))
    plan = shards(size, shard_bytes)
    for folder in folders:
        folder.mkdir(parents=True)
        write_small_files(folder, size)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(plan):
        file_name = f"model-{i + 1:05d}-of-{len(plan):05d}.safetensors" if len(plan) > 1 else "model.safetensors"
        files = [(folder / file_name).open("wb") for folder in folders]
        for file in files:
            file.write(header(shard))
        for name, shape in shard:
            write_tensor(files, pool, name, shape, step, seed)
            weight_map[name] = file_name
        for file in files:
            file.close()
    if len(plan) > 1:
        total = sum(math.prod(shape) for _, shape in tensors(size))
        index = {"metadata": {"total_parameters": total, "total_size": 2 * total}, "weight_map": weight_map}
        for folder in folders:
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="m0 (the base), m1, … are made in it")
    parser.add_argument("--size", choices=SIZES, default="1.1B")
    parser.add_argument("--layers", type=int, help="another number of layers than the size has")
    parser.add_argument("--models", type=int, default=3, help="how many, the base included")
    parser.add_argument("--displacement", type=float, default=0.02, help="length of the updates relative to the base")
    parser.add_argument("--shard-size", type=float, default=1.0, help="largest shard, in GB")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args()

    folders = [args.folder / f"m{k}" for k in range(args.models)]
    for folder in folders:
        if folder.exists() and not args.overwrite:
            print(f"{folder} exists; remove it or pass --overwrite", file=sys.stderr)
            return 2
        shutil.rmtree(folder, ignore_errors=True)
    size = SIZES[args.size]
    if args.layers:
        size = Size(**{**asdict(size), "num_hidden_layers": args.layers})
    start = time.perf_counter()
    make(folders, size, args.displacement, args.seed, int(args.shard_size * 1e9))
    weights = sum(math.prod(shape) for _, shape in tensors(size))
    print(
        f"{len(folders)} models of {weights / 1e9:.3g} B weights ({2 * weights / 1e9:.3g} GB each) in {args.folder}: "
        f"{time.perf_counter() - start:.0f} s",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
