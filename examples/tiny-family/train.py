"""Train the tiny family, a base Llama of a million weights and four experts, from text that comes with Python.

    python examples/tiny-family/train.py      # about six minutes on two idle cores

It writes models/, heldout.safetensors and losses.json beside itself. Four domains of different kinds, all made from
the running CPython, nothing downloaded:

    code     the standard library's modules, without comments and docstrings
    prose    their docstrings, and the language reference's topics in pydoc
    numbers  arithmetic written out: products, quotients, fractions, factors, roots
    names    the Unicode character database: code points with category and name

The base learns from an even mixture of the four, each expert continues from the base on one of them. Every document
(a module, a topic, a table, a run of code points) is either trained on or held out as a whole. Seeds are fixed: the
same Python, PyTorch and number of threads give the same files. A model whose folder exists is kept: remove
models/ first to train all anew.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import math
import random
import sys
import sysconfig
import time
import unicodedata
import warnings
import zlib
from collections.abc import Iterator
from decimal import Decimal, localcontext
from fractions import Fraction
from pathlib import Path
from pydoc_data.topics import topics

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

DOMAINS = ("code", "prose", "numbers", "names")
LENGTH = 128  # tokens in a training or held-out sequence
HELDOUT = 96  # held-out sequences a domain
BATCH = 16
END = "<|endoftext|>"
BASE_STEPS, BASE_RATE = 1000, 3e-3
EXPERT_STEPS, EXPERT_RATE = 400, 1e-4
SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}  # not the library, or tests
SKIP |= {"encodings", "pydoc_data", "ensurepip"}  # tables, and a bundled wheel
MONOTONOUS = ("CJK ", "HANGUL SYLLABLE", "TANGUT IDEOGRAPH", "NUSHU")  # names that only count upwards


def modules() -> Iterator[tuple[str, ast.Module]]:
    """The standard library's modules, parsed, in a fixed order; tests, tables and generated files are left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIP.isdisjoint(name.parts) and not name.name.startswith("_sysconfigdata"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield name.as_posix(), ast.parse(path.read_bytes())


def split_docstrings(tree: ast.Module) -> list[str]:
    """Take the docstrings out of a parsed module and return them."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                found.append(inspect.cleandoc(text))
                node.body = node.body[1:] or [ast.Pass()]
    return found


def number_line(rng: random.Random) -> str:
    """One true statement about numbers."""
    a, b, c, d = (rng.randint(1, 10 ** rng.randint(1, 3)) for _ in range(4))
    p, q = Fraction(a, b), Fraction(c, d)
    kind = rng.randrange(8)
    if kind == 0:
        return f"{a} * {b} = {a * b}"
    if kind == 1:
        return f"{a} + {b} - {c} = {a + b - c}"
    if kind == 2:
        with localcontext() as context:
            context.prec = 8
            return f"{a} / {b} = {Decimal(a) / Decimal(b)}"
    if kind == 3:
        return f"{p} + {q} = {p + q}"
    if kind == 4:
        return f"{p} * {q} = {p * q}"
    if kind == 5:
        with localcontext() as context:
            context.prec = 8
            return f"sqrt({a}) = {Decimal(a).sqrt()}"
    if kind == 6:
        return f"gcd({a}, {b}) = {math.gcd(a, b)}, lcm({a}, {b}) = {math.lcm(a, b)}"
    factors, rest, prime = [], a, 2
    while rest > 1:
        while rest % prime == 0:
            factors.append(prime)
            rest //= prime
        prime += 1
    return f"{a} = {' * '.join(map(str, factors)) or '1'}, hex {a:x}, binary {a:b}"


def documents() -> dict[str, dict[str, str]]:
    """Domain -> name of the document -> text."""
    docs: dict[str, dict[str, str]] = {domain: {} for domain in DOMAINS}
    for name, tree in modules():
        prose = split_docstrings(tree)
        docs["code"][name] = ast.unparse(tree)
        docs["prose"][name] = "\n\n".join(prose)
    docs["prose"] |= {f"topic {name}": text for name, text in topics.items()}
    for table in range(600):
        rng = random.Random(table)
        docs["numbers"][f"table {table}"] = "\n".join(number_line(rng) for _ in range(100))
    points = [c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.name(c, "")]
    points = [c for c in points if not unicodedata.name(c).startswith(MONOTONOUS)]
    for start in range(0, len(points), 64):
        lines = (f"U+{ord(c):04X} {unicodedata.category(c)} {unicodedata.name(c)}" for c in points[start : start + 64])
        docs["names"][f"points {start}"] = "\n".join(lines)
    return docs


def is_held_out(name: str) -> bool:
    """One document in twelve, by a checksum of its name, so that the choice depends on nothing else."""
    return zlib.crc32(name.encode()) % 12 == 0


def train_tokenizer(docs: dict[str, dict[str, str]]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 2,048 entries, digits one by one, learnt from an equal share of each domain's training text."""
    sample = []
    for domain in DOMAINS:
        names = [name for name in docs[domain] if not is_held_out(name)]
        random.Random(domain).shuffle(names)
        sample.append("\n".join(docs[domain][name] for name in names)[:500_000])
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(sample, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All texts, each followed by the end-of-text token, as one row of ids [n]."""
    ids: list[int] = []
    for encoded in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False):
        ids += [*encoded.ids, tokenizer.eos_token_id]
    return torch.tensor(ids)


def sequences(stream_n: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` windows of LENGTH tokens at random places [count, LENGTH]."""
    start_B = torch.randint(len(stream_n) - LENGTH, (count,), generator=generator)
    return stream_n[start_B[:, None] + torch.arange(LENGTH)]


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, ids_BT: torch.Tensor) -> float:
    """Mean next-token cross-entropy in nats; all sequences have one length, so batches weigh the same a token."""
    model.eval()
    losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in ids_BT.split(32)]
    return sum(losses) / len(ids_BT)


