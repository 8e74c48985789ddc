"""A family on disk: a base, experts fine-tuned from it in several regimes, and the text that they are read with.

WORK/FAMILY/tokenizer      of the tiny family, shared by its seeds
WORK/FAMILY/data.safetensors
WORK/FAMILY/SEED/base, WORK/FAMILY/SEED/REGIME/EXPERT
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from quality import bases
from quality.cache import digest
from quality.rows import DOMAINS, EXACT, Rows, documents, held_out, part, stream
from quality.strength import COARSE, FINE
from quality.tuning import Regime, fine_tune

FULL = (Regime("short", 100, 2e-4, 8), Regime("long", 400, 1e-3, 8), Regime("lora", 200, 2e-3, 8, lora=True))
PRETRAINED = (
    Regime("short", 40, 5e-5, 4),
    Regime("long", 200, 2e-4, 4),
    Regime("far", 200, 3e-4, 8),
    Regime("lora", 80, 5e-4, 4, lora=True),
)
GEMMA = tuple(replace(r, rate=r.rate / 5) for r in PRETRAINED)
"""Twenty steps at 5e-5 went past the least loss: 0.6 times such an update gains more than the expert itself."""


@dataclass(frozen=True)
class Spec:
    """What a family is made of. length: tokens of a sequence; rows: held-out sequences a domain to tune on and to test on; strides: of
    the search for the best strength."""

    name: str
    seeds: int
    regimes: tuple[Regime, ...]
    base_steps: int = 0
    length: int = 128
    tuning_rows: int = 16
    test_rows: int = 48
    strides: tuple[int, ...] = FINE

    def with_steps(self, factor: float) -> Spec:
        """The same with shorter or longer trainings."""
        regimes = tuple(replace(r, steps=max(1, round(r.steps * factor))) for r in self.regimes)
        return replace(self, regimes=regimes, base_steps=round(self.base_steps * factor))

    def regime(self, name: str) -> Regime:
        return next(regime for regime in self.regimes if regime.name == name)


SPECS = {
    "tiny": Spec("tiny", 3, FULL, base_steps=2000),
    "smollm2": Spec("smollm2", 2, PRETRAINED, strides=COARSE),
    "gemma": Spec("gemma", 2, GEMMA, strides=COARSE),
}


class Family:
    """One seed of a family. Everything is made when it is first asked for, and found again later.

    Seeds of the pretrained families share the base and differ in the order of the fine-tuning text.
    """

    def __init__(self, spec: Spec, seed: int, work: Path) -> None:
        self.spec, self.seed = spec, seed
        self.root = work / spec.name
        self.folder = self.root / str(seed)

    @cached_property
    def base(self) -> Path:
        """The folder of the base model."""
        if self.spec.name != "tiny":
            path = self.root / "base"
            if not (path / "config.json").is_file():
                self.root.mkdir(parents=True, exist_ok=True)
                bases.unpack(self.spec.name, path)
            return path
        path = self.folder / "base"
        made = {"steps": self.spec.base_steps, "length": self.spec.length, "seed": self.seed}
        if not _as_asked(path, made):
            streams = [self.training(domain) for domain in DOMAINS]
            end = int(self.tokenizer.eos_token_id)
            model = bases.train_tiny(streams, end, self.seed, self.spec.base_steps, self.spec.length)
            bases.save(model, self.tokenizer, path, made)
        return path

    @cached_property
    def tokenizer(self) -> Any:
        if self.spec.name != "tiny":
            return AutoTokenizer.from_pretrained(self.base)
        path = self.root / "tokenizer"
        if not path.is_dir():
            bases.train_tokenizer(DOMAINS).save_pretrained(path)
        return AutoTokenizer.from_pretrained(path)

    @cached_property
    def first(self) -> int | None:
        """The token that the model expects at the beginning of a text, where its tokenizer puts one there."""
        ids = self.tokenizer("a")["input_ids"]
        begin = self.tokenizer.bos_token_id
        return begin if begin is not None and len(ids) > 1 and ids[0] == begin else None

    def expert(self, regime: str, domain: str) -> Path:
        """The folder of an expert."""
        plan = self.spec.regime(regime)
        path = self.folder / regime / domain
        made = {"regime": vars(plan), "length": self.spec.length, "seed": self.seed, "base": file_digest(self.base)}
        if not _as_asked(path, made):
            seed = zlib.crc32(f"{domain} {self.seed}".encode())
            label = f"{self.spec.name} {self.seed} {regime} {domain}"
            model = self.load(self.base)
            tuned = fine_tune(
                model,
                self.training(domain),
                plan,
                length=self.spec.length,
                seed=seed,
                label=label,
                first=self.first,
            )
            bases.save(tuned, self.tokenizer, path, made)
        return path

    def load(self, folder: Path) -> PreTrainedModel:
        """A model as it is on disk, in fp32."""
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return model

    def training(self, domain: str) -> Rows:
        """The training text of a domain, [1, N]."""
        return self._rows(domain, "train")

    def held_out(self, domain: str, split: str) -> Rows:
        """The sequences of `tuning` or `test`, at most as many as the spec says."""
        rows = self._rows(domain, split)
        count = self.spec.tuning_rows if split == "tuning" else self.spec.test_rows
        return Rows(rows.ids_BT[:count], rows.answers_BT[:count])

    def _rows(self, domain: str, split: str) -> Rows:
        return Rows(*(self._data[f"{domain}/{split}/{kind}"].long() for kind in ("ids", "answers")))

    @cached_property
    def _data(self) -> dict[str, torch.Tensor]:
        path = self.root / f"data-{self.spec.length}.safetensors"
        if not path.is_file():
            tensors = {}
            for domain in DOMAINS:
                docs = documents(domain)
                for split in ("train", "tuning", "test"):
                    rows = stream(self.tokenizer, part(docs, split))
                    if split != "train":
                        rows = held_out(rows, self.spec.length, 256, whole=domain in EXACT, first=self.first)
                    tensors[f"{domain}/{split}/ids"] = rows.ids_BT.int()
                    tensors[f"{domain}/{split}/answers"] = rows.answers_BT.int()
            partial = path.with_suffix(".partial")
            self.root.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial)
            partial.replace(path)
        return load_file(path)


def file_digest(folder: Path) -> str:
    """Of a model's weights."""
    import xxhash

    found = xxhash.xxh3_128()
    for path in sorted(folder.glob("*.safetensors")):
        found.update(path.read_bytes())
    return found.hexdigest()


def _as_asked(folder: Path, made: dict[str, Any]) -> bool:
    """Whether the folder is there and was made with these settings; one made with others is in the way."""
    path = folder / bases.MADE
    if not path.is_file():
        return False
    if json.loads(path.read_text()) != json.loads(json.dumps(made)):
        raise SystemExit(
            f"{folder} was made with other settings ({digest(made)[:6]}): use another --work, or remove it"
        )
    return True
