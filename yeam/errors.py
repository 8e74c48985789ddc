"""Errors that a user meets: one message each, naming the file, tensor or model and what to do about it."""

from __future__ import annotations

import re

_SECRETS = (
    (re.compile(r"(?<=://)[^\s/@'\"]+@"), ""),  # user and password of a URL
    (re.compile(r"(https?://[^\s'\"?]+)\?[^\s'\"]+"), r"\1?…"),  # the signature of one
    (re.compile(r"\bhf_\w{8,}"), "hf_…"),
)


class YeamError(Exception):
    """Something broke. The command line prints the message without a traceback and exits with status 1.

    `message` says what is wrong and where; `remedy` says what the user can do, in the imperative.
    """

    exit_status = 1
    told = False  # whether another process of the same merge prints it

    def __init__(self, message: str, remedy: str = "") -> None:
        self.message = redacted(message)
        self.remedy = redacted(remedy)
        super().__init__(f"{self.message}\n  remedy: {self.remedy}" if remedy else self.message)


class UserError(YeamError):
    """Something that the user can fix: a wrong config, a broken input, a full disk. Exit status 2."""

    exit_status = 2


class ConfigError(UserError):
    """A recipe that cannot be meant as written; the message carries `file:line`."""


class CheckpointError(UserError):
    """An input model that is missing, truncated, malformed or does not fit the others."""


class OutputError(UserError):
    """The output folder exists, cannot be written, or the disk is full."""


def redacted(text: str) -> str:
    """The text without what opens a door: passwords and signatures in URLs, tokens of the Hub."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text


def suggest(name: str, known: object) -> str:
    """` (did you mean 'x'?)` for the nearest of the known names, or the empty string."""
    import difflib

    close = difflib.get_close_matches(name, [str(k) for k in known], n=1, cutoff=0.6)  # type: ignore[attr-defined]
    return f" (did you mean {close[0]!r}?)" if close else ""
