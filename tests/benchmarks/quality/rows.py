"""Documents as rows of token ids: a train split, a tuning split to choose strengths on, a test split to report.

Legend: B sequences, T tokens, N tokens of a stream.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from quality import tasks, texts
from quality.texts import NEUTRAL, Documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "tuning", "test"]
EXPERTS = ("code", *texts.LANGUAGES, "arithmetic", "strings", "questions")
DOMAINS = (*EXPERTS, NEUTRAL)
EXACT = ("arithmetic", "strings")
"""Domains whose score is the share of exact answers; of the others it is the loss."""
TRAINED_ON = 2_000_000  # characters of a domain at most


@dataclass(frozen=True)
class Rows:
    """ids [B, T]; answers [B, T]: the number of the answer that a token belongs to, from 1, and 0 for tokens that are not scored."""

    ids_BT: Tensor
    answers_BT: Tensor

    @property
    def labels_BT(self) -> Tensor:
        """Ids to predict, -100 where a token is not scored."""
        return torch.where(self.answers_BT > 0, self.ids_BT, -100)


@cache
def documents(domain: str) -> Documents:
    """The material of a domain."""
    if domain in texts.LANGUAGES:
        return texts.language(texts.LANGUAGES[domain])
    if domain == "code":
        return texts.code()
    if domain == NEUTRAL:
        return texts.neutral()
    return {"arithmetic": tasks.arithmetic, "strings": tasks.strings, "questions": tasks.questions}[domain]()


def side(name: str) -> Split:
    """Which split a document is in: a tenth and a tenth, by a checksum of its name, so that it depends on nothing else."""
    at = zlib.crc32(name.encode()) % 10
    return "test" if at == 0 else "tuning" if at == 1 else "train"


def part(docs: Documents, split: Split) -> Documents:
    """The documents of a split in a random but fixed order, up to a number of characters."""
    names = [name for name in docs if side(name) == split]
    random.Random(0).shuffle(names)
    taken: Documents = {}
    size = 0
    for name in names:
        if size > TRAINED_ON:
            break
        taken[name] = docs[name]
        size += sum(len(i.prompt) + len(i.answer) for i in docs[name])
    return taken


def stream(tokenizer: PreTrainedTokenizerBase, docs: Documents) -> Rows:
    """All items one after the other as one row [1, N]; an end-of-text token after each document of running text."""
    ids: list[int] = []
    answers: list[int] = []
    flat = [item for doc in docs.values() for item in doc]
    prompts = _encoded(tokenizer, [item.prompt for item in flat])
    replies = _encoded(tokenizer, [item.answer for item in flat])
    for count, (item, prompt, reply) in enumerate(zip(flat, prompts, replies), 1):
        end = [] if item.prompt else [tokenizer.eos_token_id]
        ids += [*prompt, *reply, *end]
        answers += [0] * len(prompt) + [count] * (len(reply) + len(end))
    return Rows(torch.tensor([ids]), torch.tensor([answers]))


def _encoded(tokenizer: PreTrainedTokenizerBase, texts_: list[str]) -> list[list[int]]:
    found: list[list[int]] = tokenizer(texts_, add_special_tokens=False)["input_ids"]
    return found


def held_out(stream_1N: Rows, length: int, count: int, whole: bool, first: int | None = None) -> Rows:
    """At most `count` rows of `length` tokens from a stream; with `whole`, answers that a row cuts off are not scored.

    first: the token that the model expects at the beginning of a text, in place of a row's first one.
    """
    size = stream_1N.ids_BT.shape[1] // length * length
    ids_BT = stream_1N.ids_BT[0, :size].view(-1, length)
    answers_BT = stream_1N.answers_BT[0, :size].view(-1, length)
    chosen = torch.randperm(len(ids_BT), generator=torch.Generator().manual_seed(0))[:count]
    ids_BT, answers_BT = ids_BT[chosen].contiguous(), answers_BT[chosen].clone()
    rows = _begun(Rows(ids_BT, answers_BT), first)
    if whole:
        sizes = torch.bincount(stream_1N.answers_BT[0])
        for row in rows.answers_BT:
            found = torch.bincount(row, minlength=len(sizes))
            row[found[row] < sizes[row]] = 0
    return rows


def windows(stream_1N: Rows, length: int, count: int, generator: torch.Generator, first: int | None = None) -> Rows:
    """`count` windows at random places of a stream."""
    start_B = torch.randint(stream_1N.ids_BT.shape[1] - length, (count,), generator=generator)
    at_BT = start_B[:, None] + torch.arange(length)
    return _begun(Rows(stream_1N.ids_BT[0][at_BT], stream_1N.answers_BT[0][at_BT]), first)


def _begun(rows: Rows, first: int | None) -> Rows:
    """The rows, in place, with nothing scored where nothing comes before it."""
    rows.answers_BT[:, 0] = 0
    if first is not None:
        rows.ids_BT[:, 0] = first
    return rows
