"""The schema of a recipe: what may be written where. A superset of mergekit's; unknown keys are errors.

`yeam.recipe.load.load_recipe` builds these from YAML or plain data and turns what is wrong into one ConfigError.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from yeam.recipe.fields import (
    NOT_EMPTY,
    DTypeName,
    Flag,
    Ignored,
    LayerRange,
    MathMode,
    Name,
    Parameters,
    Plugins,
    Reference,
    Size,
    Text,
    fault,
)
from yeam.recipe.problems import KeyPath, Problem
from yeam.recipe.reference import ModelRef
from yeam.recipe.tokenizer import ModelToken, TokenizerRecipe, Vocabulary


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelEntry(_Block):
    """An input model over its whole depth, with its own parameters."""

    model: Reference
    parameters: Parameters = Field(default_factory=dict)


class SourceEntry(_Block):
    """The layers [first, end) of an input model, as one source of an output slice."""

    model: Reference
    layer_range: LayerRange
    parameters: Parameters = Field(default_factory=dict)

    @property
    def layer_count(self) -> int:
        return self.layer_range[1] - self.layer_range[0]


class SliceEntry(_Block):
    """Consecutive layers of the output, merged from equally many layers of every source.

    `tie`: the slice repeats layers that the output already has, and shall share their weights where the model can.
    `residual_weight`: mergekit's schema has it and nothing reads it, there or here.
    """

    sources: Annotated[tuple[SourceEntry, ...], NOT_EMPTY]
    base_model: Reference | None = None
    parameters: Parameters = Field(default_factory=dict)
    tie: Flag = False
    residual_weight: Ignored = None

    @property
    def layer_count(self) -> int:
        return self.sources[0].layer_count

    @model_validator(mode="after")
    def _equally_deep(self) -> SliceEntry:
        first = self.sources[0]
        problems = [
            Problem(
                ("sources", index, "layer_range"),
                f"has {source.layer_count} layers, the first source of the slice has {first.layer_count}",
                remedy="give every source of a slice as many layers",
            )
            for index, source in enumerate(self.sources)
            if source.layer_count != first.layer_count
        ]
        if problems:
            raise fault(*problems)
        return self


def _exactly_one(block: BaseModel, names: tuple[str, ...]) -> None:
    given = [name for name in names if getattr(block, name) is not None]
    if not given:
        raise fault(Problem((), f"must have exactly one of {', '.join(names)}, and has none"))
    if len(given) > 1:
        raise fault(Problem((given[1],), f"cannot be given together with {given[0]!r}", remedy="remove one of them"))


class ModuleEntry(_Block):
    """One module of a model of several (a vision tower, a decoder), merged in its own way."""

    models: Annotated[tuple[ModelEntry, ...], NOT_EMPTY] | None = None
    slices: Annotated[tuple[SliceEntry, ...], NOT_EMPTY] | None = None
    base_model: Reference | None = None
    parameters: Parameters = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_kind_of_input(self) -> ModuleEntry:
        _exactly_one(self, ("models", "slices"))
        return self


class MergeRecipe(_Block):
    """What is asked: the inputs, the method and its parameters, and the form of the output.

    One document of a recipe file; in a file of several, `name` is how the others call what this one makes, and without an `output` it
    is the output folder's name. Exactly one of `models`, `slices` and `modules` is set. `dtype` and `out_dtype` are torch names
    (`bfloat16`); `math` is `fp32` (arithmetic in float32) or `exact` (mergekit's rounding); `shard_size` is in bytes.
    """

    merge_method: Text
    base_model: Reference | None = None
    models: Annotated[tuple[ModelEntry, ...], NOT_EMPTY] | None = None
    slices: Annotated[tuple[SliceEntry, ...], NOT_EMPTY] | None = None
    modules: Annotated[Mapping[str, ModuleEntry], NOT_EMPTY] | None = None
    parameters: Parameters = Field(default_factory=dict)
    dtype: DTypeName | None = None
    out_dtype: DTypeName | None = None
    math: MathMode = "fp32"
    tokenizer: TokenizerRecipe | None = None
    tokenizer_source: Vocabulary | None = None
    chat_template: Text | None = None
    plugins: Plugins = ()
    output: Text | None = None
    shard_size: Size | None = None
    name: Name | None = None
    allow_nan: Flag = False

    @model_validator(mode="after")
    def _consistent(self) -> MergeRecipe:
        _exactly_one(self, ("models", "slices", "modules"))
        if self.tokenizer is not None and self.tokenizer_source is not None:
            message = "cannot be given together with 'tokenizer'"
            raise fault(Problem(("tokenizer_source",), message, remedy="keep tokenizer.source"))
        return self

    def references(self) -> Iterator[tuple[KeyPath, ModelRef]]:
        """Every model that the recipe names, with its place: inputs in order, base models, then tokenizer sources.

        A model named twice comes twice.
        """
        yield from _input_references(self, ())
        for name, module in (self.modules or {}).items():
            yield from _input_references(module, ("modules", name))
        if isinstance(self.tokenizer_source, ModelRef):
            yield ("tokenizer_source",), self.tokenizer_source
        if self.tokenizer is not None:
            if isinstance(self.tokenizer.source, ModelRef):
                yield ("tokenizer", "source"), self.tokenizer.source
            for token, entry in (self.tokenizer.tokens or {}).items():
                path: KeyPath = ("tokenizer", "tokens", token, "source")
                if isinstance(entry.source, ModelRef):
                    yield path, entry.source
                elif isinstance(entry.source, ModelToken):
                    yield (*path, "model"), entry.source.model

    def plain(self) -> dict[str, Any]:
        """The recipe as YAML data, without what was left at its default."""
        return self.model_dump(exclude_unset=True)


def _input_references(block: MergeRecipe | ModuleEntry, path: KeyPath) -> Iterator[tuple[KeyPath, ModelRef]]:
    for index, entry in enumerate(block.models or ()):
        yield (*path, "models", index, "model"), entry.model
    for number, piece in enumerate(block.slices or ()):
        for index, source in enumerate(piece.sources):
            yield (*path, "slices", number, "sources", index, "model"), source.model
        if piece.base_model is not None:
            yield (*path, "slices", number, "base_model"), piece.base_model
    if block.base_model is not None:
        yield (*path, "base_model"), block.base_model
