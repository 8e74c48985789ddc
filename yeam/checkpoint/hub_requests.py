"""Requests to the Hub that are tried again while that may help, and reads of byte ranges that go on where they broke off."""

from __future__ import annotations

import contextlib
import importlib
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from yeam.checkpoint.hub_errors import is_temporary, retry_after

T = TypeVar("T")

ATTEMPTS = 5
LONGEST_WAIT = 60.0  # seconds
CHUNK = 1 << 16


class NoRanges(Exception):
    """The server sends whole files only."""


def retried(action: Callable[[], T], attempts: int = ATTEMPTS) -> T:
    """The result of `action`, tried again after broken connections, 429 and 5xx, each wait twice as long.

    Where the server says how long to wait (`Retry-After`) that is waited, at most a minute.
    """
    for attempt in range(1, attempts):
        try:
            return action()
        except Exception as error:
            if not is_temporary(error):
                raise
            wait_after(attempt, error)
    return action()


def wait_after(attempt: int, error: BaseException) -> None:
    """Sleep after the attempt of this number, counted from 1, has failed: 0.5, 1, 2, 4 seconds and a random bit more."""
    told = retry_after(error)
    time.sleep(min(LONGEST_WAIT, told if told is not None else 2.0 ** (attempt - 2) * (1 + random.random() / 4)))


def read_range(
    url: str,
    begin: int,
    end: int,
    sink: Callable[[bytes], object],
    *,
    known_length: int | None = None,
    skip: bool = False,
) -> int:
    """Give bytes [begin, end) of the file at `url` to `sink`, in order, fewer where it is shorter; returns its length.

    A connection that breaks is taken up again where it broke. A server that ignores ranges is read up to `end` where
    `skip` is set or `begin` is 0, else NoRanges is raised. Raises what huggingface_hub raises when trying again does not help.
    """
    at, length, failures = begin, known_length or end, 0
    while True:
        try:
            for chunk, length in _pieces(url, at, end, known_length, skip or begin == 0):  # noqa: B007 - the last one counts
                sink(chunk)
                at += len(chunk)
                failures = 0
            if at >= min(end, length):
                return length
            raise ConnectionError("the connection was closed before all bytes were sent")
        except Exception as error:
            failures += 1
            if not is_temporary(error) or failures == ATTEMPTS:
                raise
            wait_after(failures, error)


def _pieces(url: str, begin: int, end: int, known: int | None, skip: bool) -> Iterator[tuple[bytes, int]]:
    """Chunks of bytes [begin, end), each with the length of the whole file."""
    from huggingface_hub import constants

    utils: Any = importlib.import_module("huggingface_hub.utils")
    headers = utils.build_hf_headers(library_name="yeam")
    headers.update({"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"})
    session = utils.get_session()
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    if callable(getattr(session, "stream", None)):  # huggingface_hub from 1.0 on has httpx
        opened = session.stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True)
    else:
        opened = session.get(url, headers=headers, timeout=timeout, stream=True)
    with opened as response:
        if response.status_code >= 400:
            (getattr(response, "read", None) or (lambda: response.content))()
            utils.hf_raise_for_status(response)
        partial = response.status_code == 206 and response.headers.get("Content-Range", "").startswith(
            f"bytes {begin}-"
        )
        if not partial and not skip:
            raise NoRanges
        length = _length(response, partial) or known or end
        ignored, wanted = 0 if partial else begin, min(end, length) - begin
        if wanted <= 0:
            return
        # as it arrives: what waits for a chunk to fill would be lost with the connection
        chunks = response.iter_bytes() if hasattr(response, "iter_bytes") else response.iter_content(CHUNK)
        with contextlib.closing(chunks):
            for chunk in chunks:
                chunk, ignored = chunk[ignored:], max(0, ignored - len(chunk))
                yield chunk[:wanted], length
                wanted -= len(chunk)
                if wanted <= 0:
                    return


def _length(response: Any, partial: bool) -> int | None:
    headers = response.headers
    total = headers.get("Content-Range", "").rpartition("/")[2] if partial else headers.get("Content-Length", "")
    return int(total) if total.isascii() and total.isdigit() else None
