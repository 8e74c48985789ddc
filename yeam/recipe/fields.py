"""The field types of the schema: each turns plain YAML data into a value, or says what is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, PlainSerializer, PlainValidator, ValidationInfo
from pydantic_core import PydanticCustomError

from yeam.checkpoint.dtypes import DTYPES, dtype_named
from yeam.checkpoint.folder import is_plain_name
from yeam.errors import CheckpointError, ConfigError, suggest
from yeam.recipe.problems import Faulty, Problem, describe
from yeam.recipe.reference import ModelRef
from yeam.recipe.settings import Setting, parse_parameters, plain_parameters
from yeam.recipe.sizes import parse_size
from yeam.recipe.stages import stage_reference

T = TypeVar("T")

# e8m0 holds powers of two for the scales of other tensors: no weight can be stored in it
FLOAT_DTYPES = tuple(d.torch_name for d in DTYPES.values() if d.is_float and d.code != "F8_E8M0")
DTYPE_ALIASES = {
    "fp32": "float32",
    "float": "float32",
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
}
MATH_MODES = ("fp32", "exact")
MOST_ROWS = 65_536


def fault(*problems: Problem) -> PydanticCustomError:
    """Problems in the form in which they pass through pydantic; `ctx["problems"]` on the other side."""
    return PydanticCustomError("recipe", "{text}", {"text": "; ".join(map(str, problems)), "problems": problems})


def checked(parse: Callable[[Any], T]) -> PlainValidator:
    """A parser that raises Faulty or ConfigError, as a pydantic validator."""

    def validate(value: Any) -> T:
        try:
            return parse(value)
        except Faulty as error:
            raise fault(*error.problems) from None
        except ConfigError as error:
            raise fault(Problem((), error.message, "whole", remedy=error.remedy)) from None

    return PlainValidator(validate)


def refuse(message: str, remedy: str = "") -> Faulty:
    return Faulty([Problem((), message, remedy=remedy)])


def _not_empty(value: Any) -> Any:
    if value in ([], {}):
        raise fault(Problem((), "is empty"))
    return value


# pydantic's min_length would count the valid items only, and complain twice
NOT_EMPTY = BeforeValidator(_not_empty)


def parse_text(value: Any) -> str:
    """Text that is not blank."""
    if not isinstance(value, str):
        quote = "put it in quotes" if isinstance(value, bool | int | float) else ""
        raise refuse(f"must be text, not {describe(value)}", quote)
    if not value.strip():
        raise refuse("is empty")
    return value


def parse_name(value: Any) -> str:
    """A name for what a document makes, which may become that of a folder."""
    name = parse_text(value)
    if not is_plain_name(name):
        raise refuse(
            f"must be a plain name on one line, without `/` and of at most 255 bytes, not {describe(value)}",
            "put a path into `output:`",
        )
    return name


def parse_flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise refuse(f"must be true or false, not {describe(value)}")
    return value


def parse_count(value: Any) -> int:
    """A whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise refuse(f"must be a whole number of at least 1, not {describe(value)}")
    return value


def parse_multiple(value: Any) -> int:
    """A whole number from 1 to 65,536: rows are added up to a multiple of it."""
    if isinstance(value, int) and value > MOST_ROWS:
        raise refuse(f"must be at most {MOST_ROWS}", "no vocabulary needs more empty rows: write 64, or leave it out")
    return parse_count(value)


def parse_dtype(value: Any) -> str:
    """The torch name (`bfloat16`) of a floating-point type; short names (`bf16`) and `torch.` are understood."""
    name = parse_text(value).removeprefix("torch.")
    name = DTYPE_ALIASES.get(name, name)
    if name in FLOAT_DTYPES:
        return name
    try:
        dtype_named(name)
    except CheckpointError:
        hint = suggest(name, (*FLOAT_DTYPES, *DTYPE_ALIASES))
        raise Faulty([Problem((), f"is {value!r}, which is no dtype", hint=hint)]) from None
    raise refuse(f"is {value!r}, in which no weights can be merged", "use one of " + ", ".join(FLOAT_DTYPES))


