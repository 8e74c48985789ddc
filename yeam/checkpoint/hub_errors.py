"""What went wrong with the Hub, in words that a user can act on; a token or a signed URL is never repeated."""

from __future__ import annotations

import errno

from yeam.errors import CheckpointError

_CLIENTS = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}


def is_network_error(error: BaseException) -> bool:
    """Whether the server could not be reached at all: no route, no name, a timeout, a broken connection."""
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    if getattr(error, "response", None) is not None:
        return False
    return any(kind.__module__.partition(".")[0] in _CLIENTS for kind in type(error).__mro__)


def is_temporary(error: BaseException) -> bool:
    """Whether trying again may help: the network, a server's own error, or too many requests."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return is_network_error(error) or status in (429, 500, 502, 503, 504)


def explain(error: BaseException, repo: str, what: str) -> CheckpointError | None:
    """The CheckpointError for a failure of `what` ("listing its files"); None if it is no failure of the Hub."""
    from huggingface_hub import errors

    token = "set HF_TOKEN or run `hf auth login` with an account that may read it"
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
    if status in (401, 403):
        return CheckpointError(f"{repo}: the Hub refused {what} (HTTP {status})", token)
    if isinstance(error, errors.EntryNotFoundError) and status is not None:
        return CheckpointError(f"{repo}: {what} failed: the Hub has no such file", "check the repository's files")
    if status is not None:
        return CheckpointError(f"{repo}: {what} failed: HTTP {status} from the Hub", "try again later")
    if is_network_error(error) or isinstance(error, errors.LocalEntryNotFoundError):
        return CheckpointError(
            f"{repo}: {what} failed: the Hub cannot be reached ({type(error).__name__})",
            "check the network, HF_ENDPOINT and the proxy; a model in the cache can be used with HF_HUB_OFFLINE=1",
        )
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
