"""Plugin `transplant`: the output has the vocabulary of another model; what it knows of its own tokens stays."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from yeam.checkpoint import Checkpoint, TensorInfo
from yeam.errors import CheckpointError, ConfigError, suggest
from yeam.planning.jobs import Companion, Input, Job, Plan, Share, Vocabulary
from yeam.plugins.registry import PluginContext, plugin

if TYPE_CHECKING:
    from yeam.planning.lexicon import Lexicon
    from yeam.planning.members import Member
    from yeam.transfer.lexical import Lexical
    from yeam.transfer.newrows import Method, Pattern
    from yeam.vocabulary.special import Renumbering
    from yeam.vocabulary.tokens import Tokens
    from yeam.vocabulary.unite import United

AMPLE = 4  # shared tokens for each number of a row: fewer say little about the rest
_ZEROS = ("zero", "zeros")


@plugin("transplant", references=("vocabulary",))
def transplant(
    plan: Plan,
    context: PluginContext,
    *,
    vocabulary: str,
    method: str = "nearest",
    k: int = 64,
    pad_to_multiple_of: int | None = None,
) -> Plan:
    """The recipe's result with the tokenizer of the model `vocabulary`, whose other weights play no part.

    Tokens that both vocabularies have, by the bytes that they stand for, keep their rows. method: how the rows of the others come
    about. `nearest` and `omp` look at the donor's rows: a new token is a combination of k shared ones there (the nearest ones with a
    ridge, or by orthogonal matching pursuit, which takes several times as long and was worse on every text measured), and the same
    combination of the result's own rows here; a linear map carries the rest.
    `subword` is the mean of the tokens that the text falls into, `mean` that of all shared tokens. pad_to_multiple_of: rows are added
    up to a multiple of it. Raises ConfigError for options that mean nothing and beside `tokenizer:`, CheckpointError for models
    without a tokenizer or embedding, and for vocabularies that share too little.
    """
    _check(plan, method, k, pad_to_multiple_of)
    from yeam.planning.lexicon import lexicon
    from yeam.planning.texts import difference
    from yeam.transfer.lexical import Lexical

    first, donor = context.members[plan.donor], context.member(vocabulary)
    host, guest = (lexicon(member, _tokens(member)) for member in (first, donor))
    if host.tokens.ids == guest.tokens.ids:
        note = f"{first.ref.label} has the vocabulary of {donor.ref.label} already: nothing to transplant"
        return replace(plan, notes=(*plan.notes, note))
    lexical = Lexical(host.tokens, guest.tokens)
    _check_shared(lexical, host, guest, method, k)
    work = _Transplant(plan, context, host, guest, lexical, method, k, pad_to_multiple_of or 1)
    told = tuple(note for note in plan.notes if note != difference(first, donor))
    return replace(work.plan(), notes=(*told, *work.notes()))


def _check(plan: Plan, method: str, k: int, pad: int | None) -> None:
    from yeam.recipe.fields import MOST_ROWS
    from yeam.transfer.newrows import METHODS

    if method in _ZEROS:
        raise ConfigError(
            "method: rows of zeros would give new tokens the logit 0, above that of most known ones",
            "use `mean` for rows that say nothing",
        )
    if method not in METHODS:
        raise ConfigError(f"method: {method!r} is not one of {', '.join(METHODS)}{suggest(str(method), METHODS)}")
    for name, value in (("k", k), ("pad_to_multiple_of", 1 if pad is None else pad)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}: {value!r} is not a whole number above 0", f"leave `{name}` out for the default")
    if (pad or 1) > MOST_ROWS:
        raise ConfigError(f"pad_to_multiple_of: {pad} is more than {MOST_ROWS}", "no vocabulary needs more empty rows")
    if plan.vocabulary is not None:
        raise ConfigError(
            "the recipe has settled the output's vocabulary already",
            "remove `tokenizer:`, or transplant in a stage of its own",
        )


def _tokens(member: Member) -> Tokens:
    from yeam.vocabulary.files import tokenizer_folder
    from yeam.vocabulary.tokens import read_tokens

    tokens = read_tokens(tokenizer_folder(member.checkpoint))
    if tokens is None:
        raise CheckpointError(f"{member.ref} has no tokenizer files", "put the tokenizer into the model's folder")
    return tokens


def _check_shared(lexical: Lexical, host: Lexicon, guest: Lexicon, method: str, k: int) -> None:
    shared, needed = len(lexical.pairs), k if method in ("nearest", "omp") else 1
    if shared < needed:
        raise CheckpointError(
            f"the vocabularies of {host.member.ref} and {guest.member.ref} share {shared or 'no'} tokens"
            + (f", and a combination takes {k}" if shared else ""),
            "lower `k`, or use `method: subword`, which needs no shared tokens but those that write the text"
            if shared
            else "choose another vocabulary: nothing of this model could be kept",
        )


@dataclass
class _Transplant:
    """The models of one plan in the donor's vocabulary."""

    before: Plan
    context: PluginContext
    host: Lexicon
    guest: Lexicon
    lexical: Lexical
    method: str
    k: int
    multiple: int

    def __post_init__(self) -> None:
        from yeam.vocabulary.special import Renumbering
        from yeam.vocabulary.unite import unite

        self.united: United = unite(self.guest.tokens, [], (), [self.guest.tokens])
        self.size = self.guest.tokens.end + -self.guest.tokens.end % self.multiple
        self.filler_R = np.ones(self.size, dtype=np.bool_)
        self.filler_R[list(self.united.ids.values())] = False
        self.numbers: Renumbering = Renumbering(
            self._as_in_the_output(), self.united, self.guest.tokens.specials, self.size
        )
        self._patterns: dict[str, Pattern] = {}
        self._label = self.guest.member.ref.label

    def _as_in_the_output(self) -> Tokens:
        """The host's tokens with the output's texts for those that it keeps, and texts that the output cannot have for others."""
        kept = {id: self.guest.tokens.texts[other] for other, id in self.lexical.pairs.items()}
        ids = {kept.get(id, f"\0{id}"): id for id in self.host.tokens.texts}
        return replace(self.host.tokens, ids=ids)

    def plan(self) -> Plan:
        from yeam.planning.lexicon import resized
        from yeam.planning.vocabulary import generation_file, tokenizer_replaced

        first, donor, before = self.host.member, self.guest.member, self.before
        wanted: dict[int, dict[str, None]] = {first.index: {}}
        for job in before.jobs:
            for source in job.reads:
                if self._by_token(source):
                    wanted.setdefault(source.model, {})[source.tensor] = None
        moved: dict[int, Member] = {}
        for index, names in wanted.items():
            member = self.context.members[index]
            files = generation_file(first.checkpoint.folder, self.numbers) if index == first.index else {}
            moved[index] = self._add(member, self._view(member, list(names), files))
        config = before.config
        if config is not None:
            config = resized(self.numbers.config(config), first, self.size)
        chosen = donor
        if files := tokenizer_replaced(donor, self.guest.tokens, self.united):
            chosen = self._add(donor, self._view(donor, [], files))
        return replace(
            before,
            jobs=tuple(self._moved(job, moved) for job in before.jobs),
            donor=moved[first.index].index,
            tokenizer_donor=chosen.index,
            config=config,
            vocabulary=self._summary(),
        )

    def notes(self) -> Iterator[str]:
        """What to tell the user. Call it after `plan`."""
        kept, new = len(self.lexical.pairs), len(self.lexical.new_M)
        made = {
            "nearest": f"combined of their {self.k} nearest shared tokens",
            "omp": f"combined of {self.k} shared tokens by matching pursuit",
            "subword": "the means of the tokens that their texts fall into",
            "mean": "the mean of the shared tokens",
        }[self.method]
        yield (
            f"the output has the {len(self.united.ids):,} tokens of {self._label}: {kept:,} keep their rows, "
            f"{new:,} are new and {made}"
        )
        for pattern in self._patterns.values():
            if kept < AMPLE * pattern.width:
                yield (
                    f"{kept:,} shared tokens are few for rows of {pattern.width:,} numbers (fewer than {AMPLE} a number): "
                    "the new rows may be poor; compare with `method: subword`"
                )
                break
        for each in (self.host, self.guest):
            if each.tokens.cut:
                yield f"{each.member.ref.label}: {each.tokens.cut:,} tokens of its tokenizer have no row in its embedding"
        if self.numbers.lost:
            yield f"not among the output's tokens, so left out: {', '.join(dict.fromkeys(self.numbers.lost))}"

    def _add(self, member: Member, view: Checkpoint) -> Member:
        return self.context.add(f"{member.ref.label} (with the vocabulary of {self._label})", view)

    def _by_token(self, source: Input) -> bool:
        meaning = self.context.members[source.model].anatomy.tensors.get(source.tensor)
        return meaning is not None and meaning.vocab_axis is not None

    def _view(self, member: Member, names: list[str], files: Mapping[str, str | Path | None]) -> Checkpoint:
        """A model with its rows of shared tokens where the donor has them, and new ones between."""
        from yeam.planning.lexicon import resized, vocabulary_tensors
        from yeam.transfer.newrows import NewRows
        from yeam.vocabulary.gather import Part
        from yeam.vocabulary.view import Rows, VocabularyView

        if names:
            vocabulary_tensors(member)  # refuses rows that cannot be picked
        lexical, new = self.lexical, len(self.lexical.new_M)
        own_R, new_R = np.full((2, self.size), -1, dtype=np.int64)
        own_R[lexical.shared_donor_N] = lexical.shared_host_N
        new_R[lexical.new_M] = np.arange(new)
        method: Method = self.method  # type: ignore[assignment]
        patterns = {name: self._pattern(member, name) for name in names}
        made = NewRows(member.checkpoint, lexical, patterns, method)
        rows = {}
        for name in names:
            info, axis = member.info(name), member.anatomy.tensors[name].vocab_axis or 0
            if info.shape[axis] < self.host.tokens.end:
                raise CheckpointError(
                    f"{member.ref}: {name} has {info.shape[axis]} rows, and the tokenizer of {self.host.member.ref} has "
                    f"tokens up to {self.host.tokens.end - 1}",
                    "merge models of one vocabulary",
                )
            parts = [Part(member.checkpoint, name, own_R), *([Part(made, name, new_R)] if new else [])]
            computed = new > 0 or bool(self.filler_R.any())
            dtype = "F32" if computed and info.dtype != "F64" else info.dtype
            shape = (*info.shape[:axis], self.size, *info.shape[axis + 1 :])
            rows[name] = Rows(TensorInfo(name, dtype, shape), name, tuple(parts), self.filler_R)
        config = resized(self.numbers.config(member.checkpoint.config), member, self.size)
        return VocabularyView(member.checkpoint, config, rows, files)

    def _pattern(self, member: Member, name: str) -> Pattern | None:
        """Where the donor's rows that belong to a tensor are: of the head to the head, where it has one of its own."""
        from yeam.transfer.newrows import Pattern

        if self.method in ("subword", "mean"):
            return None
        meaning, found = member.anatomy.tensors[name], self._weights(self.guest)
        site = "head" if "head" in meaning.roles else meaning.site
        if site not in ("embedding", "head") or "embedding" not in found:
            where = name if "embedding" in found else f"the embedding of {self.guest.member.ref}"
            raise CheckpointError(
                f"{where} has no rows that new tokens could be combined by", "use `method: subword` or `method: mean`"
            )
        tensor = found.get(site, found["embedding"])
        if tensor not in self._patterns:
            self._patterns[tensor] = Pattern(
                self.lexical,
                (self.guest.member.checkpoint, tensor),
                (self.host.member.checkpoint, self._weights(self.host)["embedding"]),
                pursue=self.method == "omp",
                k=self.k,
            )
        return self._patterns[tensor]

    @staticmethod
    def _weights(each: Lexicon) -> dict[str, str]:
        """Site → name of the matrices with a row for each token."""
        infos = {name: each.member.info(name) for name in each.tensors}
        return {
            each.member.anatomy.tensors[name].site: name
            for name, info in infos.items()
            if len(info.shape) == 2 and info.shape[0] >= each.tokens.end
        }

    def _moved(self, job: Job, moved: Mapping[int, Member]) -> Job:
        """The job on the models in the donor's vocabulary."""
        if not any(map(self._by_token, job.reads)):
            return job

        def place(source: Input) -> Input:
            return Input(moved[source.model].index, source.tensor) if self._by_token(source) else source

        def placed(part: Job | Companion) -> dict[str, Any]:
            shapes = {moved[s.model].info(s.tensor).shape for s in part.inputs if self._by_token(s)}
            shape = shapes.pop() if len(shapes) == 1 else part.shape
            return {"shape": shape, "sources": tuple(map(place, part.sources)), "base": part.base and place(part.base)}

        companions = {name: replace(companion, **placed(companion)) for name, companion in job.companions.items()}
        job = replace(job, **placed(job), companions=companions)
        return replace(job, method="passthrough", parameters={}, work="F32") if job.method == "copy" else job

    def _summary(self) -> Vocabulary:
        kept, new, count = len(self.lexical.pairs), len(self.lexical.new_M), len(self.united.ids)
        content = json.dumps([self.united.ids, self.united.files, self.size], sort_keys=True)
        return Vocabulary(
            source=str(self.guest.member.ref),
            tokens=count,
            rows=self.size,
            by_recipe=0,
            shares=(
                Share(self.host.member.index, brought=0, own=kept, borrowed=0, averaged=new, zeros=0),
                Share(self.guest.member.index, brought=count, own=0, borrowed=0, averaged=0, zeros=0),
            ),
            digest=hashlib.sha256(content.encode()).hexdigest()[:32],
        )
