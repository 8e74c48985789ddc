"""`yeam methods`, `yeam plugins` and `yeam families`."""

from __future__ import annotations

from typing import Any

from yeam.cli.common import Debug, Json, Quiet, handled, print_json


def methods(as_json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """List the merge methods with their parameters.

    Example: yeam methods
    """
    from yeam.methods import methods as registered

    with handled(debug, as_json):
        found = registered()
        if as_json:
            print_json({name: _described(method) for name, method in found.items()})
            return
        if quiet:
            return
        from rich.console import Console
        from rich.table import Table

        table = Table("method", "base", "parameters", "what it does")
        for name, method in sorted(found.items()):
            parameters = "\n".join(
                f"{p.name}{' (each model)' if p.per_source else ''}: {'required' if p.required else _shown(p.default)}"
                for p in method.parameters.values()
            )
            table.add_row(name, method.base, parameters, method.summary)
        Console().print(table)


def _described(method: Any) -> dict[str, Any]:
    return {
        "summary": method.summary,
        "base": method.base,
        "sources": list(method.sources),
        "parameters": {
            p.name: {
                "type": str(p.annotation),
                "default": p.default[0] if p.per_source and p.default else p.default,
                "required": p.required,
                "per_model": p.per_source,
            }
            for p in method.parameters.values()
        },
    }


def _shown(default: Any) -> str:
    if isinstance(default, tuple) and len(default) != 1:
        return "not set" if not default else ", ".join(map(str, default))
    value = default[0] if isinstance(default, tuple) else default
    return "not set" if value is None else str(value)


def plugins(as_json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """List the plugins, which rewrite a plan, with their options.

    Example: yeam plugins
    """
    from yeam.plugins.registry import described

    with handled(debug, as_json):
        found = described()
        if as_json:
            print_json(found)
            return
        if quiet:
            return
        from rich.console import Console
        from rich.padding import Padding
        from rich.text import Text

        console = Console(highlight=False)
        for name, plugin in sorted(found.items()):
            options = "\n".join(
                f"{key}{' (a model)' if option['model'] else ''}: {'required' if option['required'] else _shown(option['default'])}"
                for key, option in plugin["options"].items()
            )
            console.print(Text.assemble((name, "bold"), f": {plugin['summary']}"))
            description = plugin["description"].partition("Raises ")[0].rstrip()
            for text, indent in ((description, 2), (options, 6)):
                if text:
                    console.print(Padding(Text(text), (0, 0, 0, indent)))
            console.print()


def families(as_json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """List the model families whose tensors are known by table; others are inferred.

    Example: yeam families
    """
    from yeam.families import FAMILIES

    with handled(debug, as_json):
        if as_json:
            print_json({name: {"model_types": list(family.model_types)} for name, family in FAMILIES.items()})
            return
        if quiet:
            return
        from rich.console import Console
        from rich.table import Table

        table = Table("family", "model types")
        for name, family in sorted(FAMILIES.items()):
            table.add_row(name, ", ".join(family.model_types))
        console = Console()
        console.print(table)
        console.print("Any other architecture is inferred from names and shapes.", highlight=False)
