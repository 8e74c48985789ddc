"""The command line: parse, call the API, print. Nothing else in the package knows a terminal."""

from __future__ import annotations

import codecs
import os
import sys

MANY = 1_000_000  # new objects before garbage is looked for, where no model runs


def main() -> None:
    """Entry point of the `yeam` script."""
    import gc

    _standard_streams()
    if "" in sys.argv[1:]:  # which would name the current folder
        print(
            f"error: argument {sys.argv.index('', 1)} is empty\n  is a variable of the shell not set?", file=sys.stderr
        )
        raise SystemExit(2)
    try:
        from yeam import alone
        from yeam.cli.app import app
        from yeam.engine.memory import share_one_heap

        alone.declare()
        share_one_heap()
        # imports and plans make objects by the hundred thousand, and none that goes before the process does
        gc.set_threshold(MANY)
        app()
    except KeyboardInterrupt:  # before a command could take it
        raise SystemExit(130) from None
    finally:
        gc.freeze()  # at its end the interpreter would look through all objects for garbage, for half a second


def _standard_streams() -> None:
    """Make stdin, stdout and stderr usable: open where the caller closed them, and no character too much for them.

    A file that is opened later would get the number of a closed one, and with it whatever is printed there.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
        elif (
            number == 1
            and hasattr(stream, "reconfigure")
            and (stream.errors == "strict" or codecs.lookup(stream.encoding).name != "utf-8")
        ):
            stream.reconfigure(errors="replace")  # an odd locale shall cost some marks in a table, not the table
