"""From a parameter as written to its value for one tensor: filters, gradients, levels of precedence."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from yeam.errors import ConfigError, suggest
from yeam.recipe.load import LoadedRecipe
from yeam.recipe.problems import KeyPath, Problem
from yeam.recipe.reference import ModelRef
from yeam.recipe.schema import MergeRecipe, ModuleEntry
from yeam.recipe.settings import Filtered, Gradient, Scalar, Setting, filters_of


def layer_position(index: int | None, count: int) -> float:
    """Where a tensor stands in a gradient: `index / (count - 1)` within a slice of `count` layers.

    1 in a slice of one layer; 0 for a tensor outside of all layers (`index` None).
    """
    if index is None:
        return 0.0
    if not 0 <= index < count:
        raise ValueError(f"layer {index} is not in a slice of {count} layers")
    return 1.0 if count == 1 else index / (count - 1)


def evaluate(setting: Setting, tensor_name: str, t: float, roles: Collection[str] = ()) -> Scalar:
    """The value of a setting for one tensor, at `t` in [0, 1] of its slice; None where it has none (fall through).

    Of filtered items the first that picks the tensor decides. Gradients are linear between their knots.
    """
    items = filters_of(setting)
    if items:
        for item in items:
            if picks(item, tensor_name, roles):
                return _along_layers(item.value, t)
        return None
    return _along_layers(setting, t)  # type: ignore[arg-type]


def picks(item: Filtered, tensor_name: str, roles: Collection[str]) -> bool:
    """Whether a filter picks a tensor: by a part of its name, or by one of its roles for `role:NAME`."""
    if item.role is not None:
        return item.role in roles
    return item.picks_all or (item.filter is not None and item.filter in tensor_name)


def _along_layers(value: Scalar | Gradient, t: float) -> Scalar:
    if not isinstance(value, tuple):
        return value
    if len(value) == 1:
        return value[0]
    if not 0.0 <= t <= 1.0:
        raise ValueError(f"a gradient has no value at {t}, outside of [0, 1]")
    scaled = t * (len(value) - 1)
    knot = int(scaled)
    lower, upper = value[knot], value[min(knot + 1, len(value) - 1)]
    for end in (lower, upper):
        if isinstance(end, bool) or not isinstance(end, int | float):
            raise ConfigError(f"{end!r} cannot be a point of a gradient", "use numbers, or a single value")
    assert isinstance(lower, int | float) and isinstance(upper, int | float)
    part = scaled - knot
    mixed = (1 - part) * lower + part * upper
    # rounding must not leave the interval: a constant gradient is that constant
    return float(min(max(mixed, min(lower, upper)), max(lower, upper)))


class Mention(NamedTuple):
    """A parameter given somewhere in a recipe; `path` ends with its name."""

    path: KeyPath
    name: str
    is_per_source: bool


def mentioned_parameters(recipe: MergeRecipe) -> list[Mention]:
    """Every parameter that a recipe gives, at any level, in the order of the schema."""
    return [mention for mention, _ in _mentions(recipe, ())]


def _mentions(block: MergeRecipe | ModuleEntry, path: KeyPath) -> Iterator[tuple[Mention, Setting]]:
    yield from _of_level(block.parameters, path, False)
    for index, entry in enumerate(block.models or ()):
        yield from _of_level(entry.parameters, (*path, "models", index), True)
    for number, piece in enumerate(block.slices or ()):
        here = (*path, "slices", number)
        yield from _of_level(piece.parameters, here, False)
        for index, source in enumerate(piece.sources):
            yield from _of_level(source.parameters, (*here, "sources", index), True)
    if isinstance(block, MergeRecipe):
        for name, module in (block.modules or {}).items():
            yield from _mentions(module, (*path, "modules", name))


def _of_level(
    parameters: Mapping[str, Setting], path: KeyPath, is_per_source: bool
) -> Iterator[tuple[Mention, Setting]]:
    for name, setting in parameters.items():
        yield Mention((*path, "parameters", name), name, is_per_source), setting


def _filter_items(recipe: MergeRecipe) -> Iterator[tuple[KeyPath, int, Filtered]]:
    """Every filtered item of a recipe: the path of its setting, its index there, itself."""
    for mention, setting in _mentions(recipe, ()):
        for index, item in enumerate(filters_of(setting)):
            yield mention.path, index, item


class UnmatchedFilter(NamedTuple):
    """A filter that picked no tensor; `path` leads to its item."""

    path: KeyPath
    filter: str


@dataclass(frozen=True)
class Level:
    """The parameters of one block of a recipe, and the path of that block."""

    path: KeyPath
    parameters: Mapping[str, Setting]


@dataclass
class FilterLog:
    """Which filters have picked a tensor so far, by the path of their setting and their index in it."""

    matched: set[tuple[KeyPath, int]] = field(default_factory=set)


class Resolver:
    """The parameters that hold in one part of a recipe: a slice, a module, or the whole.

    A value comes from the source (`models[i]` or `sources[i]`), else from the slice, the module, the top level. A
    filter list that picks nothing, or null, passes on to the next level. `Resolver.of` builds one from a recipe;
    resolvers made from it by `at` share its record of the filters that matched. Where it is not `is_filtered`, a value
    depends on the source and on `t` alone.
    """

    def __init__(
        self,
        loaded: LoadedRecipe,
        top: Level,
        module: Level | None = None,
        slice_level: Level | None = None,
        sources: Sequence[tuple[ModelRef, Level]] = (),
        log: FilterLog | None = None,
    ) -> None:
        self._loaded = loaded
        self._shared = [level for level in (slice_level, module, top) if level is not None]
        self._sources = list(sources)
        self._log = FilterLog() if log is None else log
        levels = [*self._shared, *(level for _, level in self._sources)]
        self._given = frozenset(name for level in levels for name in level.parameters)
        self.is_filtered = any(filters_of(setting) for level in levels for setting in level.parameters.values())

    @classmethod
    def of(cls, loaded: LoadedRecipe, known_roles: Collection[str] | None = None) -> Resolver:
        """The resolver of a recipe's top level, with its `models`.

        With `known_roles`, raises ConfigError with the line of every `role:` filter that names none of them.
        """
        if known_roles is not None:
            problems = [
                Problem((*path, index), f"names the unknown role {item.role!r}", hint=suggest(item.role, known_roles))
                for path, index, item in _filter_items(loaded.recipe)
                if item.role is not None and item.role not in known_roles
            ]
            if problems:
                raise loaded.places.error(problems)
        return cls._build(loaded, None, None, FilterLog())

    def at(self, module: str | None = None, slice_index: int | None = None) -> Resolver:
        """The resolver of a module, of a slice, or of a slice of a module, of the same recipe."""
        return self._build(self._loaded, module, slice_index, self._log)

    @classmethod
    def _build(cls, loaded: LoadedRecipe, module: str | None, slice_index: int | None, log: FilterLog) -> Resolver:
        recipe = loaded.recipe
        top = Level((), recipe.parameters)
        block: MergeRecipe | ModuleEntry = recipe
        path: KeyPath = ()
        module_level = None
        if module is not None:
            block, path = (recipe.modules or {})[module], ("modules", module)
            module_level = Level(path, block.parameters)
        if slice_index is not None:
            piece, path = (block.slices or ())[slice_index], (*path, "slices", slice_index)
            entries = [
                (source.model, Level((*path, "sources", index), source.parameters))
                for index, source in enumerate(piece.sources)
            ]
            return cls(loaded, top, module_level, Level(path, piece.parameters), entries, log)
        entries = [
            (entry.model, Level((*path, "models", index), entry.parameters))
            for index, entry in enumerate(block.models or ())
        ]
        return cls(loaded, top, module_level, None, entries, log)

    def value(
        self,
        parameter: str,
        *,
        output_name: str,
        input_name: str | None = None,
        t: float = 0.0,
        roles: Collection[str] = (),
        source: int | ModelRef | None = None,
        default: Scalar = None,
    ) -> Scalar:
        """The value of a parameter for one output tensor.

        Without `source` the parameter is a global one: filters see `output_name`, and giving it to a single model is a
        ConfigError. With `source`, an index into the inputs or a model, it is a per-model one: filters see that model's
        `input_name` (`output_name` where that is None); a model that is not among the inputs, such as an unlisted base,
        has no level of its own. `t` is `layer_position(...)`, `roles` are all roles of the tensor.
        """
        if parameter not in self._given:  # most are not, and a plan asks for each of them for every tensor
            return default
        if source is None:
            for _, level in self._sources:
                if parameter in level.parameters:
                    raise self._loaded.error(
                        (*level.path, "parameters", parameter),
                        f"{parameter!r} is not a per-model parameter",
                        "move it to the recipe's own 'parameters'",
                    )
            name, levels = output_name, self._shared
        else:
            name = output_name if input_name is None else input_name
            levels = [*self._levels_of(source), *self._shared]
        found: Scalar = None
        for level in levels:
            setting = level.parameters.get(parameter)
            # levels below the decisive one are looked at too: their filters do match tensors
            self._note_matches(level, parameter, setting, name, roles)
            if found is None:
                found = evaluate(setting, name, t, roles)
        return default if found is None else found

    def _levels_of(self, source: int | ModelRef) -> list[Level]:
        if isinstance(source, int):
            return [self._sources[source][1]]
        levels = [level for model, level in self._sources if model == source]
        if len(levels) > 1:
            raise ValueError(f"{source} is an input {len(levels)} times: name the source by its index")
        return levels

    def _note_matches(self, level: Level, parameter: str, setting: Setting, name: str, roles: Collection[str]) -> None:
        for index, item in enumerate(filters_of(setting)):
            if picks(item, name, roles):
                self._log.matched.add(((*level.path, "parameters", parameter), index))

    def unmatched_filters(self) -> list[UnmatchedFilter]:
        """The filters, anywhere in the recipe, that have picked no tensor in any call of `value` so far.

        A filter counts as matched when the tensor's name contains it, even where an earlier item or a nearer level
        decided. Items that pick everything are never listed.
        """
        return [
            UnmatchedFilter((*path, index), item.filter)
            for path, index, item in _filter_items(self._loaded.recipe)
            if item.filter is not None and not item.picks_all and (path, index) not in self._log.matched
        ]
