"""A stand-in for the Hub on loopback, with the endpoints that the real `huggingface_hub` client calls, and its users.

It keeps what it gets: repositories of models and datasets with branches, commits and pull requests, and large files by
their hash, which it checks. `Faults` makes it misbehave as networks do, from a seed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

# What each token may do. They belong to the user "me", who writes in the organisation "lab" and reads in "museum".
WRITER, READER = "hf_" + "w" * 34, "hf_" + "r" * 34
TOKENS = {WRITER: "write", READER: "read"}
NAMESPACES = ("me", "lab")
DATE = "2026-01-01T00:00:00.000Z"
PAGE = 7  # entries of a tree's page: enough pages to turn
FAULTS = ("refused", "reset", "half", "lost", "500", "429", "hang")


@dataclass(frozen=True)
class Commit:
    """What a branch held at one moment, and the message that came with it."""

    id: str
    title: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repository:
    """A repository: its branches (pull requests among them), each a list of commits, the newest last."""

    name: str
    private: bool
    refs: dict[str, list[Commit]] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)  # title and branch of each pull request

    def find(self, revision: str) -> Commit | None:
        """The commit that a branch or an id stands for."""
        if revision in self.refs:
            return self.refs[revision][-1]
        return next((each for commits in self.refs.values() for each in commits if each.id == revision), None)

    def add(self, ref: str, title: str, message: str, files: dict[str, bytes]) -> Commit:
        """A new commit at the end of a branch."""
        parent = self.refs[ref][-1].id if ref in self.refs else ""
        made = hashlib.sha1(repr((parent, ref, title, sorted(files), time.time_ns())).encode()).hexdigest()
        self.refs.setdefault(ref, []).append(Commit(made, title, message, files))
        return self.refs[ref][-1]

    def titles(self, ref: str = "main") -> list[str]:
        """The titles of a branch's commits after the one that made the repository."""
        return [commit.title for commit in self.refs[ref][1:]]

    def files(self, ref: str = "main") -> dict[str, bytes]:
        """What a branch holds, without the file that the Hub itself put there."""
        return {name: content for name, content in self.refs[ref][-1].files.items() if name != ".gitattributes"}


