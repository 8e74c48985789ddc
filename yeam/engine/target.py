"""Where the output may go: what must not be there, what must not be touched, and what the disk's errors mean."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from yeam.errors import OutputError, UserError, YeamError

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def partial_path(out: Path) -> Path:
    """Where the output is made until it is whole."""
    return out.with_name(out.name + ".partial")


def check_output_free(out: Path, overwrite: bool) -> None:
    """Raise OutputError if OUT may not be (over)written: it exists without --overwrite, or is no model folder."""
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        what = "is a symbolic link" if out.is_symlink() else "is not a folder"
        raise OutputError(f"{out} exists and {what}", "choose another output folder")
    if out.is_mount():
        raise OutputError(f"{out} is a mount point, which cannot be replaced", "choose a folder inside it")
    with explained(out):
        if any(out.iterdir()) and not _is_model(out):
            raise OutputError(
                f"{out} exists and is not a model folder; it is not overwritten", "choose another output folder"
            )
    if not overwrite:
        raise OutputError(f"{out} exists", "pass --overwrite to replace it, or choose another output folder")
    if not os.access(out, os.W_OK | os.X_OK):
        raise OutputError(f"{out} may not be replaced by you", "choose an output folder that you may write to")


def check_output_apart(out: Path, inputs: Iterable[Path]) -> None:
    """Raise OutputError if writing OUT (or OUT.partial) would touch an input model."""
    for folder in inputs:
        there = folder.resolve()
        for target in (out, partial_path(out)):
            here = target.resolve()
            if here == there or here in there.parents:
                raise OutputError(f"writing {target} would replace the input {folder}", "choose another output folder")


def _is_model(folder: Path) -> bool:
    """Whether a folder holds weights, or a config.json as a model's is (many other things have a config.json)."""
    if any(path.suffix in _WEIGHTS and path.is_file() for path in folder.iterdir()):
        return True
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and bool({"model_type", "architectures"} & config.keys())


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an operating system error about the output into one message with its remedy."""
    try:
        yield
    except OSError as error:
        raise _explanation(error, path) from error


def _explanation(error: OSError, path: Path) -> YeamError:
    reason = error.strerror or str(error)
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return OutputError(
                f"the disk is full while writing {path}", "free some space and run again: the merge continues"
            )
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return OutputError(f"{path} cannot be written: {reason}", "choose an output folder that you may write to")
        case errno.ENOTDIR | errno.EEXIST | errno.ENOENT | errno.ENAMETOOLONG | errno.ELOOP | errno.EISDIR:
            return OutputError(f"{path} cannot be created: {reason}", "choose another output folder")
        case errno.EFBIG:
            return OutputError(f"{path} takes no file of this size: {reason}", "pass a smaller --shard-size")
        case errno.EMFILE | errno.ENFILE:
            return UserError(
                f"writing {path}: {reason}", "pass a larger --shard-size, or allow more open files with `ulimit -n`"
            )
        case errno.ENOLCK | errno.ENOSYS | errno.EOPNOTSUPP:
            return OutputError(
                f"{path}: its file system cannot lock or reserve files: {reason}", "choose a folder on another disk"
            )
    return YeamError(f"writing {path} failed: {reason}", "check the disk and run again: the merge continues")
