"""References to models, and sizes, as a recipe writes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yeam.errors import ConfigError
from yeam.recipe import ModelRef, parse_size

NAMES = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,8}(/[A-Za-z0-9_][A-Za-z0-9_.-]{0,8})?", fullmatch=True)
REVISIONS = st.none() | st.from_regex(r"[A-Za-z0-9_./-]{1,10}", fullmatch=True)
PATHS = st.from_regex(r"/nowhere(/[a-z .-]{1,6}[a-z]){1,3}", fullmatch=True)
PARTS = st.builds(ModelRef, NAMES, REVISIONS) | st.builds(ModelRef, PATHS)


@settings(deadline=None)
@given(PARTS, st.none() | PARTS)
def test_references_round_trip(part: ModelRef, lora: ModelRef | None) -> None:
    if any(piece is not None and os.path.exists(piece.path) for piece in (part, lora)):
        return  # a name that happens to exist in the current directory becomes that path
    ref = ModelRef(part.path, part.revision, lora)
    assert ModelRef.parse(str(ref)) == ref and hash(ModelRef.parse(str(ref))) == hash(ref)


def test_existing_paths_win_over_splitting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a@b", "a+b", "a+b+c", "plain"):
        (tmp_path / name).mkdir()
    at, plus, both, plain = (str(tmp_path / name) for name in ("a@b", "a+b", "a+b+c", "plain"))
    assert ModelRef.parse("a@b") == ModelRef(at) == ModelRef.parse(at) == ModelRef.parse("~/a@b")
    assert ModelRef.parse("a+b+c") == ModelRef(both)
    assert ModelRef.parse("a+b+a@b") == ModelRef(plus, None, ModelRef(at))
    assert ModelRef.parse("a+b+lab/x@r") == ModelRef(plus, None, ModelRef("lab/x", "r"))
    assert ModelRef.parse("plain+a+b") == ModelRef(plain, None, ModelRef(plus))
    assert ModelRef.parse("lab/x@r+a@b") == ModelRef("lab/x", "r", ModelRef(at))
    assert ModelRef.parse({"model": {"path": "a+b"}, "lora": "a@b"}) == ModelRef(plus, None, ModelRef(at))
    for name in ("a", "b+c", "c"):
        (tmp_path / name).mkdir()
    (tmp_path / "a+b+c").rmdir()
    with pytest.raises(ConfigError, match=r"'a\+b\+c' can be read in 2 ways"):
        ModelRef.parse("a+b+c")
    for ref in (ModelRef(plus, None, ModelRef(at)), ModelRef("lab/x", "r", ModelRef(at)), ModelRef(plain)):
        assert ModelRef.parse(str(ref)) == ref


def test_what_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").touch()
    for text in ("model.safetensors", "./x", "../x", "/x/y", "~/x", "a/b/c"):
        assert ModelRef.parse(text).is_local(), text
    for text in ("gpt2", "owner/name", "owner/name.v1@main"):
        assert not ModelRef.parse(text).is_local(), text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", "does not name a model"),
        ("lab/a@", "'' is not a revision of 'lab/a'"),
        ("lab/a@b@c", "more than one '@'"),
        ("lab/a+", "neither an existing path nor"),
        ("lab/a+lab/b+lab/c", "does not name a model"),
        ("/nowhere/a@main", "'/nowhere/a' is a local path and has no revision 'main'"),
        ("/nowhere/a+/b+c", "does not name a model"),
        ({"path": "/nowhere/a+b"}, "the path '/nowhere/a\\+b' does not exist"),
        ({"model": "a", "lorra": "b"}, r"unknown key 'lorra' in the model \(did you mean 'lora'\?\)"),
        ({"lora": "b"}, "names no 'model'"),
        ({"model": {"path": "a", "revision": 5}}, "the revision 5 must be text"),
        ({"model": "a", "override_architecture": "L"}, "'override_architecture' is not supported"),
        (None, "must be text or a mapping"),
    ],
)
def test_references_that_cannot_be_read(value: object, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        ModelRef.parse(value)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("2GiB", 2**31), ("1.5 kib", 1536), ("3K", 3072), ("1g", 2**30),
        ("2T", 2**41), ("1TB", 10**12), ("4096", 4096), (4096, 4096), (5e9, 5 * 10**9), (" 0.1KB ", 100),
    ],
)  # fmt: skip
def test_sizes(text: int | float | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5B", "5 GBB", "-1GB", "1e9", "0", "0.1", "٣GB", "1,5GB", 0, -4, 1.5, True])
def test_what_is_no_size(text: int | float | str) -> None:
    with pytest.raises(ConfigError, match=r"is not a (size|whole number)"):
        parse_size(text)
