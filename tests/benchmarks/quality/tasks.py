"""Domains of questions with one right answer: arithmetic, strings, and what Python's functions do."""

from __future__ import annotations

import ast
import inspect
import random
from collections.abc import Iterator

from quality.texts import Documents, Item, modules

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PROBLEMS = 60_000  # drawn; those drawn twice count once


def arithmetic_item(rng: random.Random) -> Item:
    """A sum or difference of a number below 100 and a digit, or a product of two small numbers."""
    sign = rng.choice("+-*")
    a, b = (rng.randrange(13), rng.randrange(13)) if sign == "*" else (rng.randrange(100), rng.randrange(10))
    value = a + b if sign == "+" else a - b if sign == "-" else a * b
    return Item(f"{a} {sign} {b} =", f" {value}\n")


def string_item(rng: random.Random) -> Item:
    """One operation on three to five letters, which stand apart so that a tokenizer cannot join them."""
    word = [rng.choice(LETTERS) for _ in range(rng.randint(3, 5))]
    kind = rng.choice(("reverse", "sort", "last", "double", "swap"))
    if kind == "swap":
        result = [word[-1], *word[1:-1], word[0]]
    elif kind == "double":
        result = [c for c in word for _ in range(2)]
    else:
        result = {"reverse": word[::-1], "sort": sorted(word), "last": word[-1:]}[kind]
    return Item(f"{kind} {' '.join(word)} =", f" {' '.join(result)}\n")


def arithmetic() -> Documents:
    rng = random.Random("arithmetic")
    return _problems(arithmetic_item(rng) for _ in range(PROBLEMS))


def strings() -> Documents:
    rng = random.Random("strings")
    return _problems(string_item(rng) for _ in range(PROBLEMS))


def _problems(items: Iterator[Item]) -> Documents:
    """Every problem is a document of its own: none that is scored was trained on."""
    return {item.prompt: [item] for item in items}


def questions() -> Documents:
    """Question: what does it do? Answer: the first line of its documentation. One document a module."""
    docs: Documents = {}
    for name, tree in modules():
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        found = list(_documented(tree, module))
        if found:
            docs[name] = found
    return docs


def _documented(tree: ast.AST, prefix: str) -> Iterator[Item]:
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        label, text = f"{prefix}.{node.name}", ast.get_docstring(node)
        if text:
            kind = "is" if isinstance(node, ast.ClassDef) else "does"
            line = inspect.cleandoc(text).split("\n\n")[0].replace("\n", " ")
            tail = "for" if kind == "is" else "do"
            yield Item(f"Question: What {kind} {label} {tail}?\nAnswer:", f" {line[:200]}\n\n")
        yield from _documented(node, label)
