"""The arguments of the Python API, checked by name before any work begins."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

from yeam.engine import device
from yeam.errors import ConfigError, UserError
from yeam.recipe.sizes import parse_size

P = ParamSpec("P")
R = TypeVar("R")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """A function of the API that refuses arguments as `check_arguments` does before it begins."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        check_arguments(function, *args, **kwargs)
        return function(*args, **kwargs)

    return call


def check_arguments(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Raise UserError for an argument of a wrong kind, TypeError for one that the function does not have."""
    signature = inspect.signature(function)
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        if name in _CHECKS and value is not signature.parameters[name].default:
            _CHECKS[name](name, value)


def check_dtype(name: str) -> None:
    """Raise UserError for what is no floating-point dtype of torch."""
    if name.removeprefix("torch.") not in ("auto", "float32", "bfloat16", "float16", "float64"):
        raise UserError(f"unknown dtype {name!r}", "use auto, float32, bfloat16 or float16")


def _kind(fits: Callable[[Any], bool], wanted: str) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if not fits(value):
            raise UserError(f"{name} is {value!r}", f"give {wanted}")

    return check


def _is_path(value: Any) -> bool:
    return isinstance(value, str | os.PathLike) and bool(os.fspath(value))


def _is_paths(value: Any) -> bool:
    return _is_path(value) or (isinstance(value, Sequence) and not isinstance(value, str) and all(map(_is_path, value)))


def _is_sources(value: Any) -> bool:
    listed = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return all(isinstance(source, Mapping) or _is_path(source) for source in listed)


def _size(name: str, value: Any) -> None:
    try:
        parse_size(value)
    except ConfigError as error:
        raise UserError(f"{name}: {error.message}", error.remedy) from None


def _device(name: str, value: Any) -> None:
    _text(name, value)
    device.choose_device(value)


def _dtype(name: str, value: Any) -> None:
    _text(name, value)
    check_dtype(value)


def _repository(name: str, value: Any) -> None:
    from yeam.checkpoint.hub import is_hub_id

    if not isinstance(value, str) or not is_hub_id(value):
        raise UserError(f"{value!r} is no name on the Hub", "write owner/name")


_text = _kind(lambda value: isinstance(value, str), "text")
_flag = _kind(lambda value: isinstance(value, bool), "True or False")
_whole = _kind(lambda value: isinstance(value, Integral) and not isinstance(value, bool), "a whole number")
_real = _kind(lambda value: isinstance(value, Real) and not isinstance(value, bool), "a number")
_path = _kind(_is_path, "a path")
_paths = _kind(_is_paths, "a path, or a list of paths")
_texts = _kind(
    lambda value: isinstance(value, Sequence) and all(isinstance(item, str) for item in value), "a list of text"
)
_sources = _kind(_is_sources, "a reference, or a list of references or of mappings `{model, base}`")
_listener = _kind(callable, "a function")

_CHECKS: dict[str, Callable[[str, Any], None]] = {
    **dict.fromkeys(("out", "folder", "storage", "plot"), _path),
    **dict.fromkeys(("model", "a", "b", "base", "target", "host", "source", "judge"), _path),
    **dict.fromkeys(("text", "against", "guard", "donor_text", "distill"), _paths),
    **dict.fromkeys(("memory", "shard_size", "cache_budget"), _size),
    **dict.fromkeys(("overwrite", "resume", "allow_nan", "keep_downloads", "private", "durable", "distributed"), _flag),
    **dict.fromkeys(("wikitext2", "trust_remote_code", "update_card", "spectrum", "load"), _flag),
    **dict.fromkeys(("trials", "seed", "stride", "context", "batch"), _whole),
    **dict.fromkeys(("guard_limit", "timeout"), _real),
    **dict.fromkeys(("like", "revision", "message", "sampler"), _text),
    **dict.fromkeys(("progress", "distill_progress"), _listener),
    **dict.fromkeys(("repo", "push_to_hub"), _repository),
    "sources": _sources,
    "overrides": _texts,
    "device": _device,
    "dtype": _dtype,
}
"""What arguments have to be, by name; what is not here (the recipe, options of plugins) is checked where it is read."""