class Faults:
    """What goes wrong with the next requests, in this order; None is a request that goes right.

    refused: nobody listens for half a second. reset: the connection breaks at once; half: in the middle of what is
    sent; lost: after the request was obeyed, so that its answer is missing. 429 asks for `retry_after`, seconds or a
    date. hang: no answer within `hang` seconds. Spared are requests that `path` does not find, such as
    "POST /api/models/me/x/commit/main".
    """

    def __init__(
        self, sequence: Sequence[str | None] = (), path: str = "", hang: float = 2.0, retry_after: str = "1"
    ) -> None:
        self.left, self.path, self.hang, self.retry_after = list(sequence), re.compile(path), hang, retry_after
        self.met: list[str] = []

    @staticmethod
    def drawn(seed: int, path: str = "", hang: float = 2.0) -> Faults:
        """Every kind once, and some requests that go right, in an order by the seed."""
        sequence = [*FAULTS, *[None] * (len(FAULTS) // 2)]
        random.Random(seed).shuffle(sequence)
        return Faults(sequence, path, hang)

    def next(self, request: str) -> str | None:
        """What is to go wrong with a request."""
        if not self.left or not self.path.search(request):
            return None
        fault = self.left.pop(0)
        self.met += [fault] if fault else []
        return fault


class Hub:
    """The state of the stand-in, and the server; `endpoint` is what HF_ENDPOINT is set to."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}  # by "models/me/x", "datasets/me/y"
        self.large: dict[str, bytes] = {}  # by SHA-256
        self.faults = Faults()
        self.lock = threading.RLock()
        self.requests: list[str] = []
        self.port = 0
        self._start()

    @property
    def endpoint(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def _start(self) -> None:
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Nobody listens any more; connections are refused."""
        self._server.shutdown()
        self._server.server_close()

    def restart(self, seconds: float) -> None:
        """Stops, and comes back at the same address after some time."""
        self.stop()
        time.sleep(seconds)
        self._start()

    def model(self, name: str) -> Repository:
        """A model's repository."""
        return self.repositories[f"models/{name}"]

    def make(self, key: str, files: dict[str, bytes], private: bool = False) -> Repository:
        """A repository with content, by its key ("datasets/me/texts")."""
        made = self.repositories[key] = Repository(key.split("/", 1)[1], private)
        made.add("main", "initial commit", "", {".gitattributes": b"*.zip filter=lfs diff=lfs merge=lfs -text\n"})
        if files:
            made.add("main", "content", "", made.refs["main"][-1].files | files)
        return made

    def upload(self, key: str, folder: Path) -> Repository:
        """A repository with a folder's files."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return self.make(key, files)


@contextmanager
def hub() -> Iterator[Hub]:
    """Runs the stand-in."""
    running = Hub()
    try:
        yield running
    finally:
        running.stop()


def environment(endpoint: str, home: Path, token: str | None = WRITER) -> dict[str, str]:
    """A user's, with a Hub at `endpoint`, and nothing of the machine's own settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    made = kept | {"HF_ENDPOINT": endpoint, "HOME": str(home), "HF_HOME": str(home / "hf"), "TQDM_DISABLE": "1"}
    return made | ({"HF_TOKEN": token} if token else {})


PRELUDE = """
import json, sys, threading, time
from pathlib import Path
from tfclm.errors import InputError
from tfclm.hub.pushing import Pusher, State
from tfclm.hub.repository import Repository, Unreachable, list_files, preflight
folder = Path(sys.argv[1])
def answer(value): print(json.dumps(value))
"""


def asked(code: str, endpoint: str, folder: Path, token: str | None = WRITER) -> tuple[Any, str]:
    """What a process of its own answers that runs the code with the real client, and its stderr."""
    home = folder.parent / "home"
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, str(folder)],
        env=environment(endpoint, home, token),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert WRITER not in done.stdout + done.stderr
    return json.loads(done.stdout), done.stderr


def filled(folder: Path, **files: bytes) -> Path:
    """A folder as a run leaves one: small text, a folder in it, a large file that is no text."""
    content = {"config.json": b"{}", "logs/events": b"\0" * 40, "model.safetensors": b"\0" + os.urandom(3000)} | files
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def held(folder: Path) -> dict[str, bytes]:
    """What is in a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Refused(Exception):
    """An answer that is an error: status, message, and the Hub's name for it."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


def is_large(content: bytes) -> bool:
    """Whether the Hub stores a file outside git: here, what is not text."""
    return b"\0" in content[:512] or len(content) > 10 * 2**20


def blob_id(content: bytes) -> str:
    """git's name of a content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Reads a request, lets a fault happen if one is due, and calls the endpoint."""

    hub: Hub

    def log_message(self, *arguments: object) -> None:
        """Nothing: stderr is the test's."""

    def _serve(self) -> None:
        url = urlsplit(self.path)
        request = f"{self.command} {unquote(url.path)}"
        length = int(self.headers.get("Content-Length") or 0)
        with self.hub.lock:
            self.hub.requests.append(request)
            fault = self.hub.faults.next(request)
        if fault == "half":
            self.rfile.read(length // 2)
        if fault in ("reset", "half", "refused"):
            if fault == "refused":
                threading.Thread(target=self.hub.restart, args=(0.5,), daemon=True).start()
            return self._break_off()
        self.body = self.rfile.read(length)
        if fault == "hang":
            time.sleep(self.hub.faults.hang)
            return self._break_off()
        if fault in ("500", "429"):
            headers = {"Retry-After": self.hub.faults.retry_after} if fault == "429" else {}
            return self._answer(int(fault), {"error": "a fault"}, headers)
        self.query = parse_qs(url.query)
        try:
            with self.hub.lock:
                answer = self._route(self.command, unquote(url.path))
        except Refused as error:
            headers = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
            return self._answer(error.status, {"error": str(error), "errors": [{"message": str(error)}]}, headers)
        return self._break_off() if fault == "lost" else self._answer(*answer)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _break_off(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _route(self, verb: str, path: str) -> tuple[int, Any, dict[str, str]]:
        """The endpoint's answer: status, content, headers."""
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.role = TOKENS.get(given)
        if given and self.role is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        for method, pattern, endpoint in ENDPOINTS:
            match = re.fullmatch(pattern, path)
            if match and verb in method:
                return endpoint(self, *match.groups())
        raise Refused(404, f"no endpoint {verb} {path}")

    def _json(self) -> Any:
        return json.loads(self.body)

    def _found(self, kind: str, name: str) -> Repository:
        found = self.hub.repositories.get(f"{kind or 'models'}/{name}".replace("//", "/"))
        if found is None or (found.private and self.role is None):
            raise Refused(404, "Repository not found", "RepoNotFound")
        return found

    def _commit_of(self, repository: Repository, revision: str | None) -> Commit:
        found = repository.find(revision or "main")
        if found is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def _check_write(self, name: str) -> None:
        if self.role is None:
            raise Refused(401, "Invalid username or password.")
        if self.role != "write" or name.split("/")[0] not in NAMESPACES:
            raise Refused(403, "You don't have the rights to write here")

    # Who and where

    def whoami(self) -> tuple[int, Any, dict[str, str]]:
        if self.role is None:
            raise Refused(401, "Invalid username or password.")
        orgs = [{"name": "lab", "roleInOrg": "write"}, {"name": "museum", "roleInOrg": "read"}]
        token = {"displayName": "a token", "role": self.role}
        return 200, {"type": "user", "name": "me", "orgs": orgs, "auth": {"accessToken": token}}, {}

    def create(self) -> tuple[int, Any, dict[str, str]]:
        asked = self._json()
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        self._check_write(name)
        key = f"{asked.get('type') or 'model'}s/{name}"
        answer = {"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name}
        if key in self.hub.repositories:
            return 409, answer | {"error": "You already created this model repo"}, {}
        self.hub.make(key, {}, bool(asked.get("private")))
        return 200, answer, {}

    def info(self, kind: str, name: str, revision: str | None = None) -> tuple[int, Any, dict[str, str]]:
        found = self._found(kind, name)
        commit = self._commit_of(found, revision)
        files = [{"rfilename": path} for path in commit.files]
        about = {"id": name, "sha": commit.id, "private": found.private, "lastModified": DATE, "siblings": files}
        return 200, about | {"tags": [], "downloads": 0, "likes": 0, "gated": False, "disabled": False}, {}

    def branch(self, kind: str, name: str, branch: str) -> tuple[int, Any, dict[str, str]]:
        found = self._found(kind, name)
        self._check_write(name)
        if branch in found.refs:
            raise Refused(409, "Reference already exists")
        found.refs[branch] = found.refs["main"][:1]
        return 200, {}, {}

    def discussions(self, kind: str, name: str) -> tuple[int, Any, dict[str, str]]:
        listed = [
            {"title": title, "num": number, "author": {"name": "me"}, "createdAt": DATE, "status": "open"}
            | {"repo": {"name": name, "type": "model"}, "isPullRequest": True}
            for number, (title, _) in enumerate(self._found(kind, name).requests, 1)
        ]
        return 200, {"count": len(listed), "start": 0, "discussions": listed}, {}

    def validate_yaml(self) -> tuple[int, Any, dict[str, str]]:
        content = self._json()["content"].replace("\r\n", "\n")
        head = re.match(r"---\n(.*?)\n---\n", content, flags=re.DOTALL)
        try:
            if not isinstance(yaml.safe_load(head[1]) if head else {}, dict):
                raise Refused(400, "the metadata is no mapping")
        except yaml.YAMLError as error:
            raise Refused(400, f"the metadata is no YAML: {error}") from error
        return 200, {"errors": [], "warnings": []}, {}

    # What is there

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
        if is_large(content):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry

    def tree(self, kind: str, name: str, revision: str, path: str | None) -> tuple[int, Any, dict[str, str]]:
        commit = self._commit_of(self._found(kind, name), revision)
        start = f"{path}/" if path else ""
        deep = self.query.get("recursive", [""])[0].lower() == "true"
        entries = {}
        for file, content in sorted(commit.files.items()):
            if file.startswith(start):
                parts = file[len(start) :].split("/")
                for depth in range(1, len(parts) if deep else min(len(parts), 2)):
                    folder = start + "/".join(parts[:depth])
                    entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": "0" * 40}
                if deep or len(parts) == 1:
                    entries[file] = self._entry(file, content)
        if path and not entries:
            raise Refused(404, f"{path} does not exist", "EntryNotFound")
        first = int(self.query.get("cursor", ["0"])[0])
        link = f"{self.hub.endpoint}{urlsplit(self.path).path}?recursive={deep}&cursor={first + PAGE}"
        more = {"Link": f'<{link}>; rel="next"'} if first + PAGE < len(entries) else {}
        return 200, list(entries.values())[first : first + PAGE], more

    def paths_info(self, kind: str, name: str, revision: str) -> tuple[int, Any, dict[str, str]]:
        files = self._commit_of(self._found(kind, name), revision).files
        asked = parse_qs(self.body.decode()).get("paths", [])
        found = [self._entry(path, files[path]) for path in asked if path in files]
        folders = [path for path in asked if any(file.startswith(f"{path}/") for file in files)]
        return 200, found + [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders], {}

    def refs(self, kind: str, name: str) -> tuple[int, Any, dict[str, str]]:
        listed = [
            {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": commits[-1].id}
            for ref, commits in self._found(kind, name).refs.items()
        ]
        return 200, {"branches": listed, "converts": [], "tags": []}, {}

    def commits(self, kind: str, name: str, revision: str) -> tuple[int, Any, dict[str, str]]:
        found = self._found(kind, name)
        self._commit_of(found, revision)
        listed = [
            {"id": each.id, "title": each.title, "message": each.message, "date": DATE, "authors": [{"user": "me"}]}
            for each in reversed(found.refs[revision])
        ]
        return 200, listed, {}

    def resolve(self, kind: str | None, name: str, revision: str, path: str) -> tuple[int, Any, dict[str, str]]:
        commit = self._commit_of(self._found(kind or "models", name), revision)
        if path not in commit.files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        content = commit.files[path]
        etag = hashlib.sha256(content).hexdigest() if is_large(content) else blob_id(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit.id, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and self.command == "GET":
            first, last = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
            part = {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
            return 206, content[first : last + 1], headers | part
        return 200, content, headers

    # What is put there

    def preupload(self, kind: str, name: str, revision: str) -> tuple[int, Any, dict[str, str]]:
        files = self._commit_of(self._found(kind, name), revision).files
        self._check_write(name)
        ignored = files.get(".gitignore", b"").decode().split()
        asked = [
            {
                "path": each["path"],
                "uploadMode": "lfs" if is_large(base64.b64decode(each["sample"])) else "regular",
                "shouldIgnore": each["path"] in ignored,
                "oid": blob_id(files[each["path"]]) if each["path"] in files else None,
            }
            for each in self._json()["files"]
        ]
        return 200, {"files": asked}, {}

    def lfs_batch(self, kind: str | None, name: str) -> tuple[int, Any, dict[str, str]]:
        self._found(kind or "models", name)
        self._check_write(name)
        objects = [
            {"oid": each["oid"], "size": each["size"]}
            | ({} if each["oid"] in self.hub.large else {"actions": self._actions(each["oid"])})
            for each in self._json()["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}, {}

    def _actions(self, oid: str) -> dict[str, Any]:
        # Where a large file goes is an address that needs no token.
        return {
            "upload": {"href": f"{self.hub.endpoint}/lfs/{oid}"},
            "verify": {"href": f"{self.hub.endpoint}/lfs/verify"},
        }

    def lfs_put(self, oid: str) -> tuple[int, Any, dict[str, str]]:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(422, "the content is not what its hash says")
        self.hub.large[oid] = self.body
        return 200, {}, {}

    def lfs_verify(self) -> tuple[int, Any, dict[str, str]]:
        asked = self._json()
        if len(self.hub.large.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, "no such object")
        return 200, {}, {}

    def commit(self, kind: str, name: str, revision: str) -> tuple[int, Any, dict[str, str]]:
        found = self._found(kind, name)
        base = self._commit_of(found, revision)
        self._check_write(name)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header, files = lines[0]["value"], dict(base.files)
        if header.get("parentCommit", base.id) != base.id:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.large:
                    raise Refused(400, f"LFS object {value['oid']} was never uploaded")
                files[value["path"]] = self.hub.large[value["oid"]]
            elif files.pop(value["path"], None) is None:
                raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
        answer: dict[str, Any] = {}
        if self.query.get("create_pr") == ["1"]:
            number = len(found.requests) + 1
            revision = f"refs/pr/{number}"
            found.refs[revision] = list(found.refs["main"])
            found.requests.append((header["summary"], revision))
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{name}/discussions/{number}"
        made = found.add(revision, header["summary"], header.get("description", ""), files)
        return 200, answer | {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{made.id}", "commitOid": made.id}, {}


API = r"/api/(models|datasets)/([^/]+/[^/]+)"
REPOSITORY = r"/(datasets/)?([^/]+/[^/]+)"
ENDPOINTS = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("GET", API, Handler.info),
    ("GET", API + "/revision/(.+)", Handler.info),
    ("GET", API + r"/tree/(refs/pr/\d+|[^/]+)(?:/(.+))?", Handler.tree),
    ("POST", API + "/paths-info/(.+)", Handler.paths_info),
    ("GET", API + "/refs", Handler.refs),
    ("GET", API + "/commits/(.+)", Handler.commits),
    ("GET", API + "/discussions", Handler.discussions),
    ("POST", API + "/branch/(.+)", Handler.branch),
    ("POST", API + "/preupload/(.+)", Handler.preupload),
    ("POST", API + "/commit/(.+)", Handler.commit),
    ("POST", REPOSITORY + r"\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/lfs/([0-9a-f]{64})", Handler.lfs_put),
    ("POST", "/lfs/verify", Handler.lfs_verify),
    ("GET HEAD", REPOSITORY + r"/resolve/(refs/pr/\d+|[^/]+)/(.+)", Handler.resolve),
]
