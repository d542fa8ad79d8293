"""A repository on the Hub, over its HTTP API: whether it can be written, and making it equal to a directory."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tfclm.errors import InputError
from tfclm.hub.connection import (
    PushFailed,
    Unreachable,
    explain_push_error,
    limit_requests,
    retry,
    scrubbed,
    silence_client,
    stored_token,
)

__all__ = ["Repository", "Unreachable", "list_files", "preflight", "scrubbed"]

OWN_FILES = (".gitattributes",)  # the Hub adds these to a repository


class Repository:
    """A model repository on the Hub, of which one branch or pull request is written.

    Args:
        repo_id: its full name, owner/name.
        private: whether it is created as a private repository.
        branch: the branch to write; main if None.
        create_pr: write a pull request against main instead.
        token: the token to write with; that of the environment or of `hf auth login` if None.
        user: the token's owner.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        private: bool = False,
        branch: str | None = None,
        create_pr: bool = False,
        token: str | None = None,
        user: str | None = None,
    ) -> None:
        from huggingface_hub import HfApi

        self.repo_id, self.private, self.branch, self.create_pr = repo_id, private, branch, create_pr
        self.token, self.user = token, user
        self._api = HfApi(token=token, library_name="tfclm")
        self._request: str | None = None  # branch of the pull request, once it is open
        self.blocked_until = 0.0  # on the monotonic clock: the Hub has asked for no requests before

    @property
    def url(self) -> str:
        """Its address in a browser."""
        return f"{self._api.endpoint}/{self.repo_id}"

    def create(self, patience: float = 0.0) -> bool:
        """Creates the repository and its branch if they do not exist; False if it must be private and is public.

        Args:
            patience: seconds for which a failed request is tried again.

        Raises:
            Unreachable: the Hub does not answer.
            Exception: what the client raises.
        """
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            existing = retry(lambda: self._api.repo_info(self.repo_id), patience)
        except RepositoryNotFoundError:
            retry(lambda: self._api.create_repo(self.repo_id, private=self.private, exist_ok=True), patience)
        else:
            if self.private and not existing.private:
                return False
        branch = self.branch
        if branch is not None:
            retry(lambda: self._api.create_branch(self.repo_id, branch=branch, exist_ok=True), patience)
        return True

    def request_upload(self, patience: float = 0.0) -> None:
        """Asks where to upload a file, and uploads none: the only request about writing that changes nothing.

        Args:
            patience: seconds for which a failed request is tried again.

        Raises:
            Unreachable: the Hub does not answer.
            Exception: what the client raises; status 403 if the token may not write.
        """
        from tfclm.compat import UploadInfo, post_lfs_batch_info

        def ask() -> None:
            sample = UploadInfo.from_bytes(os.urandom(32))
            post_lfs_batch_info(
                [sample], self.token, "model", self.repo_id, revision=self.branch, endpoint=self._api.endpoint
            )

        retry(ask, patience)

    def mirror(
        self, files: Mapping[str, Path], title: str, description: str = "", *, request_title: str = "Upload by tfclm"
    ) -> bool:
        """Makes the branch hold exactly these files, in one commit; False if it holds them already.

        Args:
            files: local files by their path in the repository.
            title: first line of the commit message.
            description: the rest of the message.
            request_title: title of the pull request, by which an open one is found.

        Raises:
            PushFailed: the Hub accepted the commit but holds other files.
            Exception: what the client raises; `requested_wait` says whether trying again may help.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        if self.create_pr and self._request is None:
            self._request = self._find_request(request_title)
        revision = self._request or self.branch or "main"
        # A .gitignore applies even to the commit that removes it: a second commit adds the files that it excluded.
        for attempt in range(3):
            head, changed, extra = self._differences(files, revision)
            if not changed and not extra:
                return attempt > 0
            if attempt == 2:
                raise PushFailed(f"{self.repo_id} does not keep {', '.join(sorted({*changed, *extra})[:5])}")
            operations: list[Any] = [CommitOperationAdd(name, str(files[name])) for name in sorted(changed)]
            operations += [CommitOperationDelete(name, is_folder=False) for name in sorted(extra)]
            opens = self.create_pr and self._request is None
            made = self._api.create_commit(
                self.repo_id,
                operations,
                commit_message=request_title if opens else title,
                commit_description=f"{title}\n\n{description}" if opens else description,
                revision=None if opens else revision,
                create_pr=opens,
                # If somebody else commits in between, this fails with status 412 and their commit is not lost.
                parent_commit=head,
            )
            if opens:
                revision = self._request = str(made.pr_revision)
        raise AssertionError("the loop returns or raises")

    def pushed_steps(self, run: str, request_title: str) -> int:
        """The optimizer steps of a run's newest state on the branch; 0 if there is none.

        The descriptions of the commits hold `run RUN, step STEPS`.
        """
        if self.create_pr and self._request is None:
            self._request = self._find_request(request_title)
            if self._request is None:
                return 0
        commits = self._api.list_repo_commits(self.repo_id, revision=self._request or self.branch or "main")
        found = (re.search(rf"\brun {re.escape(run)}, step (\d+)", each.message) for each in commits)
        return max((int(match[1]) for match in found if match), default=0)

    def _differences(self, files: Mapping[str, Path], revision: str) -> tuple[str, set[str], set[str]]:
        """The newest commit, the files that it lacks or holds with other content, and its extra files."""
        head = str(self._api.repo_info(self.repo_id, revision=revision).sha)
        tree = self._api.list_repo_tree(self.repo_id, recursive=True, revision=head)
        entries = {entry.path: entry for entry in tree if hasattr(entry, "blob_id")}
        changed = {name for name, path in files.items() if name not in entries or not _has_content(path, entries[name])}
        return head, changed, entries.keys() - files.keys() - set(OWN_FILES)

    def _find_request(self, title: str) -> str | None:
        listed = self._api.get_repo_discussions(
            self.repo_id, author=self.user, discussion_type="pull_request", discussion_status="open"
        )
        return next((f"refs/pr/{each.num}" for each in listed if each.title == title), None)


def _has_content(path: Path, entry: Any) -> bool:
    """Whether a local file has the content of a file on the Hub."""
    size = path.stat().st_size
    if size != entry.size:
        return False
    if entry.lfs is not None:
        digest, expected = hashlib.sha256(), entry.lfs.sha256
    else:
        digest, expected = hashlib.sha1(b"blob %d\0" % size), entry.blob_id
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return bool(digest.hexdigest() == expected)


def list_files(folder: Path, leave_out: tuple[str, ...] = ()) -> dict[str, Path]:
    """The files in a directory by their path in a repository, without hidden ones and those in `leave_out`."""
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name: path
        for name, path in found.items()
        if not any(part.startswith(".") for part in name.split("/"))
        and not any(name == each or name.startswith(f"{each}/") for each in leave_out)
    }


def preflight(
    repo_id: str,
    *,
    private: bool = False,
    branch: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    timeout: float = 60.0,
    patience: float = 5.0,
) -> Repository:
    """Checks, before any training, that a Hub repository can be written; creates it and its branch if necessary.

    Args:
        repo_id: owner/name, or the name of a repository of the token's owner.
        private: create it as private; an existing one must be private.
        branch: the branch to write, if not main.
        create_pr: write a pull request, for which a token that may read is enough.
        token: instead of that of the environment or of `hf auth login`.
        timeout: time limit of a request to the Hub in seconds, from now on and in the whole process.
        patience: seconds for which a failed request is tried again.

    Returns:
        The repository, to push to.

    Raises:
        InputError: the name is not valid, the token is missing, refused or may not write there, or the repository is
            public though `private` was given.
        Unreachable: HF_HUB_OFFLINE is set, or the Hub does not answer.

    Example:
        >>> preflight("me/eli5", private=True).url
        'https://huggingface.co/me/eli5'
    """
    import requests
    from huggingface_hub import HfApi

    where = f"`repo_id` {repo_id}"
    _check_before_requests(repo_id, where, token)
    limit_requests(timeout)
    silence_client()
    full_id, user = repo_id, None
    try:
        about = retry(HfApi(token=token, library_name="tfclm").whoami, patience)
        user = about["name"]
        full_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
        if about.get("auth", {}).get("accessToken", {}).get("role") == "read" and not create_pr:
            raise InputError(f"{where}: the token of {user} may only read: give one that may write")
        repository = Repository(full_id, private=private, branch=branch, create_pr=create_pr, token=token, user=user)
        if not repository.create(patience):
            raise InputError(f"{where} exists and is public: make it private in its settings, or leave out `private`")
        if not create_pr:
            repository.request_upload(patience)
    except requests.HTTPError as error:
        raise InputError(f"{where}: {explain_push_error(error, full_id, user, token)}") from error
    except Unreachable as error:
        raise Unreachable(f"{repo_id}: {scrubbed(str(error), token)}") from error
    return repository


def _check_before_requests(repo_id: str, where: str, token: str | None) -> None:
    """Checks the name and the token without a request; `where` names the repository in messages."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if scrubbed(repo_id, token) != repo_id:
        raise InputError("`repo_id`: that is a token and not the name of a repository, which looks like owner/name")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{where}: {error}") from error
    if constants.HF_HUB_OFFLINE:
        raise Unreachable(f"{repo_id}: HF_HUB_OFFLINE is set")
    if (token or stored_token()) is None:
        raise InputError(f"{where} needs a token: run `hf auth login`, or set HF_TOKEN")
