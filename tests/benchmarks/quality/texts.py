"""Running text by domain: the standard library's code, four languages from Mercurial's translations, and a neutral one.

Mercurial's wheel carries its help pages and messages in many languages; its catalogues are read as data, nothing of it is imported.
Nothing of the text (GPL-2.0-or-later, the code PSF) is kept but in models that stay where they are made.
"""

from __future__ import annotations

import ast
import gettext
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from types import ModuleType
from typing import NamedTuple

LANGUAGES = {"german": "de", "japanese": "ja", "portuguese": "pt_BR", "russian": "ru"}
NEUTRAL = "neutral"
EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "tiny-family" / "train.py"
MESSAGES = 20  # of a translation that make one document


class Item(NamedTuple):
    """A prompt and the answer that is scored; of running text the prompt is empty."""

    prompt: str
    answer: str


Documents = dict[str, list[Item]]
"""Name of a document → what it holds, in order. A document is on one side of a split, whole."""


def load_module(path: Path) -> ModuleType:
    """A script of the repository as a module."""
    name = f"quality_{path.parent.name.replace('-', '_')}_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def package_folder(name: str, pip: str) -> Path:
    """Where an installed package lies; it is located, not imported. Exits with the command that installs it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"{name} is not installed; run: {pip}")
    return Path(next(iter(spec.submodule_search_locations)))


def modules() -> Iterator[tuple[str, ast.Module]]:
    """The standard library's modules, parsed, as examples/tiny-family chooses them."""
    yield from load_module(EXAMPLE).modules()


def code() -> Documents:
    """The standard library without comments and docstrings."""
    docs = {}
    for name, tree in modules():
        load_module(EXAMPLE).split_docstrings(tree)
        docs[name] = [Item("", ast.unparse(tree))]
    return docs


def language(locale: str) -> Documents:
    """Mercurial's messages and help in one language, those that differ from the English ones, in the order of the English ones."""
    path = package_folder("mercurial", "pip install --no-deps mercurial") / "locale" / locale / "LC_MESSAGES" / "hg.mo"
    with path.open("rb") as file:
        catalogue = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
    pairs = sorted((k, v) for k, v in catalogue.items() if isinstance(k, str) and k and v != k)
    texts = [v.strip() for _, v in pairs]
    return {f"{locale} {at}": [Item("", "\n".join(texts[at : at + MESSAGES]))] for at in range(0, len(texts), MESSAGES)}


def neutral() -> Documents:
    """The topics of Python's language reference: English prose that no expert is trained on."""
    return {f"topic {name}": [Item("", text)] for name, text in topics.items()}
