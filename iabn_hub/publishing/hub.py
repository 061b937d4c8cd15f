"""Upload files to the Hugging Face Hub: only what differs, in one commit, with errors that name the way out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from ..checkpoints.errors import CheckpointError
from ..checkpoints.retries import ATTEMPTS, TEMPORARY_STATUS, with_retries
from ..files import sha256_of

T = TypeVar("T")


class PublishError(CheckpointError):
    """The Hub refused, or could not be reached; the message says what to do."""


def differences(repo: str, files: Mapping[str, Path], revision: str | None = None) -> dict[str, str]:
    """What sending would do to each file: 'new', 'changed' or 'same'.

    Raises:
        PublishError: the Hub cannot be asked.
    """

    def ask() -> dict[str, RepoFile]:
        try:
            tree = HfApi().list_repo_tree(repo, recursive=True, revision=revision)
            return {each.path: each for each in tree if isinstance(each, RepoFile)}
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return {}

    there = _request(repo, ask)
    return {name: _compare(path, there.get(name)) for name, path in files.items()}


def _compare(path: Path, remote: RepoFile | None) -> str:
    if remote is None:
        return "new"
    if remote.lfs is not None:
        return "same" if remote.lfs.sha256 == sha256_of(path) else "changed"
    content = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # as git names it
    return "same" if remote.blob_id == blob else "changed"


@dataclass(frozen=True)
class Target:
    """Where files are uploaded to.

    Args:
        repo: ORG/NAME.
        private: a repository that is created is private.
        revision: branch, created if missing; None is the main branch.
        create_pr: upload as a pull request.
    """

    repo: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False


def push(target: Target, files: Mapping[str, Path], message: str) -> tuple[str, dict[str, str]]:
    """Create the repository if it does not exist, and upload what differs in one commit.

    Large files that an interrupted attempt has uploaded are not uploaded again.

    Returns:
        The commit that holds the files, and what was done to each: 'new', 'changed' or 'same'.

    Raises:
        PublishError: not allowed, not reachable, or changed by someone else at the same time.
    """
    api = HfApi()
    repo, revision = target.repo, target.revision
    _request(repo, lambda: api.create_repo(repo, private=target.private, exist_ok=True))
    if revision and not target.create_pr:
        _request(repo, lambda: api.create_branch(repo, branch=revision, exist_ok=True))
    done = differences(repo, files, revision)
    if set(done.values()) == {"same"}:
        info = _request(repo, lambda: api.repo_info(repo, revision=revision))
        return str(info.sha), done

    def send() -> str:
        operations = [CommitOperationAdd(name, str(files[name])) for name in files if done[name] != "same"]
        commit = api.create_commit(
            repo, operations, commit_message=message, revision=revision, create_pr=target.create_pr
        )
        return commit.oid

    return _request(repo, send), done


def _request(repo: str, call: Callable[[], T]) -> T:
    """The answer of the Hub, with retries.

    Raises:
        PublishError: temporary failures did not pass, or the request is refused.
    """
    try:
        return with_retries(call, _is_temporary, _retry_after)
    except Exception as e:  # the client raises errors of its HTTP library
        if isinstance(e, ValueError | TypeError | FileNotFoundError) and _status(e) is None:
            raise PublishError(f"{repo}: {_first_line(e)}") from e
        raise PublishError(f"{repo}: {_explain(_status(e), e)}") from e


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None) if isinstance(error, HfHubHTTPError) else None
    return getattr(response, "status_code", None)


def _is_temporary(error: BaseException) -> bool:
    status = _status(error)
    if status is None:
        return isinstance(error, Exception) and not isinstance(error, ValueError | TypeError | FileNotFoundError)
    return status in TEMPORARY_STATUS


def _retry_after(error: BaseException) -> float | None:
    response = getattr(error, "response", None)
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    return float(asked) if asked.isascii() and asked.isdigit() else None


def _explain(status: int | None, error: BaseException) -> str:
    said = _first_line(error)
    if status in (401, 403):
        return f"the Hub does not allow it ({said}): log in by 'hf auth login' with a token that may write there"
    if status == 404:
        return f"there is no such repository or revision, or you may not see it ({said})"
    if status in (409, 412):
        return f"someone else has changed it at the same time ({said}): run the same command again"
    if status == 429:
        return f"the Hub has had too many requests ({said}): run the same command later, it continues where it stopped"
    what = f"status {status}" if status else "no answer"
    return f"{what} after {ATTEMPTS} attempts ({said}): run the same command again, it continues where it stopped"


def _first_line(error: BaseException) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    token = huggingface_hub.get_token()
    return text.replace(token, "…") if token else text
