"""Python code that a model brings: named in `auto_map` and `modules.json`, taken along but never run.

Files of a local folder are copied. Those of a repository on the Hub are not even downloaded: the output names them as transformers
does when it saves such a model, `owner/name--module.Class`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yeam.checkpoint.beside import named

_BUILT_IN = "sentence_transformers."


def home_of(folder: Path) -> str | None:
    """The repository on the Hub whose files a folder of the Hub's cache holds; None for any other folder."""
    kind, *parts = folder.parent.parent.name.split("--")
    return "/".join(parts) if folder.parent.name == "snapshots" and kind == "models" and parts else None


def modules_named(settings: Any) -> list[str]:
    """The Python modules, beside it, that the content of a settings file names (config.json, tokenizer_config.json, modules.json)."""
    if isinstance(settings, list):
        return [entry["type"].split(".")[0] for entry in settings if _is_own(entry)]
    table = settings.get("auto_map") if isinstance(settings, Mapping) else None
    targets = table.values() if isinstance(table, Mapping) else []
    items = (item for target in targets for item in (target if isinstance(target, list) else [target]))
    return [item.split(".")[0] for item in items if isinstance(item, str) and "--" not in item]


def at_home(settings: Any, home: str) -> Any:
    """The content of a settings file with its classes named as the repository's."""
    if isinstance(settings, list):
        return [{**entry, "type": f"{home}--{entry['type']}"} if _is_own(entry) else entry for entry in settings]
    if not modules_named(settings):
        return settings
    return {**settings, "auto_map": {key: _placed(value, home) for key, value in settings["auto_map"].items()}}


def python_files(folder: Path) -> dict[str, Path]:
    """Name → Python file directly in a local folder; of one in the Hub's cache none, whatever has been downloaded.

    Raises CheckpointError as `own`.
    """
    return {} if home_of(folder) else named(folder, ("*.py",))


def parsed(source: Path | str) -> Any:
    """The JSON of a small file; empty where it is none, which is for those who use it to say."""
    try:
        return json.loads(source if isinstance(source, str) else source.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}


def _is_own(module: Any) -> bool:
    """Whether an entry of modules.json is a class of the model's own: `file.Class`, where packages have deeper names."""
    kind = module.get("type") if isinstance(module, Mapping) else None
    return isinstance(kind, str) and not kind.startswith(_BUILT_IN) and "--" not in kind and kind.count(".") == 1


def _placed(value: Any, home: str) -> Any:
    if isinstance(value, list):
        return [_placed(item, home) for item in value]
    return f"{home}--{value}" if isinstance(value, str) and "--" not in value else value
