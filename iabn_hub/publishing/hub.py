"""Sending a folder to the Hugging Face Hub: what differs, one commit, and what went wrong in a sentence."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from ..checkpoints.errors import CheckpointError
from ..checkpoints.verify import sha256_of

T = TypeVar("T")
ATTEMPTS = 5
PAUSE = 2.0  # seconds before the second attempt; doubled for each that follows
LONGEST_PAUSE = 120.0  # seconds that a server may ask us to wait
PASSING = {408, 425, 429, 500, 502, 503, 504}  # answers that another attempt may change


class PublishError(CheckpointError):
    """The Hub refused, or could not be reached; the message says what to do."""


def differences(repo: str, files: Mapping[str, Path], revision: str | None = None) -> dict[str, str]:
    """What sending would do to each file: 'new', 'changed' or 'same'.

    Raises:
        PublishError: the Hub cannot be asked.
    """

    def ask() -> dict[str, RepoFile]:
        try:
            tree = HfApi().list_repo_tree(repo, revision=revision)
            return {each.path: each for each in tree if isinstance(each, RepoFile)}
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return {}

    there = _patiently(repo, ask)
    return {name: _compare(path, there.get(name)) for name, path in files.items()}


def _compare(path: Path, remote: RepoFile | None) -> str:
    if remote is None:
        return "new"
    if remote.lfs is not None:
        return "same" if remote.lfs.sha256 == sha256_of(path) else "changed"
    content = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # as git names it
    return "same" if remote.blob_id == blob else "changed"


def push(
    repo: str,
    files: Mapping[str, Path],
    message: str,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
) -> tuple[str, dict[str, str]]:
    """Make the repository if it is not there, and send what differs in one commit.

    Large files that an earlier, broken attempt has sent are not sent again.

    Returns:
        The commit that holds the files, and what was done to each: 'new', 'changed' or 'same'.

    Raises:
        PublishError: not allowed, not reachable, or changed by someone else at the same time.
    """
    api = HfApi()
    _patiently(repo, lambda: api.create_repo(repo, private=private, exist_ok=True))
    if revision and not create_pr:
        _patiently(repo, lambda: api.create_branch(repo, branch=revision, exist_ok=True))
    done = differences(repo, files, revision)
    if set(done.values()) == {"same"}:
        info = _patiently(repo, lambda: api.repo_info(repo, revision=revision))
        return str(info.sha), done

    def send() -> str:
        operations = [CommitOperationAdd(name, str(files[name])) for name in files if done[name] != "same"]
        commit = api.create_commit(repo, operations, commit_message=message, revision=revision, create_pr=create_pr)
        return commit.oid

    return _patiently(repo, send), done


def _patiently(repo: str, call: Callable[[], T]) -> T:
    """The call's answer; passing trouble is waited out.

    Raises:
        PublishError: it does not pass.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except Exception as e:  # the client's HTTP library is its own affair, and so are its errors
            response = getattr(e, "response", None) if isinstance(e, HfHubHTTPError) else None
            status = getattr(response, "status_code", None)
            if isinstance(e, (ValueError, TypeError, FileNotFoundError)) and status is None:
                raise PublishError(f"{repo}: {_first_line(e)}") from e
            passing = status in PASSING or status is None
            if not passing or attempt == ATTEMPTS:
                raise PublishError(f"{repo}: {_explain(status, e)}") from e
            time.sleep(_pause(response, attempt))
    raise AssertionError("unreachable")


def _pause(response: Any, attempt: int) -> float:
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    return min(float(asked), LONGEST_PAUSE) if asked.isdigit() else PAUSE * 2 ** (attempt - 1)


def _explain(status: int | None, error: Exception) -> str:
    said = _first_line(error)
    if status in (401, 403):
        return f"the Hub does not allow it ({said}): log in by 'hf auth login' with a token that may write there"
    if status == 404:
        return f"there is no such repository or revision, or you may not see it ({said})"
    if status in (409, 412):
        return f"someone else has changed it at the same time ({said}): run the same command again"
    if status == 429:
        return f"the Hub has had too many requests ({said}): run the same command later, it goes on where it stopped"
    what = f"status {status}" if status else "no answer"
    return f"{what} after {ATTEMPTS} attempts ({said}): run the same command again, it goes on where it stopped"


def _first_line(error: Exception) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    token = huggingface_hub.get_token()
    return text.replace(token, "…") if token else text
