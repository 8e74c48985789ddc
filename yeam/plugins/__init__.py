"""Plugins rewrite the plan between the recipe and the engine: a plugin is a function plan → plan."""

from yeam.plugins.registry import apply_plugin, plugin, plugins

__all__ = ["apply_plugin", "plugin", "plugins"]
