"""A repository on the Hub, over its HTTP API: whether it can be written, and making it equal to a folder."""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tfclm.disk import reason
from tfclm.errors import InputError, first_line

T = TypeVar("T")

# What a Hub repository has of its own.
OWN_FILES = (".gitattributes",)
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between two attempts
LONGEST_ASKED = 3600  # seconds that the Hub may ask to wait; then it is asked again, whatever it said


class Unreachable(Exception):
    """There is no way to the Hub now; the message says why, in a line."""


class PushFailed(Exception):
    """The Hub refuses a push for a reason that waiting does not mend."""


def stored_token() -> str | None:
    """The token of the environment or of `hf auth login`; None if there is none.

    Raises:
        InputError: its file cannot be read.
    """
    from huggingface_hub import constants, get_token

    try:
        return get_token()
    except (OSError, ValueError) as error:
        why = reason(error) if isinstance(error, OSError) else "it is no text"
        raise InputError(
            f"the Hub's token in {constants.HF_TOKEN_PATH} cannot be read ({why}): run `hf auth login` again, remove "
            "that file, or set HF_TOKEN"
        ) from error


def scrubbed(text: str, *tokens: str | None) -> str:
    """A text without the tokens of the Hub in it: those given, those of the environment, and what looks like one.

    It is called where errors are told, and so must not fail: what cannot be looked up is left out.
    """
    known = [*tokens, os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN")]
    with contextlib.suppress(Exception):
        known.append(stored_token())
    for token in filter(None, known):
        text = text.replace(token, "***")
    return re.sub(r"\bhf_[A-Za-z0-9]{20,}", "***", text)


def wait_for(error: BaseException) -> float | None:
    """Seconds that the Hub asks to wait before a request that failed is made again; None: it would fail again.

    An hour at most.
    """
    from requests import exceptions

    requests_errors = (
        exceptions.ConnectionError,
        exceptions.Timeout,
        exceptions.ChunkedEncodingError,
        exceptions.JSONDecodeError,
    )
    response, innermost = None, error
    chain: BaseException | None = error
    while chain is not None and response is None:
        # An answer that broke off is no JSON; that is the transport's fault.
        if isinstance(chain, (*requests_errors, ConnectionError, TimeoutError)):
            return 0.0
        response, innermost, chain = getattr(chain, "response", None), chain, chain.__cause__
    if response is None:
        # What the client refuses by itself, or the disk; anything else without an answer is the transport's.
        return None if isinstance(innermost, ValueError | TypeError | OSError | PushFailed | InputError) else 0.0
    if response.status_code < 500 and response.status_code not in (408, 409, 412, 425, 429):
        return None
    return _asked_wait(response.headers.get("Retry-After", ""))


def _asked_wait(header: str) -> float:
    """Seconds that a Retry-After asks for, `LONGEST_ASKED` at most; 0 for one that cannot be read."""
    header = header.strip()
    if re.fullmatch(r"[0-9]+", header):
        # Not float(), which is infinite for very many digits.
        return float(min(int(header[:20]), LONGEST_ASKED))
    try:
        seconds = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
    except (TypeError, ValueError, OverflowError, IndexError):
        return 0.0
    return min(max(seconds, 0.0), float(LONGEST_ASKED))


def next_wait(waited: float, first: float = FIRST_WAIT) -> float:
    """The back-off in seconds: twice as long each time."""
    return min(max(2 * waited, first), LONGEST_WAIT)


def format_error(error: BaseException, *tokens: str | None) -> str:
    """What went wrong with a request, in one line without tokens."""
    response = getattr(error, "response", None)
    status = f" (the Hub answered {response.status_code})" if response is not None else ""
    what = getattr(error, "server_message", None) or first_line(error)
    return scrubbed(" ".join(f"{what}{status}".split()), *tokens)


class Repository:
    """A model's repository on the Hub, in which one branch or pull request is written.

    Args:
        repo_id: its full name, owner/name.
        private: whether it is to be private, where it is made.
        branch: the branch; main if not given.
        create_pr: write into a pull request against main instead.
        token: what to write with; the one of the environment or of `hf auth login` if not given.
        user: whose token it is.
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
        self._request: str | None = None  # the pull request's branch, once there is one
        self.rests_until = 0.0  # on the monotonic clock: the Hub has asked not to be asked before

    @property
    def url(self) -> str:
        """Where people look at it."""
        return f"{self._api.endpoint}/{self.repo_id}"

    def mirror(
        self, files: Mapping[str, Path], title: str, description: str = "", *, request_title: str = "Upload by tfclm"
    ) -> bool:
        """Makes the branch hold exactly these files, in one commit; False if it does so already.

        Args:
            files: where each file is, by its path in the repository.
            title: first line of the commit's message.
            description: the rest of it.
            request_title: the title under which a pull request is found again, or opened.

        Raises:
            PushFailed: the Hub took the commit and holds something else.
            Exception: whatever the client raises; `wait_for` says whether trying again may help.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        if self.create_pr and self._request is None:
            self._request = self._open_request(request_title)
        revision = self._request or self.branch or "main"
        # A .gitignore that this commit removes still holds for it: the second round brings what it held back.
        for attempt in range(3):
            head, changed, gone = self._differences(files, revision)
            if not changed and not gone:
                return attempt > 0
            if attempt == 2:
                raise PushFailed(f"{self.repo_id} does not keep {', '.join(sorted({*changed, *gone})[:5])}")
            operations: list[Any] = [CommitOperationAdd(name, str(files[name])) for name in sorted(changed)]
            operations += [CommitOperationDelete(name, is_folder=False) for name in sorted(gone)]
            opens = self.create_pr and self._request is None
            made = self._api.create_commit(
                self.repo_id,
                operations,
                commit_message=request_title if opens else title,
                commit_description=f"{title}\n\n{description}" if opens else description,
                revision=None if opens else revision,
                create_pr=opens,
                # Somebody else's commit in between is an error 412 and not lost.
                parent_commit=head,
            )
            if opens:
                revision = self._request = str(made.pr_revision)
        raise AssertionError("the loop returns or raises")

    def steps_of(self, run: str, request_title: str) -> int:
        """How far the newest state of a run is that the branch holds, in optimizer steps; 0 if there is none.

        Commits say so in their description: `run RUN, step STEPS`.
        """
        if self.create_pr and self._request is None:
            self._request = self._open_request(request_title)
            if self._request is None:
                return 0
        commits = self._api.list_repo_commits(self.repo_id, revision=self._request or self.branch or "main")
        found = (re.search(rf"\brun {re.escape(run)}, step (\d+)", each.message) for each in commits)
        return max((int(match[1]) for match in found if match), default=0)

    def _differences(self, files: Mapping[str, Path], revision: str) -> tuple[str, set[str], set[str]]:
        """The newest commit, the files that it lacks or has with another content, and those that it has too many."""
        head = str(self._api.repo_info(self.repo_id, revision=revision).sha)
        tree = self._api.list_repo_tree(self.repo_id, recursive=True, revision=head)
        there = {entry.path: entry for entry in tree if hasattr(entry, "blob_id")}
        changed = {name for name, path in files.items() if name not in there or not _is_same(path, there[name])}
        return head, changed, there.keys() - files.keys() - set(OWN_FILES)

    def _open_request(self, title: str) -> str | None:
        listed = self._api.get_repo_discussions(
            self.repo_id, author=self.user, discussion_type="pull_request", discussion_status="open"
        )
        return next((f"refs/pr/{each.num}" for each in listed if each.title == title), None)


def _is_same(path: Path, entry: Any) -> bool:
    """Whether a file's content is that of an entry of the Hub's tree."""
    size = path.stat().st_size
    if size != entry.size:
        return False
    if entry.lfs is not None:
        digest, expected = hashlib.sha256(), entry.lfs.sha256
    else:
        digest, expected = hashlib.sha1(b"blob %d\0" % size), entry.blob_id
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return bool(digest.hexdigest() == expected)


def list_files(folder: Path, leave_out: tuple[str, ...] = ()) -> dict[str, Path]:
    """The files below a folder by their path in a repository; nothing hidden, and nothing of what is left out."""
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
    flag: str = "--push-to-hub",
) -> Repository:
    """Checks, before any training, that a Hub repository can be written; makes it and its branch if need be.

    Args:
        repo_id: owner/name, or a name of the token's owner.
        private: make it private; one that is there must be.
        branch: what is written, if not main.
        create_pr: a pull request is written, for which reading is enough.
        token: instead of that of the environment or of `hf auth login`.
        timeout: seconds that a request to the Hub may take, from here on and in the whole process.
        patience: seconds for which a Hub that fails is asked again.
        flag: what gave the name, for messages.

    Raises:
        InputError: a name that is not valid, no token, one that is refused or may not write there, a repository that is
            public against what is asked.
        Unreachable: HF_HUB_OFFLINE is set, or the Hub does not answer.
    """
    import requests
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
    from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if scrubbed(repo_id, token) != repo_id:
        raise InputError(f"{flag}: that is a token and no name of a repository, which looks like owner/name")
    where = f"{flag} {repo_id}"
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{where}: {error}") from error
    if constants.HF_HUB_OFFLINE:
        raise Unreachable(f"{where}: HF_HUB_OFFLINE is set")
    if (token or stored_token()) is None:
        raise InputError(f"{where} needs a token: run `hf auth login`, or set HF_TOKEN")
    limit_requests(timeout)
    _quiet_client()
    api = HfApi(token=token, library_name="tfclm")

    def ask(call: Callable[[], T]) -> T:
        """Asks again for a while if the Hub fails."""
        began, waited = time.monotonic(), 0.0
        while True:
            try:
                return call()
            except Exception as error:
                asked = wait_for(error)
                if asked is None:
                    raise
                waited = next_wait(waited)
                pause = max(waited, asked)
                if time.monotonic() - began + pause > patience:
                    raise Unreachable(
                        f"{where}: the Hub at {constants.ENDPOINT} cannot be reached: {format_error(error, token)}"
                    ) from error
                time.sleep(pause)

    def may_upload() -> None:
        # Asks for the place of a file that is never sent: the one question about writing that changes nothing.
        sample = UploadInfo.from_bytes(os.urandom(32))
        post_lfs_batch_info([sample], token, "model", repo_id, revision=branch, endpoint=api.endpoint)

    user = None
    try:
        about = ask(api.whoami)
        user = about["name"]
        repo_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
        role = about.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read" and not create_pr:
            raise InputError(f"{where}: the token of {user} may only read: give one that may write")
        try:
            there = ask(lambda: api.repo_info(repo_id))
            if private and not there.private:
                raise InputError(
                    f"{where} is there and public: make it private in its settings, or leave out --private"
                )
        except RepositoryNotFoundError:
            ask(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
        if branch is not None:
            ask(lambda: api.create_branch(repo_id, branch=branch, exist_ok=True))
        if not create_pr:
            ask(may_upload)
    except requests.HTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        reasons = {
            401: "the token is not valid: run `hf auth login`, or set HF_TOKEN",
            403: f"the token of {user} may not write to {repo_id}: give another token or another repository",
        }
        why = f"{reasons[status]} (the Hub answered {status})" if status in reasons else format_error(error, token)
        raise InputError(scrubbed(f"{where}: {why}", token)) from error
    return Repository(repo_id, private=private, branch=branch, create_pr=create_pr, token=token, user=user)


def limit_requests(seconds: float = 60.0) -> None:
    """Gives every request of `huggingface_hub` in this process a time limit, which many of them have not."""
    import requests
    from huggingface_hub import configure_http_backend

    class Session(requests.Session):
        """Gives up a connection on which nothing comes or goes."""

        def request(self, *arguments: Any, **options: Any) -> requests.Response:
            # Most of the client's calls say None, which is for ever.
            if options.get("timeout") is None:
                options["timeout"] = seconds
            return super().request(*arguments, **options)

    configure_http_backend(Session)


def _quiet_client() -> None:
    """No bars and no lines on retries from `huggingface_hub`."""
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    # Bars and warnings of another thread in the middle of the training's; what matters is said by us.
    disable_progress_bars()
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub.hf_api").setLevel(logging.ERROR)
