"""Merge methods by name. A method is one function; its signature is its schema; registering is one decorator.

A streaming method maps one tile to one tile:

    @merge_method("linear", base="unused")
    def linear(x_KT: Tensor, *, weight: PerSource[float], normalize: bool = True) -> Tensor: ...

Positional parameters are filled by name: `x_KT` the sources, `base_T` the base, `exact` as in `Inputs`. `stats` needs `needs=`, a
callable that turns the inputs of the tensor into statistics in a pass of its own. A method with `needs=Whole` instead receives
`inputs` and yields the output's tiles itself, in order. A streaming method that says `elementwise=True` lets the stages of a recipe
pass through memory. Keyword-only parameters are the configuration: their annotations are validated by pydantic, `PerSource[...]`
marks the ones that each model has a value of, a trailing underscore is dropped (`lambda_`). A per-model parameter named `step` is
the model's training step where the recipe does not give it and the model tells it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from annotated_types import Ge, Le

from yeam.errors import ConfigError, YeamError, suggest
from yeam.extensions import load_entry_points
from yeam.methods.inputs import Inputs

if TYPE_CHECKING:
    from pydantic import TypeAdapter
    from torch import Tensor

ENTRY_POINTS = "yeam.methods"


class _PerSource:
    """The mark inside `PerSource[...]`."""


T = TypeVar("T")
PerSource = Annotated[Sequence[T], _PerSource]
Share = Annotated[float, Ge(0), Le(1)]
"""A part of a whole."""


class Whole:
    """`needs=Whole`: the method drives the passes itself; `resident` says what it keeps in memory meanwhile."""


@dataclass(frozen=True)
class Parameter:
    """One configuration parameter: YAML name, python keyword, validated type, default, and whether each model has its own."""

    name: str
    keyword: str
    annotation: Any
    default: Any
    required: bool
    per_source: bool

    def check(self, value: Any, where: str) -> Any:
        """The value in the parameter's type; raises ConfigError naming the place."""
        from pydantic import ValidationError

        try:
            checked = _adapter(self.annotation).validate_python(value)
        except ValidationError as error:
            raise ConfigError(
                f"{where}: {self.name} = {value!r} is not usable: {error.errors()[0]['msg'].lower()}"
            ) from None
        if isinstance(checked, float) and not math.isfinite(checked):  # from text: a recipe's numbers are finite
            raise ConfigError(f"{where}: {self.name} = {value!r} is not usable: input should be a finite number")
        return checked


