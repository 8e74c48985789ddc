"""What went wrong with the Hub, in words that a user can act on; a token or a signed URL is never repeated."""

from __future__ import annotations

import errno
import json

from yeam.errors import CheckpointError

_CLIENTS = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}


def is_network_error(error: BaseException) -> bool:
    """Whether the server could not be reached at all: no route, no name, a timeout, a broken connection."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled) or getattr(error, "response", None) is not None:
        return False
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    return any(kind.__module__.partition(".")[0] in _CLIENTS for kind in type(error).__mro__)


def is_temporary(error: BaseException) -> bool:
    """Whether trying again may help: the network, a server's own error, or too many requests."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    # what a download says of any failure
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        return is_temporary(error.__cause__)
    status = getattr(getattr(error, "response", None), "status_code", None)
    return is_network_error(error) or (status is not None and (status in (408, 429) or 500 <= status < 600))


def retry_after(error: BaseException) -> float | None:
    """Seconds that the server asks to wait (`Retry-After`), None where it does not say, or says it as a date."""
    said = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    return float(said) if said.isascii() and said.isdigit() else None


def explain(error: BaseException, repo: str, what: str, *, write: bool = False) -> CheckpointError | None:
    """The CheckpointError for a failure of `what` ("listing its files"); None if it is no failure of the Hub.

    write: what was asked for needs more than reading.
    """
    from huggingface_hub import errors

    # a download that the server did answer, and an upload
    hidden = isinstance(error, errors.LocalEntryNotFoundError) or type(error) is RuntimeError
    if (
        hidden
        and error.__cause__ is not None
        and (is_network_error(error.__cause__) or hasattr(error.__cause__, "response"))
    ):
        error = error.__cause__
    right = "write to" if write else "read"
    token = f"set HF_TOKEN or run `hf auth login` with an account that may {right} it"
    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(
            f"{repo}: is gated on the Hub", f"accept its conditions on its Hub page while logged in, then {token}"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointError(
            f"{repo}: the Hub has no such model, or it is private", f"check the name; if the model is private, {token}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointError(
            f"{repo}: the Hub has no such revision", "check what follows the `@`: a branch, tag or commit"
        )
    if isinstance(error, errors.HFValidationError):
        return CheckpointError(f"{repo}: is not a valid Hub name", "write owner/name, or check the folder's path")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return offline(repo, what)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return CheckpointError(
            f"{repo}: the Hub does not accept the token ({what}, HTTP 401)",
            f"the token is wrong or has expired: {token}, or unset HF_TOKEN for a public model" if not write else token,
        )
    if status == 403:
        return CheckpointError(
            f"{repo}: the Hub refused {what} (HTTP 403)", f"{token}; a fine-grained token must name it"
        )
    if status == 429:
        return CheckpointError(
            f"{repo}: {what} failed: too many requests (HTTP 429)",
            "wait a few minutes and run again: what is there is kept",
        )
    if isinstance(error, errors.EntryNotFoundError) and status is not None:
        return CheckpointError(f"{repo}: {what} failed: the Hub has no such file", "check the repository's files")
    if status is not None:
        return CheckpointError(
            f"{repo}: {what} failed: HTTP {status} from the Hub", "run again later: what is there is kept"
        )
    if is_network_error(error) or isinstance(error, errors.LocalEntryNotFoundError):
        return CheckpointError(
            f"{repo}: {what} failed: the Hub cannot be reached ({type(error).__name__})",
            "check the network, HF_ENDPOINT and the proxy; a model in the cache can be used with HF_HUB_OFFLINE=1",
        )
    if isinstance(error, UnicodeEncodeError):  # of a header: what is in it is not repeated
        return CheckpointError(f"{repo}: {what} failed: HF_TOKEN holds characters that no token has", token)
    if isinstance(error, json.JSONDecodeError):
        return CheckpointError(f"{repo}: {what} failed: the answer is not JSON", "check HF_ENDPOINT and the proxy")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        return CheckpointError(
            f"{repo}: {what} failed: {error.strerror}",
            "make room, or point HF_HOME to a folder with room and permission",
        )
    if isinstance(error, OSError):
        return CheckpointError(
            f"{repo}: {what} failed: {type(error).__name__}", "try again; the file may be incomplete"
        )
    # hf_xet, which downloads large files, raises plain RuntimeErrors.
    if isinstance(error, RuntimeError) or type(error).__module__.startswith("huggingface_hub"):
        return CheckpointError(f"{repo}: {what} failed: {type(error).__name__}", "try again")
    return None


def offline(repo: str, what: str) -> CheckpointError:
    """The error for something that is not in the cache while HF_HUB_OFFLINE is set."""
    return CheckpointError(
        f"{repo}: {what} is not possible offline: it is not in the Hub cache",
        "unset HF_HUB_OFFLINE, or download it before",
    )
