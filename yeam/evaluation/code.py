"""Python code of a model on the Hub, in a folder that was written of it: from the commit that was read."""

from __future__ import annotations

import json
from pathlib import Path

from yeam.checkpoint.hub_repository import Repository
from yeam.planning.code import home_of


def bring_code(folder: Path, origin: Path) -> None:
    """Put the Python files of the snapshot `origin` of the Hub's cache into `folder`, and let its settings name them.

    They name the repository's, which transformers would take from its main branch. Of another `origin` nothing is done. Raises
    CheckpointError where a file cannot be had.
    """
    home = home_of(origin)
    if home is None:
        return
    repository = Repository(home, origin.name)
    for name in repository.files:
        if name.endswith(".py"):
            source, target = repository.fetch(name), folder / name  # which refuses names that lead elsewhere
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    there = json.dumps(f"{home}--")[:-1]
    for path in (folder / "config.json", *folder.glob("*_config.json")):
        if path.is_file():
            path.write_text(path.read_text("utf-8").replace(there, '"'), "utf-8")