@cache
def _adapter(annotation: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(annotation)


Base = Literal["required", "optional", "unused"]
Settle = Callable[[int, Mapping[str, Any]], tuple[Sequence[int], Mapping[str, Any]]]
"""(number of sources, parameters) → (indices of the sources that take part, parameters with one value for each source given)."""


Check = Callable[[tuple[int, ...], Mapping[str, Any]], None]
"""(shape of a tensor, parameters) → nothing; raises ConfigError for parameters that do not go together, or not with the tensor."""


@dataclass(frozen=True)
class Method:
    """A registered method. `run` yields the output's tiles in order, in the working dtype; `resident` estimates the bytes kept in
    memory beyond the tiles, from the shape, the number of sources and the parameters. `elementwise`: an element of the result
    depends on that element of the inputs only, and on nothing else but the parameters. `tensors`, `settle`, `check`: as in
    `merge_method`."""

    name: str
    summary: str
    base: Base
    sources: tuple[int, int | None]
    exact: bool
    parameters: Mapping[str, Parameter]
    run: Callable[[Inputs, Mapping[str, Any]], Iterator[Tensor]] = field(repr=False)
    resident: Callable[[tuple[int, ...], int, Mapping[str, Any]], int] = field(repr=False)
    elementwise: bool = False
    tensors: bool = True
    settle: Settle | None = field(default=None, repr=False)
    check: Check | None = field(default=None, repr=False)

    def parameter(self, name: str) -> Parameter | None:
        return self.parameters.get(name)


_METHODS: dict[str, Method] = {}


def merge_method(
    name: str,
    *,
    base: Base = "optional",
    sources: int | tuple[int, int | None] = (1, None),
    needs: Any = None,
    resident: Callable[[tuple[int, ...], int, Mapping[str, Any]], int] | None = None,
    exact: bool = True,
    elementwise: bool = False,
    tensors: bool = True,
    settle: Settle | None = None,
    check: Check | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a merge method under `name`; the function itself is returned unchanged.

    base: whether the method uses a base model; `unused` means that a base model donates config and tokenizer only.
    sources: how many, exactly or as (least, most). needs: None, a callable Inputs → statistics, or Whole.
    resident: for Whole methods, bytes kept in memory. exact: False for a method that is defined in float32 even under
    `math: exact`. elementwise: True for a method without statistics whose result for an element depends on that element alone; its
    results as intermediate stages then need no folder. tensors: False for a method that needs no torch where the inputs' `stored_tiles`
    serve, so that memory need not be kept free for it. settle: chooses and orders the sources at plan time, so that others are
    not read; raises ConfigError. check: refuses at plan time what the types of the parameters cannot. Raises YeamError when the
    name is taken by another function or when the signature cannot be a schema.
    """
    if elementwise and needs not in (None, Whole):
        raise YeamError(f"method {name!r}: with statistics it is not elementwise", "leave out one of them")

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        known = _METHODS.get(name)
        if known is not None:
            raise YeamError(f"two merge methods are named {name!r}", "rename one of them")
        _METHODS[name] = Method(
            name=name,
            summary=(inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " "),
            base=base,
            sources=(sources, sources) if isinstance(sources, int) else sources,
            exact=exact,
            parameters=_schema(name, function),
            run=_runner(name, function, needs),
            resident=resident or (lambda shape, count, values: 0),
            elementwise=elementwise,
            tensors=tensors,
            settle=settle,
            check=check,
        )
        return function

    return register


def _schema(name: str, function: Callable[..., Any]) -> dict[str, Parameter]:
    keywords = [p for p in inspect.signature(function).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    for parameter in keywords:
        if parameter.annotation is inspect.Parameter.empty:
            raise YeamError(f"method {name!r}: parameter {parameter.name!r} has no type annotation")
    # only these are evaluated: the positional ones may name types that are imported for type checking alone
    holder = SimpleNamespace(__annotations__={p.name: p.annotation for p in keywords})
    hints = get_type_hints(holder, globalns=getattr(function, "__globals__", {}), include_extras=True)
    schema = {}
    for parameter in keywords:
        annotation = hints[parameter.name]
        per_source = get_origin(annotation) is Annotated and _PerSource in get_args(annotation)[1:]
        if per_source:
            annotation = get_args(get_args(annotation)[0])[0]
        yaml_name = parameter.name.rstrip("_")
        required = parameter.default is inspect.Parameter.empty
        schema[yaml_name] = Parameter(
            yaml_name, parameter.name, annotation, None if required else parameter.default, required, per_source
        )
    return schema


def _runner(
    name: str, function: Callable[..., Any], needs: Any
) -> Callable[[Inputs, Mapping[str, Any]], Iterator[Tensor]]:
    positional = [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    allowed = {"inputs"} if needs is Whole else {"x_KT", "base_T", "exact", "stats"}
    if unknown := [p for p in positional if p not in allowed]:
        raise YeamError(f"method {name!r}: positional parameters are {sorted(allowed)}, not {unknown}")
    if ("stats" in positional) != (needs not in (None, Whole)):
        raise YeamError(f"method {name!r}: `stats` and `needs=` go together")

    def run(inputs: Inputs, values: Mapping[str, Any]) -> Iterator[Tensor]:
        if needs is Whole:
            yield from function(inputs, **values)
            return
        stats = needs(inputs) if needs is not None else None
        for tile in inputs.tiles():
            given = {"x_KT": tile.sources_KT, "base_T": tile.base_T, "exact": inputs.exact, "stats": stats}
            yield function(*(given[p] for p in positional), **values)

    return run


def methods() -> Mapping[str, Method]:
    """All methods by name: the built-in ones and those of installed packages (entry points `yeam.methods`)."""
    _load()
    return dict(_METHODS)


def method_named(name: str) -> Method:
    """The method of that name. Raises ConfigError with the nearest known name."""
    _load()
    if name not in _METHODS:
        raise ConfigError(
            f"unknown merge method {name!r}{suggest(name, _METHODS)}", "`yeam methods` lists what there is"
        )
    return _METHODS[name]


@cache
def _load() -> None:
    import yeam.methods.arcee_fusion
    import yeam.methods.attention
    import yeam.methods.averaging
    import yeam.methods.breadcrumbs
    import yeam.methods.consensus
    import yeam.methods.dare
    import yeam.methods.della
    import yeam.methods.inject
    import yeam.methods.iso
    import yeam.methods.karcher
    import yeam.methods.linear
    import yeam.methods.metagpt
    import yeam.methods.model_stock
    import yeam.methods.multislerp
    import yeam.methods.nearswap
    import yeam.methods.nuslerp
    import yeam.methods.passthrough
    import yeam.methods.pcb
    import yeam.methods.ram
    import yeam.methods.sce
    import yeam.methods.slerp
    import yeam.methods.task_arithmetic
    import yeam.methods.ties
    import yeam.methods.tsv
    import yeam.methods.wudi
    import yeam.methods.yeam  # noqa: F401 - importing registers

    load_entry_points(ENTRY_POINTS)
