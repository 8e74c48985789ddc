"""YAML text into plain data with the line of every key and item; and plain data back into YAML text."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from yeam.errors import ConfigError
from yeam.recipe.problems import KeyPath, Locations, Problem, show

MAX_NODES = 1_000_000
"""A document may not be larger than this once its aliases are expanded."""

_TAG = "tag:yaml.org,2002:"
_MERGE = _TAG + "merge"
# YAML 1.1 wants a dot and a signed exponent; everyone writes 1e-5 and means the number
_EXPONENT = re.compile(r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader; dates stay text and `1e-5` is a number."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own interface
        first: [(tag, pattern) for tag, pattern in pairs if tag not in (_TAG + "timestamp", _TAG + "value")]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper; quotes what `_Loader`, or any other loader, would not read as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> ScalarNode:
    # the emitter writes these line breaks raw in every other style, and reading folds them into spaces
    style = '"' if any(mark in text for mark in "\x85\u2028\u2029") else None
    return dumper.represent_scalar(_TAG + "str", text, style=style)


_Dumper.add_representer(str, _represent_text)
for _resolving in (_Loader, _Dumper):
    _resolving.add_implicit_resolver(_TAG + "float", re.compile(_EXPONENT.pattern + "$"), list("-+.0123456789"))


@dataclass
class Document:
    """Plain data (dict with text keys, list, str, int, float, bool, None) and where each part of it was written.

    `spans` has the characters [first, end) of the text that a mapping with the key `search` takes, by its path; aliases
    of one mapping have the same.
    """

    data: Any
    places: Locations
    spans: dict[KeyPath, tuple[int, int]] = field(default_factory=dict)


def dump_yaml(data: Any) -> str:
    """YAML text that `read_document` reads as the same data; keys keep their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)


def read_document(text: str, name: str) -> Document:
    """The single document in `text`: as `read_documents`, and a second one is a ConfigError.

    Data is None for text without a document.
    """
    roots = _compose(text, name)
    if len(roots) > 1:
        raise ConfigError(f"{name}:{_line(roots[1])}: a second document begins here", "write one document")
    return _build(roots[0], name) if roots else Document(None, Locations(name))


def read_documents(text: str, name: str) -> list[Document]:
    """The documents in `text`, as `---` separates them, empty ones left out; `name` stands for the text in messages.

    Raises ConfigError with `name:line` for text that is no YAML, duplicate keys, recursive or exploding aliases, and
    tags beyond plain YAML.
    """
    documents = [_build(root, name) for root in _compose(text, name)]
    return [document for document in documents if document.data is not None]


def _build(root: Node, name: str) -> Document:
    try:
        size = _expanded_size(root, name)
        if size > MAX_NODES:
            raise ConfigError(
                f"{name}: {size:.3g} values once its aliases are expanded, more than {MAX_NODES:,}", "use fewer aliases"
            )
        builder = _Builder(name)
        data = builder.build(root, ())
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply", "flatten the recipe") from None
    if builder.problems:
        raise ConfigError("\n".join(f"{name}:{line}: {text}" for line, text in sorted(builder.problems)))
    return Document(data, builder.places, builder.spans)


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1


def _last(node: Node) -> int:
    """Where the text of a node ends; a block's own mark lies behind the comments that follow it."""
    if isinstance(node, MappingNode | SequenceNode) and node.value and not node.flow_style:
        return _last(node.value[-1][1] if isinstance(node, MappingNode) else node.value[-1])
    return int(node.end_mark.index)


