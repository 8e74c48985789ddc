"""One vocabulary out of several, and the `tokenizer.json` that goes with it.

The first tokenizer's ids stay; new tokens follow, those of the algorithm before those that are looked for in the text.
A union of byte-pair encodings has the merges of the first, in order, then those of the others: a text is split as the
first would, and neighbouring pieces may then be joined to new tokens, none is ever split. WordPiece takes the longest
token and Unigram the likeliest pieces, each with the score that its own model gave it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from yeam.errors import CheckpointError, YeamError
from yeam.vocabulary.tokens import PLAIN, SPECIAL_LISTS, SPECIAL_NAMES, Attributes, Tokens, content


@dataclass(frozen=True)
class United:
    """The output's tokens: `ids` as in `Tokens`, `added` with their attributes.

    `new` counts what the first tokenizer, each of the others and at last the recipe alone brought. `files` are the
    texts of `tokenizer.json` and `tokenizer_config.json`, empty where the first tokenizer's own files serve as they
    are.
    """

    ids: Mapping[str, int]
    added: Mapping[str, Attributes]
    new: tuple[int, ...]
    files: Mapping[str, str]


def unite(first: Tokens, others: Sequence[Tokens], wanted: Iterable[str], known: Sequence[Tokens]) -> United:
    """The tokens of `first`, the further ones of `others`, then those of `wanted` that none of these have.

    What is wanted becomes an added token, with the attributes that the first of `known` that has it so gives it. What
    `Tokens.below` has cut off is not written. Raises CheckpointError for tokenizers of different kinds, and where a
    tokenizer has to be changed that has no tokenizer.json.
    """
    ids, added = dict(first.ids), dict(first.added)
    new = [len(ids), *(0 for _ in others), 0]
    end = first.end

    def take(text: str, number: int) -> None:
        nonlocal end
        ids[text] = end
        new[number] += 1
        end += 1

    for number, other in enumerate(others, 1):
        for text in other.ids:
            if text not in ids and text not in other.added:
                _check_kinds(first, other, text)
                take(text, number)
    for number, other in enumerate(others, 1):
        for text, how in other.added.items():
            if text not in ids:
                take(text, number)
                added[text] = how
            elif how.get("special"):
                added.setdefault(text, how)
    for text in wanted:
        if text not in ids:
            take(text, len(new) - 1)
            added[text] = next((tokens.added[text] for tokens in known if text in tokens.added), PLAIN)
    united = United(ids, added, tuple(new), {})
    if len(ids) == len(first.ids) and added.keys() == first.added.keys() and not first.cut:
        return united
    return replace(united, files=_files(united, first, others))


def _check_kinds(first: Tokens, other: Tokens, text: str) -> None:
    if first.kind != other.kind:
        raise CheckpointError(
            f"the tokenizers in {first.folder} and {other.folder} have no union: one is {first.kind}, the other "
            f"{other.kind} (with the token {text!r})",
            "name the model whose vocabulary the output shall have: `tokenizer: {source: MODEL}`",
        )


def _files(united: United, first: Tokens, others: Sequence[Tokens]) -> dict[str, str]:
    if first.spec is None:
        raise CheckpointError(
            f"{first.folder}: has no tokenizer.json, and its tokenizer cannot be changed without one",
            "convert it to a fast tokenizer first, or choose another `tokenizer: {source: …}`",
        )
    model = dict(first.spec["model"])
    build = _pieces if model["type"] == "Unigram" else _entries
    model["vocab"] = build(united, first, others)
    if model["type"] == "BPE":
        model["merges"] = _merges(model, united.ids, [first, *(other for other in others if other.kind == first.kind)])
    listed = sorted(united.added, key=lambda text: united.ids[text])
    tokens = [{"id": united.ids[text], "content": text, **united.added[text]} for text in listed]
    spec = json.dumps({**first.spec, "added_tokens": tokens, "model": model}, indent=2, ensure_ascii=False)
    _check(spec, united, first)
    settings = _settings(united, first)
    return {"tokenizer.json": spec, "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False) + "\n"}


def _entries(united: United, first: Tokens, others: Sequence[Tokens]) -> dict[str, int]:
    """Added tokens too: the library numbers those that the model does not know anew."""
    return dict(united.ids)


def _pieces(united: United, first: Tokens, others: Sequence[Tokens]) -> list[list[Any]]:
    """A list in the order of ids; what is no piece of a model (an added token, an unused id) has the lowest score."""
    scores: dict[str, float] = {}
    for tokens in (first, *others):
        if tokens.kind == first.kind and tokens.spec is not None:
            for piece, score in tokens.spec["model"]["vocab"]:
                scores.setdefault(piece, score)
    least = min(scores.values(), default=0.0)
    texts = {id: text for text, id in united.ids.items()}
    names = [texts.get(id, f"<unused_{id}>") for id in range(max(texts, default=-1) + 1)]
    return [[name, scores.get(name, least)] for name in names]


def _merges(model: Mapping[str, Any], ids: Mapping[str, int], all_tokens: Sequence[Tokens]) -> list[list[str]]:
    """The merges of all, each once, whose parts and result are tokens of the output."""
    prefix = len(model.get("continuing_subword_prefix") or "")
    found: dict[tuple[str, str], None] = {}
    for tokens in all_tokens:
        assert tokens.spec is not None  # tokenizers of one kind all have one
        for merge in tokens.spec["model"].get("merges") or []:
            pair = merge.split(" ", 1) if isinstance(merge, str) else merge
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
                raise CheckpointError(
                    f"{tokens.folder / 'tokenizer.json'}: the merge {merge!r} is no pair of tokens", "download it again"
                )
            left, right = pair
            if left in ids and right in ids and left + right[prefix:] in ids:
                found.setdefault((left, right))
    return [list(pair) for pair in found]


def _settings(united: United, first: Tokens) -> dict[str, Any]:
    """The tokenizer_config.json without special tokens that were cut off, and with every added token under its id."""
    settings = dict(first.settings)
    for name in SPECIAL_NAMES:
        text = content(settings.get(name))
        if text is not None and text not in united.ids:
            del settings[name]
    for name in SPECIAL_LISTS:
        value = settings.get(name)
        if isinstance(value, Mapping):
            settings[name] = {key: token for key, token in value.items() if content(token) in united.ids}
        elif isinstance(value, list):
            settings[name] = [token for token in value if content(token) in united.ids]
    listed = sorted(united.added, key=lambda text: united.ids[text])
    settings["added_tokens_decoder"] = {
        str(united.ids[text]): {"content": text, **united.added[text]} for text in listed
    }
    return settings


def _check(spec: str, united: United, first: Tokens) -> None:
    """The library must read the new tokenizer, and number its tokens as the rows of the embedding will be."""
    from tokenizers import Tokenizer

    try:
        found = Tokenizer.from_str(spec).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises nothing more specific
        raise YeamError(f"the vocabulary built on {first.folder} is no valid tokenizer: {error}") from error
    wrong = [text for text, id in united.ids.items() if found.get(text) != id]
    if wrong:
        raise CheckpointError(
            f"{first.folder}: its tokenizer numbers {wrong[0]!r} {found.get(wrong[0])}, and its files say "
            f"{united.ids[wrong[0]]}",
            "save the tokenizer again with `save_pretrained`",
        )
