"""The command line: parse, call the API, print. Nothing else in the package knows a terminal."""

from __future__ import annotations


def main() -> None:
    """Entry point of the `yeam` script."""
    try:
        from yeam.cli.app import app

        app()
    except KeyboardInterrupt:  # before a command could take it
        raise SystemExit(130) from None
