"""A stand-in for the Hub on loopback: who a token is, making a repository, and git with LFS over HTTP.

The repositories are real bare ones, served by git's own http-backend; large files lie beside them in `lfs/`.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

# What each token may do.
TOKENS = {"hf_writer": "write", "hf_reader": "read"}


class Handler(BaseHTTPRequestHandler):
    """Answers as the Hub does; `server.root` holds the repositories."""

    def log_message(self, *arguments: object) -> None:
        """Nothing: stderr is the test's."""

    def _answer(self, status: int, content: dict | bytes, kind: str = "application/json") -> None:
        body = json.dumps(content).encode() if isinstance(content, dict) else content
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _role(self) -> str | None:
        return TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def do_GET(self) -> None:
        """Who the token is, or git."""
        if self.path.startswith("/lfs/"):
            return self._answer(200, (self.server.root / self.path[1:]).read_bytes(), "application/octet-stream")
        if self.path != "/api/whoami-v2":
            return self._git()
        if self._role() is None:
            return self._answer(401, {"error": "Invalid username or password."})
        return self._answer(
            200, {"type": "user", "name": "me", "fullname": "me", "email": "me@example.org", "orgs": []}
        )

    def do_POST(self) -> None:
        """Makes a repository, says where large files go, or git."""
        if self.path.endswith("/info/lfs/objects/batch"):
            return self._lfs(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        if self.path != "/api/repos/create":
            return self._git()
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._role() != "write":
            return self._answer(403, {"error": "Forbidden: you must use a write token to create a repository."})
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        folder = self.server.root / name
        if not folder.exists():
            make_repository(folder)
        host, port = self.server.server_address[:2]
        return self._answer(200, {"url": f"http://{host}:{port}/{name}", "name": name, "id": name})

    def do_PUT(self) -> None:
        """Takes a large file whose content is what its name says."""
        content = self.rfile.read(int(self.headers["Content-Length"]))
        right = hashlib.sha256(content).hexdigest() == self.path.removeprefix("/lfs/")
        if right:
            (self.server.root / "lfs").mkdir(exist_ok=True)
            (self.server.root / self.path[1:]).write_bytes(content)
        self._answer(200 if right else 422, {})

    def _lfs(self, asked: dict) -> None:
        host, port = self.server.server_address[:2]
        objects = [
            wanted | {"actions": {asked["operation"]: {"href": f"http://{host}:{port}/lfs/{wanted['oid']}"}}}
            for wanted in asked["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects}, "application/vnd.git-lfs+json")

    def _git(self) -> None:
        url = urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self._chunks()
        environment = os.environ | {
            "GIT_PROJECT_ROOT": str(self.server.root),
            "GIT_HTTP_EXPORT_ALL": "1",
            "REQUEST_METHOD": self.command,
            "PATH_INFO": url.path,
            "QUERY_STRING": url.query,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(body)),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
            "REMOTE_USER": "me",
            "REMOTE_ADDR": "127.0.0.1",
        }
        done = subprocess.run(["git", "http-backend"], input=body, env=environment, capture_output=True)
        head, _, content = done.stdout.partition(b"\r\n\r\n")
        fields = dict(line.split(": ", 1) for line in head.decode().splitlines())
        self._answer(int(fields.get("Status", "200")[:3]), content, fields.get("Content-Type", "text/plain"))

    def _chunks(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body


def make_repository(folder: Path) -> None:
    """A bare repository with a first commit, as the Hub makes it."""

    def git(*arguments: str, text: str = "") -> str:
        command = ["git", "-C", str(folder), "-c", "user.name=hub", "-c", "user.email=hub@example.org", *arguments]
        return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout.strip()

    folder.mkdir(parents=True)
    git("init", "--quiet", "--bare", "--initial-branch=main")
    git("config", "http.receivepack", "true")
    blob = git("hash-object", "-w", "--stdin", text="*.h5 filter=lfs diff=lfs merge=lfs -text\n")
    tree = git("mktree", text=f"100644 blob {blob}\t.gitattributes\n")
    git("update-ref", "refs/heads/main", git("commit-tree", tree, "-m", "initial commit"))


@contextmanager
def hub(root: Path) -> Iterator[str]:
    """Runs the stand-in with its repositories in `root`; gives its address, for HF_ENDPOINT."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.root = root
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
