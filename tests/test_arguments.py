"""The arguments of the Python API: what cannot be meant is refused before the recipe or a model is looked at."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import yeam
from yeam.arguments import _CHECKS

NOWHERE = {
    "merge": ("nowhere.yaml",),
    "plan": ("nowhere.yaml",),
    "search": ("nowhere.yaml", "nowhere.txt"),
    "evaluate": ("nowhere", "nowhere.txt"),
    "compare": ("nowhere", "nowhere"),
    "verify": ("nowhere",),
    "push": ("nowhere", "owner/name"),
    "inspect": ("nowhere",),
    "inject": ("nowhere", ["nowhere"]),
    "align": ("nowhere", "elsewhere"),
}
WRONG: dict[str, dict[str, Any]] = {
    "merge": {
        "out": 3, "device": "gpu", "memory": "much", "shard_size": 0, "overwrite": "no", "resume": 1, "allow_nan": None,
        "like": 1, "overrides": [1], "keep_downloads": "yes", "cache_budget": -1, "push_to_hub": "name", "private": "x",
        "revision": 1, "guard": 1, "donor_text": [1], "guard_limit": "low", "durable": 0, "distributed": "x", "progress": "x",
    },
    "plan": {"shard_size": "x", "allow_nan": "no", "like": True, "overrides": 1},
    "search": {
        "trials": 1.5, "sampler": 1, "seed": "x", "timeout": "1h", "out": 1, "storage": 1, "plot": "", "resume": "x",
        "overwrite": "x", "context": "x", "stride": 0.5, "batch": True, "dtype": "int8", "device": 0, "memory": "x",
        "trust_remote_code": "x", "progress": 1,
    },
    "evaluate": {
        "against": 1, "stride": "x", "context": 1.5, "wikitext2": "x", "batch": "x", "dtype": "float8", "device": "x",
        "memory": "x", "trust_remote_code": 1, "update_card": "x", "progress": 1,
    },
    "compare": {"base": 1, "spectrum": "x", "device": "x", "memory": "x", "progress": 1},
    "verify": {"load": "x", "trust_remote_code": "x", "progress": 1},
    "push": {"private": "x", "revision": 1, "message": 1, "progress": 1},
    "inspect": {"model": 1},
    "inject": {"sources": [1], "base": 1, "distill": 1, "distill_progress": 1, "device": "x", "progress": "x"},
    "align": {"judge": 1, "stream": "x", "out": 1},
}  # fmt: skip


@pytest.mark.parametrize(("function", "name"), [(f, name) for f, wrong in WRONG.items() for name in wrong])
def test_refused_at_once(function: str, name: str) -> None:
    """The argument is named, though neither recipe nor model nor text is there."""
    call, value = getattr(yeam, function), WRONG[function][name]
    given = dict(zip(inspect.signature(call).parameters, NOWHERE[function]))
    with pytest.raises(yeam.UserError) as refused:
        call(**{**given, name: value})
    assert name in refused.value.message or repr(value) in refused.value.message
    assert "nowhere" not in refused.value.message and refused.value.remedy


def test_unknown_option_of_an_injection() -> None:
    """Not only when the strengths are fitted."""
    with pytest.raises(TypeError, match="ovrwrite"):
        yeam.inject("nowhere", "nowhere", distill="nowhere.txt", ovrwrite=True)


@pytest.mark.parametrize("function", NOWHERE)
def test_every_argument_is_checked(function: str) -> None:
    elsewhere = {"config", "stream", "options"}
    assert inspect.signature(getattr(yeam, function)).parameters.keys() <= _CHECKS.keys() | elsewhere
