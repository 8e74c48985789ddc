"""Plugins by name. A plugin is a function plan → plan: it changes jobs, adds them or drops them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from yeam.errors import ConfigError, YeamError, suggest
from yeam.extensions import load_entry_points
from yeam.planning.jobs import Plan

ENTRY_POINTS = "yeam.plugins"

Plugin = Callable[..., Plan]
_PLUGINS: dict[str, Plugin] = {}


def plugin(name: str) -> Callable[[Plugin], Plugin]:
    """Register a plan → plan function under `name`; its keyword parameters are the options in the recipe.

    Raises YeamError when the name is taken.
    """

    def register(function: Plugin) -> Plugin:
        if name in _PLUGINS:
            raise YeamError(f"two plugins are named {name!r}", "rename one of them")
        _PLUGINS[name] = function
        return function

    return register


def plugins() -> Mapping[str, Plugin]:
    """All plugins by name: the built-in ones and those of installed packages (entry points `yeam.plugins`)."""
    _load()
    return dict(_PLUGINS)


def apply_plugin(plan: Plan, name: str, options: Mapping[str, Any], where: str) -> Plan:
    """Run one plugin of the recipe on the plan.

    `name` is a registered name, or `package.module:name` for a plugin that importing that module registers. Raises
    ConfigError for an unknown plugin or unknown options, YeamError for a plugin that fails or returns something that
    is no plan.
    """
    function = _find(name, where)
    try:
        inspect.signature(function).bind(plan, **options)
    except TypeError as error:
        known = ", ".join(_options(function)) or "none"
        raise ConfigError(f"{where}: plugin {name!r}: {error}", f"its options are: {known}") from None
    try:
        result = function(plan, **options)
    except YeamError as error:
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
    return list(inspect.signature(function).parameters)[1:]


@cache
def _load() -> None:
    load_entry_points(ENTRY_POINTS)