def parse_math(value: Any) -> str:
    if value not in MATH_MODES:
        hint = suggest(str(value), MATH_MODES)
        raise Faulty([Problem((), f"must be one of {', '.join(MATH_MODES)}, not {describe(value)}", hint=hint)])
    return str(value)


def parse_layer_range(value: Any) -> tuple[int, int]:
    if (
        not isinstance(value, list)
        or len(value) != 2
        or any(isinstance(end, bool) or not isinstance(end, int) for end in value)
    ):
        raise refuse(
            f"must be two whole numbers [first, end), not {value if isinstance(value, list) else describe(value)}"
        )
    first, end = value
    if not 0 <= first < end:
        raise refuse(f"is [{first}, {end}): it must begin at 0 or later and hold at least one layer")
    return first, end


def parse_ignored(value: Any) -> float | None:
    """A number that stands in the recipe in vain."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise refuse(f"must be a number, not {describe(value)}", "or leave it out: it has no effect")
    return value


def parse_reference(value: Any, info: ValidationInfo) -> ModelRef:
    """A stage of `context["stages"]`, or a model; relative paths are also looked for in `context["base_dir"]`."""
    base_dir: str | os.PathLike[str] | None = (info.context or {}).get("base_dir")
    try:
        stage = stage_reference(value, (info.context or {}).get("stages", ()), base_dir)
        return ModelRef.parse(value, base_dir) if stage is None else stage
    except ConfigError as error:
        raise fault(Problem((), error.message, "whole", remedy=error.remedy)) from None


@dataclass(frozen=True)
class PluginUse:
    """A plugin by name, with the options that the recipe gives it."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


def parse_plugins(value: Any) -> tuple[PluginUse, ...]:
    """A list whose items are a name, or a mapping of one name to its options."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise refuse(
            f"must be a list, not {describe(value)}", "write `plugins: [name]` or `plugins: [{name: {option: 1}}]`"
        )
    problems: list[Problem] = []
    uses: list[PluginUse] = []
    for index, item in enumerate(value):
        if isinstance(item, str) and item.strip():
            uses.append(PluginUse(item))
        elif not isinstance(item, dict) or len(item) != 1:
            what = f"a mapping of {len(item)} keys" if isinstance(item, dict) else describe(item)
            problems.append(Problem((index,), f"must be a plugin's name, or name: {{options}}, not {what}"))
        else:
            ((name, options),) = item.items()
            if options is not None and not isinstance(options, dict):
                problems.append(Problem((index, name), f"must be a mapping of options, not {describe(options)}"))
            uses.append(PluginUse(name, options if isinstance(options, dict) else {}))
    if problems:
        raise Faulty(problems)
    return tuple(uses)


def plain_plugins(uses: tuple[PluginUse, ...]) -> list[Any]:
    return [{use.name: dict(use.options)} if use.options else use.name for use in uses]


# functions, because old releases of pydantic take no types as serializers
def _plain_range(layers: tuple[int, int]) -> list[int]:
    return list(layers)


def _plain_reference(reference: ModelRef) -> str:
    return str(reference)


Text = Annotated[str, checked(parse_text)]
Name = Annotated[str, checked(parse_name)]
Flag = Annotated[bool, checked(parse_flag)]
Count = Annotated[int, checked(parse_count)]
Multiple = Annotated[int, checked(parse_multiple)]
DTypeName = Annotated[str, checked(parse_dtype)]
MathMode = Annotated[str, checked(parse_math)]
Size = Annotated[int, checked(parse_size)]
LayerRange = Annotated[tuple[int, int], checked(parse_layer_range), PlainSerializer(_plain_range)]
Ignored = Annotated[float | None, checked(parse_ignored)]
Reference = Annotated[ModelRef, PlainValidator(parse_reference), PlainSerializer(_plain_reference)]
Parameters = Annotated[Mapping[str, Setting], checked(parse_parameters), PlainSerializer(plain_parameters)]
Plugins = Annotated[tuple[PluginUse, ...], checked(parse_plugins), PlainSerializer(plain_plugins)]
