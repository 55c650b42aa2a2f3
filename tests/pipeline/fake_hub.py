"""A hub of models on this machine: repositories with branches and commits, and a log of what was asked of it."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest


class FakeHub:
    """What `huggingface_hub` needs of a server, over folders.

    Attributes:
        bytes_sent: Of every file, by ``owner/name/file``.
    """

    def __init__(self, url: str):
        self.url = url
        self.folders: dict[tuple[str, str], Path] = {}  # (repository, commit)
        self.branches: dict[tuple[str, str], str] = {}  # (repository, branch or tag)
        self.bytes_sent: dict[str, int] = {}

    def publish(self, repository: str, folder: Path, branch: str = "main") -> str:
        """Adds a commit with the files of `folder`, to which `branch` now points."""
        commit = hashlib.sha1(str((repository, folder)).encode()).hexdigest()
        self.folders[repository, commit] = folder
        self.branches[repository, branch] = commit
        return commit

    def commit(self, repository: str, revision: str) -> str | None:
        revision = self.branches.get((repository, revision), revision)
        return revision if (repository, revision) in self.folders else None

    @property
    def weight_bytes(self) -> int:
        return sum(size for name, size in self.bytes_sent.items() if name.endswith(".safetensors"))


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, size: int = 0) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(size or len(body)))
            self.end_headers()
            self.wfile.write(body)

        def missing(self, code: str) -> None:
            self.answer(404, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0].replace("%40", "@")
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
                repository, kind, revision = match[1], match[2], match[3] or "main"
            elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                repository, kind, revision = match[1], "file", match[2]
            else:
                return self.missing("EntryNotFound")
            if not any(name == repository for name, _ in hub.folders):
                return self.missing("RepoNotFound")
            commit = hub.commit(repository, revision)
            if commit is None:
                return self.missing("RevisionNotFound")
            folder = hub.folders[repository, commit]
            files = sorted(file for file in folder.iterdir() if file.is_file())
            if kind == "file":
                return self.file(repository, commit, folder / match[3])
            if kind == "tree":
                about: Any = [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _etag(f)[:40]} for f in files
                ]
            else:
                siblings = [{"rfilename": file.name} for file in files]
                about = {"id": repository, "modelId": repository, "sha": commit, "siblings": siblings}
            self.answer(200, json.dumps(about).encode(), {"Content-Type": "application/json"})

        def file(self, repository: str, commit: str, file: Path) -> None:
            if not file.is_file():
                return self.missing("EntryNotFound")
            content = file.read_bytes()
            headers = {"ETag": f'"{_etag(file)[:40]}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
            if self.command == "HEAD":
                return self.answer(200, b"", headers, len(content))
            status, asked = 200, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if asked:
                first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
                status, content = 206, content[first : last + 1]
            name = f"{repository}/{file.name}"
            hub.bytes_sent[name] = hub.bytes_sent.get(name, 0) + len(content)
            self.answer(status, content, headers)

    return Handler


def _etag(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@contextmanager
def running_hub(cache: Path) -> Iterator[FakeHub]:
    """A hub that `huggingface_hub` of this process asks instead of its own, with a cache of its own."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    hub = FakeHub(f"http://127.0.0.1:{server.server_port}")
    server.RequestHandlerClass = _handler(hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        patch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        try:
            yield hub
        finally:
            server.shutdown()
            server.server_close()
