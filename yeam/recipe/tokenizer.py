"""The `tokenizer:` block: whose vocabulary the output has, and where the rows of single tokens come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, ValidationInfo

from yeam.errors import suggest
from yeam.recipe.fields import Flag, Multiple, fault, parse_reference
from yeam.recipe.problems import Problem, describe
from yeam.recipe.reference import ModelRef

VOCABULARIES = ("union", "base")
KINDS = {"zero": ("kind",), "model_token": ("kind", "model", "token", "token_id")}


@dataclass(frozen=True)
class ModelToken:
    """The row of one token of one model, named by its text or by its id (exactly one of them is set)."""

    model: ModelRef
    token: str | None = None
    token_id: int | None = None


@dataclass(frozen=True)
class ZeroToken:
    """A row of zeros."""


TokenSource = ModelRef | ModelToken | ZeroToken


def _parse_vocabulary(value: Any, info: ValidationInfo) -> str | ModelRef:
    """`union`, `base` or a model."""
    return value if isinstance(value, str) and value in VOCABULARIES else parse_reference(value, info)


def _plain_vocabulary(value: str | ModelRef) -> Any:
    # a Hub repository may be called "union": as a mapping it is not mistaken for the word
    return {"model": str(value)} if isinstance(value, ModelRef) and str(value) in VOCABULARIES else str(value)


def _parse_token_source(value: Any, info: ValidationInfo) -> TokenSource:
    """A model, `{kind: zero}` or `{kind: model_token, model, token | token_id}`."""
    if isinstance(value, str) and value in KINDS:
        wanted = f"write {{{', '.join([f'kind: {value}', *(f'{key}: …' for key in KINDS[value][1:3])])}}}"
        raise fault(
            Problem((), f"{value!r} is a kind, not a model", remedy=f"{wanted}; a folder of that name is ./{value}")
        )
    if not isinstance(value, dict) or "kind" not in value:
        return parse_reference(value, info)
    kind = value["kind"]
    if not isinstance(kind, str) or kind not in KINDS:
        hint = suggest(str(kind), KINDS)
        raise fault(Problem(("kind",), f"must be one of {', '.join(KINDS)}, not {describe(kind)}", hint=hint))
    problems = [
        Problem((key,), f"unknown key {key!r} for the kind {kind!r}", "key", suggest(key, KINDS[kind]))
        for key in value
        if key not in KINDS[kind]
    ]
    if kind == "zero":
        if problems:
            raise fault(*problems)
        return ZeroToken()
    token, token_id = value.get("token"), value.get("token_id")
    if "model" not in value:
        problems.append(Problem(("model",), "'model' is missing", "key"))
    if (token is None) == (token_id is None):
        problems.append(Problem((), "must name exactly one of 'token' and 'token_id'"))
    if token is not None and not isinstance(token, str):
        problems.append(Problem(("token",), f"must be text, not {describe(token)}", remedy="put it in quotes"))
    if token_id is not None and (isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0):
        problems.append(Problem(("token_id",), f"must be a whole number of at least 0, not {describe(token_id)}"))
    if problems:
        raise fault(*problems)
    return ModelToken(parse_reference(value["model"], info), token, token_id)


def _plain_token_source(source: TokenSource | None) -> Any:
    if source is None or isinstance(source, ModelRef):
        return None if source is None else str(source)
    if isinstance(source, ZeroToken):
        return {"kind": "zero"}
    row = {"token": source.token} if source.token is not None else {"token_id": source.token_id}
    return {"kind": "model_token", "model": str(source.model), **row}


Vocabulary = Annotated[str | ModelRef, PlainValidator(_parse_vocabulary), PlainSerializer(_plain_vocabulary)]
_Source = Annotated[TokenSource, PlainValidator(_parse_token_source), PlainSerializer(_plain_token_source)]


class TokenRecipe(BaseModel):
    """One token of the output: where its row comes from, and whether it replaces the row of every model (`force`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: _Source | None = None
    force: Flag = False


class TokenizerRecipe(BaseModel):
    """The output's vocabulary: `union` of all, that of the `base`, or that of a model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Vocabulary = "union"
    tokens: Mapping[str, TokenRecipe] | None = None
    pad_to_multiple_of: Multiple | None = Field(default=None)
