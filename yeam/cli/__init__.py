"""The command line: parse, call the API, print. Nothing else in the package knows a terminal."""

from __future__ import annotations

MANY = 1_000_000  # new objects before garbage is looked for, where no model runs


def main() -> None:
    """Entry point of the `yeam` script."""
    import gc

    try:
        from yeam.cli.app import app

        # imports and plans make objects by the hundred thousand, and none that goes before the process does
        gc.set_threshold(MANY)
        app()
    except KeyboardInterrupt:  # before a command could take it
        raise SystemExit(130) from None
    finally:
        gc.freeze()  # at its end the interpreter would look through all objects for garbage, for half a second
