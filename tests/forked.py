"""The command line in processes that have everything imported already: they start in a moment, and may be killed."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import yeam

TESTS = Path(__file__).parent
PACKAGE = Path(yeam.__file__).parents[
    1
]  # where child processes find what is tested: the checkout, or what pip installed
PRELOAD = ("warm", "forked")

Prepare = Callable[[], None]


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    return context


@contextmanager
def _environment() -> Iterator[None]:
    """Meanwhile, processes that start find the package and the tests, and torch logs only errors."""
    paths = [str(PACKAGE), str(TESTS), os.environ.get("PYTHONPATH", "")]
    changes = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def forked(
    words: Sequence[object],
    log: Path,
    prepare: Callable[..., None] | None = None,
    arguments: tuple[Any, ...] = (),
    errors: Path | None = None,
    **env: str,
) -> BaseProcess:
    """Start `yeam WORDS` in a process, with its output in `log`; `prepare(*arguments)`, of a module, runs in it before.

    errors: where standard error goes, if not into `log` as well. Temporary files are made beside the log: who is killed leaves them.
    """
    context = _context()
    words = [str(word) for word in words]
    files = str(log), str(errors or log)
    env = {"OMP_NUM_THREADS": "1", "TMPDIR": str(log.parent), **env}
    process = context.Process(target=_main, args=(words, files, prepare, arguments, env))
    with _environment():
        process.start()
    return process


@dataclass
class Running:
    """A process that `begun` started; its files are in `folder`."""

    process: BaseProcess
    folder: Path

    def ended(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Wait for the end: exit status, standard output and standard error."""
        self.process.join(timeout)
        stdout, stderr = ((self.folder / name).read_text() for name in ("stdout", "stderr"))
        assert self.process.exitcode is not None, (stdout, stderr)
        return subprocess.CompletedProcess((), self.process.exitcode, stdout, stderr)


def begun(words: Sequence[object], here: Path, folder: Path, **env: str) -> Running:
    """Start `yeam WORDS` in the folder `here`, which is also where modules are looked for; its output goes to files in `folder`."""
    out, errors = folder / "stdout", folder / "stderr"
    return Running(forked(words, out, _enter, (str(here),), errors, **env), folder)


def _enter(here: str) -> None:
    os.chdir(here)
    sys.path.insert(0, here)


def called(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), of a module, in a process that has computed nothing yet and may fork; returns what it returns."""
    context = _context()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(theirs, function, arguments))
    with _environment():
        process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise AssertionError(f"{function.__name__} failed in its process, which has printed why") from None
    finally:
        process.join()


def _call(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    pipe.send(function(*arguments))


def _main(
    words: list[str],
    files: tuple[str, str],
    prepare: Callable[..., None] | None,
    arguments: tuple[Any, ...],
    env: Mapping[str, str],
) -> None:
    os.environ.update(env)
    tempfile.tempdir = None  # what was imported before may have asked for it
    for stream, file in enumerate(files, 1):
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.ftruncate(fd, 0)
        os.dup2(fd, stream)
    if prepare is not None:
        prepare(*arguments)
    from yeam.cli.app import app

    sys.argv = ["yeam", *words]
    app(words)


def together(words: Sequence[object], count: int, log: Path, **options: Any) -> list[BaseProcess]:
    """`count` ranks of one merge, as torchrun would start them on this machine; logs in log-0, log-1, …"""
    port = free_port()
    return [
        forked(
            words, log.with_name(f"{log.name}-{rank}"), RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **options,
        )
        for rank in range(count)
    ]  # fmt: skip


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
