"""Plugins by name. A plugin is a function plan → plan: it changes jobs, adds them or drops them.

    @plugin("inject", references=("sources", "base"))
    def inject(plan: Plan, context: PluginContext, *, sources: list[str], base: str | None = None) -> Plan: ...

Keyword-only parameters are the options in the recipe. `context`, where the signature has it, gives access to the open models.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from yeam.errors import ConfigError, UserError, YeamError, suggest
from yeam.extensions import load_entry_points
from yeam.planning.jobs import Plan
from yeam.recipe import KeyPath, LoadedRecipe, ModelRef

if TYPE_CHECKING:
    from yeam.checkpoint import Checkpoint
    from yeam.planning.members import Member, Members

ENTRY_POINTS = "yeam.plugins"

Plugin = Callable[..., Plan]
_PLUGINS: dict[str, Plugin] = {}
_REFERENCES: dict[str, tuple[str, ...]] = {}


@dataclass(frozen=True)
class PluginContext:
    """What a plugin may look at beside the plan: the recipe, the place of its use there, and the open models.

    A plan is made from headers alone: a plugin reads no weights. What has to be computed from weights is a checkpoint of
    its own, added with `add`, that computes when it is read.
    """

    loaded: LoadedRecipe
    members: Members
    where: str

    def member(self, reference: str) -> Member:
        """The model of a reference in the plugin's options; its `index` is the one in `plan.models`."""
        return self.members.of(_parse(self.loaded, reference))

    def add(self, reference: str, checkpoint: Checkpoint) -> Member:
        """Take in a model that is computed from others, under a name for reports; jobs may use its `index` from now on."""
        return self.members.add(ModelRef(reference, written=reference), checkpoint)


def plugin(name: str, *, references: tuple[str, ...] = ()) -> Callable[[Plugin], Plugin]:
    """Register a plan → plan function under `name`.

    references: options that name models (text; a list; a mapping or a list of mappings whose values name models): these
    are opened with the recipe's models. Raises YeamError when the name is taken.
    """

    def register(function: Plugin) -> Plugin:
        if name in _PLUGINS:
            raise YeamError(f"two plugins are named {name!r}", "rename one of them")
        _PLUGINS[name] = function
        _REFERENCES[name] = references
        return function

    return register


def plugins() -> Mapping[str, Plugin]:
    """All plugins by name: the built-in ones and those of installed packages (entry points `yeam.plugins`)."""
    _load()
    return dict(_PLUGINS)


def described() -> dict[str, dict[str, Any]]:
    """Every plugin by name as plain JSON: its summary and description, its options with type, default and whether they name models."""
    found = {}
    for name, function in plugins().items():
        summary, _, rest = (inspect.getdoc(function) or "").partition("\n\n")
        parameters = inspect.signature(function).parameters
        found[name] = {
            "summary": " ".join(summary.split()),
            "description": " ".join(rest.split()),
            "options": {
                option: _described(parameters[option], option in _REFERENCES[name]) for option in _options(function)
            },
        }
    return found


def _described(option: inspect.Parameter, is_model: bool) -> dict[str, Any]:
    default = None if option.default is option.empty else option.default
    return {
        "type": "" if option.annotation is option.empty else str(option.annotation),
        "default": default
        if isinstance(default, bool | int | float | str | list | tuple | dict | None)
        else str(default),
        "required": option.default is option.empty and option.kind is not option.VAR_KEYWORD,
        "model": is_model,
    }


def plugin_references(loaded: LoadedRecipe) -> Iterator[tuple[KeyPath, ModelRef]]:
    """Every model that the options of the recipe's plugins name, with its place. Raises ConfigError for an unknown plugin."""
    for number, use in enumerate(loaded.recipe.plugins):
        _find(use.name, loaded.locate(("plugins", number)))
        for option in _REFERENCES[use.name.rpartition(":")[2]]:
            path: KeyPath = ("plugins", number, use.name, option)
            yield from ((path, _parse(loaded, text, path)) for text in _texts(use.options.get(option)))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple | Mapping):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def _parse(loaded: LoadedRecipe, text: str, path: KeyPath = ()) -> ModelRef:
    try:
        return loaded.reference(text)
    except ConfigError as error:
        raise loaded.error(path, error.message, error.remedy) from None


def apply_plugin(plan: Plan, name: str, options: Mapping[str, Any], context: PluginContext) -> Plan:
    """Run one plugin of the recipe on the plan.

    `name` is a registered name, or `package.module:name` for a plugin that importing that module registers. Raises
    ConfigError for an unknown plugin or unknown options, YeamError for a plugin that fails or returns something that
    is no plan.
    """
    where = context.where
    function = _find(name, where)
    more = {"context": context} if "context" in inspect.signature(function).parameters else {}
    try:
        inspect.signature(function).bind(plan, **{**options, **more})
    except TypeError as error:
        known = ", ".join(_options(function)) or "none"
        raise ConfigError(f"{where}: plugin {name!r}: {error}", f"its options are: {known}") from None
    try:
        result = function(plan, **{**options, **more})
    except YeamError as error:
        if isinstance(error, UserError) and error.message.startswith(where):
            raise
        raise type(error)(f"{where}: plugin {name!r}: {error.message}", error.remedy) from error
    except Exception as error:
        raise YeamError(f"{where}: plugin {name!r} fails: {type(error).__name__}: {error}") from error
    if not isinstance(result, Plan):
        raise YeamError(f"{where}: plugin {name!r} returned {type(result).__name__}, not a plan")
    return result


def _find(name: str, where: str) -> Plugin:
    _load()
    module, _, plain = name.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except Exception as error:
            raise ConfigError(
                f"{where}: the plugin module {module!r} cannot be imported: {error}",
                "install its package, or put its folder on PYTHONPATH",
            ) from error
    if plain not in _PLUGINS:
        raise ConfigError(
            f"{where}: unknown plugin {plain!r}{suggest(plain, _PLUGINS)}",
            "install the package that brings it, or name it as `package.module:plugin`",
        )
    return _PLUGINS[plain]


def _options(function: Plugin) -> list[str]:
    return [name for name in list(inspect.signature(function).parameters)[1:] if name != "context"]


@cache
def _load() -> None:
    import yeam.plugins.align
    import yeam.plugins.attention
    import yeam.plugins.expand
    import yeam.plugins.graft
    import yeam.plugins.inject
    import yeam.plugins.scale_up
    import yeam.plugins.transplant  # noqa: F401 - importing registers

    load_entry_points(ENTRY_POINTS)
