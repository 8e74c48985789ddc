"""The command line: parse, call the API, print. Nothing else in the package knows a terminal."""

from __future__ import annotations


def main() -> None:
    """Entry point of the `yeam` script."""
    from yeam.cli.app import app

    app()
