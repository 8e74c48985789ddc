"""What all commands share: the options, one message for an error, and the exit status."""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import threading
import traceback
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn, Protocol

import typer

from yeam.engine.ranks_store import rank_here
from yeam.errors import YeamError, redacted

USUAL = gc.get_threshold()
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no messages, errors excepted.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Model = Annotated[str, typer.Argument(help="A folder, a file or a Hub id, with +lora or @revision if need be.")]
Config = Annotated[Path, typer.Argument(help="The recipe, a YAML file.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Memory = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Bound on anonymous memory; a quarter of RAM, at most 4GiB, by default."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is a model folder.")]
Resume = Annotated[bool, typer.Option(help="Continue an interrupted run, or start over.")]
Context = Annotated[
    int | None,
    typer.Option(metavar="N", help="Tokens in a window; 2048 by default, or the model's positions if fewer."),
]
Batch = Annotated[int | None, typer.Option(metavar="N", help="Windows at a time; chosen by the device.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that the model's folder brings.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe: `parameters.lambda=0.8`. May be repeated."),
]
ShardSize = Annotated[str | None, typer.Option(metavar="SIZE", help="Largest size of an output file, such as 5GB.")]
Like = Annotated[str | None, typer.Option(metavar="TOOL", help="`mergekit`: round as mergekit does (`math: exact`).")]
AllowNan = Annotated[bool, typer.Option("--allow-nan", help="Merge inputs that hold NaN or Inf all the same.")]
Private = Annotated[
    bool, typer.Option("--private", help="Make the repository private; one that is there and public is refused.")
]
Revision = Annotated[
    str | None, typer.Option(metavar="BRANCH", help="The branch to push to, made if need be; main by default.")
]
KeepDownloads = Annotated[
    bool, typer.Option(help="Leave in the Hub's cache what was downloaded, or remove it when it has been used.")
]
Durable = Annotated[
    bool,
    typer.Option(help="Let OUT appear when all of it is on the disk, so that a power loss cannot leave half of it."),
]
CacheBudget = Annotated[
    str | None, typer.Option(metavar="SIZE", help="No more than this of Hub models is on disk at a time, such as 20GB.")
]


class Result(Protocol):
    """What a command has found or made."""

    @property
    def notes(self) -> Sequence[str]: ...

    def to_dict(self) -> dict[str, Any]: ...


_REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.EIO, errno.ESTALE)
_INTERRUPTION = ("interrupted", "run the same command again to continue", 130)


@contextmanager
def handled(debug: bool, as_json: bool = False, *, runs_models: bool = False) -> Iterator[None]:
    """Turn exceptions into one message on stderr and an exit status: 2 for what the user can fix, 1 for what broke.

    The status is the same with `debug`, which prints the traceback before the message. Of several processes that share a merge, one
    prints what happened. runs_models: garbage is looked for as often as usual, since a model's own may hold much memory.
    """
    if runs_models:
        gc.set_threshold(*USUAL)
    rank = rank_here()
    try:
        with _noticed() as interrupts:
            yield
    except (typer.Exit, typer.Abort, BrokenPipeError):  # typer itself leaves quietly when nobody reads any more
        raise
    except KeyboardInterrupt:
        message, remedy, status = _INTERRUPTION
    except YeamError as error:
        if error.told and not debug:
            raise typer.Exit(error.exit_status) from None
        message, remedy, status = error.message, error.remedy, error.exit_status
        if debug:
            typer.echo(redacted(traceback.format_exc()), err=True, nl=False)
    except Exception as error:
        message, remedy, status = _unforeseen(error)
        if interrupts:
            message, remedy, status = _INTERRUPTION
        if debug:
            typer.echo(redacted(traceback.format_exc()), err=True, nl=False)
    else:
        return
    if rank > 0:
        if status == 130:
            raise typer.Exit(status)
        message = message if message.startswith("rank ") else f"rank {rank}: {message}"
    fail(message, remedy, status, as_json and rank == 0)


def _unforeseen(error: Exception) -> tuple[str, str, int]:
    """Message, remedy and status: a defect, unless the system refuses a file that it names, or has no room left."""
    if isinstance(error, OSError) and error.strerror is not None:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = os.fsdecode(error.filename) if error.filename else "printing the result"
            return f"{where}: {error.strerror}", "free some space", 2
        if error.filename is not None and error.errno in _REFUSALS:
            return f"{os.fsdecode(error.filename)}: {error.strerror}", "check the path and its permissions", 2
    return redacted(f"{type(error).__name__}: {error}"), "report it, with the traceback that --debug shows", 1


class Interrupted(KeyboardInterrupt):
    """An interrupt of which one can tell whether it is still on its way."""


@contextmanager
def _noticed() -> Iterator[list[int]]:
    """The interrupts so far: some packages turn one in the middle of their import into an error of another kind.

    One that is swallowed (a bare `except:`, a finaliser) comes again as soon as it is gone.
    """
    interrupts: list[int] = []
    waiting: list[weakref.ref[Interrupted]] = []  # a reference that is itself gone calls nothing

    def signalled() -> None:
        if waiting:
            signal.pthread_kill(main, signal.SIGINT)

    def again(gone: object) -> None:
        if waiting:  # from elsewhere: what a callback of a reference raises, nobody gets
            timer = threading.Timer(0.01, signalled)
            timer.daemon = True
            timer.start()

    def handler(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        interrupt = Interrupted()
        waiting[:] = [weakref.ref(interrupt, again)]
        try:
            raise interrupt
        finally:
            del interrupt  # or its own traceback would keep it

    main = threading.main_thread().ident or 0
    ours = threading.get_ident() == main
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield interrupts
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield interrupts
    finally:
        waiting.clear()
        signal.signal(signal.SIGINT, signal.default_int_handler)


def fail(message: str, remedy: str, status: int, as_json: bool) -> NoReturn:
    """Print an error and leave with the status."""
    typer.echo(f"error: {message}", err=True)
    if remedy:
        typer.echo(f"  {remedy}", err=True)
    if as_json:
        try:
            print_json({"error": message, "remedy": remedy, "status": status})
        except BrokenPipeError:
            raise
        except OSError:  # it was stdout that took nothing
            pass
    raise typer.Exit(status)


def print_json(data: Any) -> None:
    """One JSON object on stdout."""
    typer.echo(json.dumps(data, default=str))


def print_notes(notes: Sequence[str]) -> None:
    """What a user should know besides the result, on stderr."""
    for note in notes:
        typer.echo(f"note: {note}", err=True)


def text_wanted(result: Result, as_json: bool, quiet: bool) -> bool:
    """Begin to tell a result, with its JSON or its notes; whether a text for people is still to follow."""
    if as_json:
        print_json(result.to_dict())
    elif not quiet:
        print_notes(result.notes)
    return not as_json and not quiet