def train(
    model: LlamaForCausalLM, streams: list[torch.Tensor], steps: int, rate: float, label: str
) -> LlamaForCausalLM:
    """AdamW with a short warm-up and a cosine to zero; every batch takes an equal share from each stream."""
    generator = torch.Generator().manual_seed(zlib.crc32(label.encode()))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
    warmup = max(1, min(100, steps // 10))
    model.train()
    start = time.perf_counter()
    for step in range(steps):
        share = min((step + 1) / warmup, 1.0) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * share
        ids = torch.cat([sequences(stream, BATCH // len(streams), generator) for stream in streams])
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99 or step + 1 == steps:
            seconds = time.perf_counter() - start
            print(f"{label:>8} step {step + 1:5d}  loss {loss.item():.3f}  {seconds:4.0f} s", flush=True)
    return model


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a whole HF folder in bf16."""
    ends = {f"{kind}_token_id": tokenizer.eos_token_id for kind in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(**ends)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}  # the name that every release of transformers knows
    settings.pop("backend", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    for file in folder.iterdir():
        file.chmod(0o644)


def load(folder: Path) -> LlamaForCausalLM:
    """A saved model as it is on disk, in fp32."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def displacement(model: LlamaForCausalLM, base: LlamaForCausalLM) -> float:
    """Length of the update relative to the base, over all weights."""
    pairs = [(p.detach(), b.detach()) for p, b in zip(model.parameters(), base.parameters(), strict=True)]
    moved = sum(float((p - b).square().sum()) for p, b in pairs)
    return math.sqrt(moved / sum(float(b.square().sum()) for _, b in pairs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    args = parser.parse_args()
    torch.manual_seed(0)
    disable_progress_bar()

    docs = documents()
    tokenizer = train_tokenizer(docs)
    streams, heldout = {}, {}
    for domain in DOMAINS:
        names = list(docs[domain])
        random.Random(domain).shuffle(names)
        streams[domain] = token_stream(tokenizer, [docs[domain][n] for n in names if not is_held_out(n)])
        rest = token_stream(tokenizer, [docs[domain][n] for n in names if is_held_out(n)])
        rows = rest[: len(rest) // LENGTH * LENGTH].view(-1, LENGTH)
        choice = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:HELDOUT]
        heldout[domain] = rows[choice].contiguous()
        print(f"{domain:>8}: {len(streams[domain]):9,d} tokens to train on, {len(rest):8,d} held out")
    args.out.mkdir(parents=True, exist_ok=True)
    save_file({k: v.to(torch.int16) for k, v in heldout.items()}, args.out / "heldout.safetensors")

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = args.out / "models"
    if not (folder / "base").exists():
        fresh = LlamaForCausalLM(config)
        print(f"{sum(p.numel() for p in fresh.parameters()):,d} weights")
        save(train(fresh, list(streams.values()), BASE_STEPS, BASE_RATE, "base"), tokenizer, folder / "base")
    base = load(folder / "base")
    losses = {"base": {d: mean_loss(base, heldout[d]) for d in DOMAINS}}
    for domain in DOMAINS:
        if not (folder / domain).exists():
            expert = train(load(folder / "base"), [streams[domain]], EXPERT_STEPS, EXPERT_RATE, domain)
            save(expert, tokenizer, folder / domain)
        expert = load(folder / domain)
        losses[domain] = {d: mean_loss(expert, heldout[d]) for d in DOMAINS}
        print(f"{domain:>8} moved {displacement(expert, base):.3f} of the base's length")

    print("\nheld-out loss (nats a token), one row a model")
    print(" " * 9 + "".join(f"{d:>9}" for d in DOMAINS))
    for model, row in losses.items():
        print(f"{model:>8} " + "".join(f"{row[d]:9.3f}" for d in DOMAINS))
    (args.out / "losses.json").write_text(json.dumps(losses, indent=2) + "\n")


if __name__ == "__main__":
    main()
