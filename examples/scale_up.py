"""Grow a small model, train the larger one a little, and move a specialist of the small one into it.

    python examples/scale_up.py [--work DIR] [--steps N]

The tiny family's base (examples/tiny-family) is written in a larger shape, where it computes the same; what was silent there gets
some noise, and a few steps of training on all domains make it a model of its own. The small family's code expert then moves in
with the plugin `scale_up`, under a guard on prose. Printed: the loss on held-out text of all four models. Nothing is downloaded; it
takes less than a minute on two idle cores.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

import yeam

FAMILY = Path(__file__).parent / "tiny-family"
BASE = FAMILY / "models" / "base"
LARGER = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 5, "num_attention_heads": 6,
          "num_key_value_heads": 3, "head_dim": 32}  # fmt: skip


def tiny_family() -> Any:
    """examples/tiny-family/train.py as a module: its text and its training."""
    spec = importlib.util.spec_from_file_location("tiny_family_train", FAMILY / "train.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def grown(work: Path, base: Path = BASE, seed: int = 0, larger: Mapping[str, int] = LARGER) -> LlamaForCausalLM:
    """The base in a larger shape, wider, deeper, with more heads and neurons, computing the same; noise in what is silent there."""
    config = LlamaConfig.from_pretrained(base)
    for key, value in larger.items():
        setattr(config, key, value)
    LlamaForCausalLM(config).save_pretrained(work / "shape")
    recipe = {"merge_method": "passthrough", "models": [{"model": str(base)}], "dtype": "float32",
              "plugins": [{"expand": {"to": str(work / "shape")}}]}  # fmt: skip
    yeam.merge(recipe, work / "large", overwrite=True)
    model = LlamaForCausalLM.from_pretrained(work / "large", dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            silent = weight == 0
            weight[silent] = 0.2 * weight.std() * torch.randn(int(silent.sum()), generator=generator)
    return model


def make_host(work: Path, steps: int, documents: int | None = None, base: Path = BASE, seed: int = 0) -> Path:
    """The grown base, trained on an even mixture of all domains: a model of its own. `documents`: of each domain."""
    train, tokenizer = tiny_family(), PreTrainedTokenizerFast.from_pretrained(base)
    streams = [
        train.token_stream(tokenizer, [text for name, text in docs.items() if not train.is_held_out(name)][:documents])
        for docs in train.documents().values()
    ]
    model = train.train(grown(work, base, seed), streams, steps, 1e-3, f"host {seed}" if seed else "host")
    train.save(model, tokenizer, work / "host")
    return work / "host"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="keep the models there")
    parser.add_argument("--steps", type=int, default=10, help="of training the larger model")
    options = parser.parse_args()
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        base, code = BASE, FAMILY / "models" / "code"
        train = tiny_family()

        # 1. the base in a larger shape, with a life of its own
        host = make_host(work, options.steps, documents=40)

        # 2. the code expert moves in; prose that was kept back guards the host
        held_out = [text for name, text in train.documents()["prose"].items() if train.is_held_out(name)]
        (work / "prose.txt").write_text("\n\n".join(held_out)[:6000])
        recipe: dict[str, Any] = {
            "merge_method": "passthrough",
            "models": [{"model": str(host)}],
            "plugins": [{"scale_up": {"sources": [{"model": str(code), "base": str(base)}]}}],
        }
        report = yeam.merge(recipe, work / "result", guard=work / "prose.txt", overwrite=True)
        for note in report.notes:
            print(note)

        sequences = load_file(FAMILY / "heldout.safetensors")
        print(f"{'':8}" + "".join(f"{domain:>9}" for domain in train.DOMAINS))
        for name, folder in {"base": base, "code": code, "host": host, "result": work / "result"}.items():
            model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
            losses = [train.mean_loss(model, sequences[domain][:32].long()) for domain in train.DOMAINS]
            print(f"{name:8}" + "".join(f"{loss:9.3f}" for loss in losses))


if __name__ == "__main__":
    main()
