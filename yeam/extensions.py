"""Methods and plugins of other installed packages, found through their entry points."""

from __future__ import annotations

from importlib.metadata import entry_points

from yeam.errors import YeamError


def load_entry_points(group: str) -> None:
    """Import everything that installed packages offer in the group; one that fails to import is an error naming it."""
    for entry in entry_points(group=group):
        try:
            entry.load()
        except Exception as error:
            raise YeamError(
                f"the entry point {entry.name!r} of {group} ({entry.value}) fails to load: {error}",
                "repair or uninstall the package that brings it",
            ) from error