def _compose(text: str, name: str) -> list[Node]:
    loader = None
    try:
        loader = _Loader(text)
        roots: list[Node] = []
        while loader.check_node():
            root = loader.get_node()
            roots += [root] if root is not None else []
        return roots
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply", "flatten the recipe") from None
    except (OverflowError, ValueError):  # PyYAML's own limits for \U escapes
        raise ConfigError(
            f"{name}: an escape names a character that does not exist", "correct what follows `\\U`"
        ) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        # PyYAML gives the code point of a forbidden character
        shown = chr(error.character) if isinstance(error.character, int) else error.character
        raise ConfigError(
            f"{name}:{line}: the character {shown!r} is not allowed in YAML", "remove it, or write it escaped"
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark is not None else name
        context = f" {error.context}" if error.context else ""
        raise ConfigError(
            f"{where}: not valid YAML{context}: {error.problem}", "check indentation, colons, quotes and brackets"
        ) from None
    finally:
        if loader is not None:
            loader.dispose()


def _expanded_size(root: Node, name: str) -> int:
    """The number of nodes with every alias written out, without writing any out."""
    sizes: dict[int, int] = {}
    active: set[int] = set()

    def measure(node: Node) -> int:
        key = id(node)
        if key in active:
            raise ConfigError(f"{name}:{_line(node)}: this anchor contains an alias of itself", "remove the alias")
        if key not in sizes:
            active.add(key)
            if isinstance(node, MappingNode):
                sizes[key] = 1 + sum(measure(part) for pair in node.value for part in pair)
            elif isinstance(node, SequenceNode):
                sizes[key] = 1 + sum(measure(part) for part in node.value)
            else:
                sizes[key] = 1
            active.discard(key)
        return sizes[key]

    return measure(root)


class _Builder:
    """Nodes to data; notes the line of every key and list item, and what is wrong, in passing."""

    def __init__(self, name: str) -> None:
        self.places = Locations(name)
        self.problems: list[tuple[int, str]] = []
        self.spans: dict[KeyPath, tuple[int, int]] = {}
        self._scalars = yaml.constructor.SafeConstructor()

    def build(self, node: Node, path: KeyPath, line: int | None = None) -> Any:
        self.places.marks[path] = _line(node) if line is None else line
        if isinstance(node, MappingNode):
            if self._tag_is(node, ("map",), path):
                entries = self._entries(node, path)
                if "search" in entries:
                    self.spans[path] = (int(node.start_mark.index), _last(node))
                return {key: self.build(value, (*path, key), at) for key, (at, value) in entries.items()}
        elif isinstance(node, SequenceNode):
            if self._tag_is(node, ("seq",), path):
                return [self.build(value, (*path, index)) for index, value in enumerate(node.value)]
        elif isinstance(node, ScalarNode) and self._tag_is(node, ("null", "bool", "int", "float", "str"), path):
            try:
                return self._scalars.construct_object(node)
            except (ValueError, KeyError, yaml.YAMLError):
                self._note(node, path, f"has {node.value[:60]!r}, which is not a {node.tag.removeprefix(_TAG)}")
        return None

    def _note(self, node: Node, path: KeyPath, message: str) -> None:
        self.problems.append((_line(node), str(Problem(path, message))))

    def _tag_is(self, node: Node, names: tuple[str, ...], path: KeyPath) -> bool:
        if node.tag in [_TAG + name for name in names]:
            return True
        shown = "!!" + node.tag.removeprefix(_TAG) if node.tag.startswith(_TAG) else node.tag
        self._note(node, path, f"has the YAML tag {shown}, which a recipe cannot use")
        return False

    def _entries(self, node: MappingNode, path: KeyPath) -> dict[str, tuple[int, Node]]:
        """Key to (line, value); what `<<` merges in comes first and yields to the mapping's own keys."""
        own: dict[str, tuple[int, Node]] = {}
        merged: dict[str, tuple[int, Node]] = {}
        for key, value in node.value:
            if not isinstance(key, ScalarNode):
                self._note(key, path, "has a key that is not text")
            elif key.tag == _MERGE:
                for source in value.value if isinstance(value, SequenceNode) else [value]:
                    if isinstance(source, MappingNode):
                        merged = {**self._entries(source, path), **merged}
                    else:
                        self._note(value, path, "has a '<<' that is not followed by a mapping or a list of mappings")
            elif key.value in own:
                where = f" in {show(path)}" if path else " at the top level"
                message = f"duplicate key {key.value!r}{where}, first given in line {own[key.value][0]}"
                self.problems.append((_line(key), message))
            else:
                # the text as written, so that `on:` and `1:` are the keys 'on' and '1'
                own[key.value] = (_line(key), value)
        return {**merged, **own}
