"""Where a push goes, made sure of before there is anything to push: token, rights, repository, branch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from yeam.checkpoint.hub import is_hub_id
from yeam.checkpoint.hub_errors import explain
from yeam.checkpoint.hub_requests import retried
from yeam.errors import UserError, YeamError, redacted

_TOKEN = (
    "set HF_TOKEN or run `hf auth login` with a token that may write; https://huggingface.co/settings/tokens makes one"
)


@dataclass(frozen=True)
class Target:
    """A repository on the Hub that may be written to; `revision` is a branch, or a pull request's `refs/pr/N`."""

    repo: str
    revision: str
    user: str
    private: bool

    @property
    def url(self) -> str:
        """The page of the repository, or of the branch."""
        from huggingface_hub import constants

        page = redacted(f"{constants.ENDPOINT}/{self.repo}")
        return page if self.revision == "main" else f"{page}/tree/{self.revision}"


def check_token(repo: str) -> str:
    """Whose the token is, where it may write; nothing changes on the Hub.

    Raises UserError with what to do: a name that is none, no or a wrong token, one that only reads, no network.
    """
    from huggingface_hub import HfApi, constants, get_token

    if not is_hub_id(repo):
        raise UserError(f"{repo!r} is no name on the Hub", "write owner/name")
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{repo}: nothing can be pushed while HF_HUB_OFFLINE is set", "unset it")
    if not get_token():
        raise UserError(f"{repo}: pushing needs a token, and there is none", _TOKEN)
    api = HfApi(library_name="yeam")
    with pushing(repo, "asking whose the token is"):
        who = retried(lambda: api.whoami())
    name = str(who.get("name", ""))
    if _role(who) == "read":
        raise UserError(f"{repo}: the token of {name} may only read", _TOKEN)
    return name


def make_target(repo: str, user: str, *, private: bool = False, revision: str | None = None) -> Target:
    """Make the repository (`private` or not) and the branch if need be, and make sure that a model can be pushed there.

    `user` is what `check_token` says. Nothing else changes on the Hub. Raises UserError with what to do: no right to the name, a
    public repository where a private one is asked for, no network.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(library_name="yeam")
    branch = revision or "main"
    with pushing(repo, "making the repository"):
        retried(lambda: api.create_repo(repo, private=private or None, exist_ok=True))
        is_private = bool(retried(lambda: api.model_info(repo)).private)
    if private and not is_private:
        raise UserError(
            f"{repo}: is there already, and it is public",
            "choose another name, or make it private on its settings page",
        )
    with pushing(repo, f"asking for the right to write to {branch}"):
        if branch != "main" and not branch.startswith("refs/"):
            retried(lambda: api.create_branch(repo, branch=branch, exist_ok=True))
        # asks how a file would have to be sent, which needs the right to send it, and sends nothing
        probe = CommitOperationAdd("config.json", b"{}")
        retried(lambda: api.preupload_lfs_files(repo, [probe], revision=branch))
    return Target(repo, branch, user, is_private)


@contextlib.contextmanager
def pushing(repo: str, what: str) -> Iterator[None]:
    """Turn a failure of the Hub into a UserError that says what to do."""
    try:
        yield
    except YeamError:
        raise
    except Exception as error:
        known = explain(error, repo, what, write=True)
        if known is None:
            raise
        raise UserError(known.message, known.remedy) from error


def _role(who: object) -> str | None:
    for key in ("auth", "accessToken", "role"):
        who = who.get(key) if isinstance(who, dict) else None
    return who if isinstance(who, str) else None
