"""A stand-in for the Hugging Face Hub on this machine: as much of its interface as pushing and fetching use."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from unittest.mock import patch
from urllib.parse import unquote, urlsplit


class Hub:
    """``repositories``: id -> path -> content. ``closed``: ids that answer with a status and the Hub's error code."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.closed: dict[str, tuple[int, str]] = {}
        self.fetched: list[str] = []
        self.messages: list[str] = []

    def commit(self, repo_id: str) -> str:
        """The id of the present state of a repository: 40 hexadecimal digits."""
        return hashlib.sha1(repr(sorted(self.repositories[repo_id].items())).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[Hub]

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refused(self, repo_id: str, known: bool = True) -> bool:
        status, code = self.hub.closed.get(repo_id, (404, "RepoNotFound"))
        if repo_id in self.hub.closed or (known and repo_id not in self.hub.repositories):
            self._answer({"error": code}, status, X_Error_Code=code)
            return True
        return False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts == ["api", "validate-yaml"]:
            return self._answer({"errors": [], "warnings": []})
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            repo_id = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            if self._refused(repo_id, known=False):
                return None
            self.hub.repositories.setdefault(repo_id, {".gitattributes": b""})
            self.hub.private.setdefault(repo_id, asked.get("visibility") == "private")
            host, port = self.server.server_address[:2]
            return self._answer({"url": f"http://{host}:{port}/{repo_id}", "name": repo_id})
        repo_id, action = "/".join(parts[2:4]), parts[4]
        if self._refused(repo_id):
            return None
        if action == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in files]
            return self._answer({"files": modes})
        assert action == "commit"
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "header":
                self.hub.messages.append(line["value"]["summary"])
            else:
                content = base64.b64decode(line["value"]["content"])
                self.hub.repositories[repo_id][line["value"]["path"]] = content
        oid = self.hub.commit(repo_id)
        return self._answer({"success": True, "commitUrl": f"/{repo_id}/commit/{oid}", "commitOid": oid})

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        is_listing = parts[:2] == ["api", "models"]
        repo_id = "/".join(parts[2:4] if is_listing else parts[:2])
        if self._refused(repo_id):
            return None
        files, oid = self.hub.repositories[repo_id], self.hub.commit(repo_id)
        if is_listing and len(parts) > 5 and parts[5] not in ("main", oid):
            return self._answer({"error": "no"}, 404, X_Error_Code="RevisionNotFound")
        if is_listing and parts[4] == "tree":
            return self._answer(
                [
                    {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for path, content in files.items()
                ]
            )
        if is_listing:
            return self._answer({"id": repo_id, "sha": oid, "siblings": [{"rfilename": path} for path in files]})
        path = "/".join(parts[4:])
        if path not in files:
            return self._answer({"error": "no"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
        if self.command == "GET":
            self.hub.fetched.append(path)
        etag = f'"{hashlib.sha1(files[path]).hexdigest()}"'
        return self._answer(files[path], ETag=etag, X_Repo_Commit=oid)

    do_HEAD = do_GET


@contextmanager
def serve(cache: str) -> Iterator[Hub]:
    """A stand-in that the Hub's client speaks to, with a cache of its own, in place of the real one."""
    from huggingface_hub import constants

    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    changed = {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": cache,
        "HF_HUB_DISABLE_XET": True,
    }
    environment = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_stand_in"}
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HTTP_PROXY", "http_proxy"):
        environment[name] = ""
    try:
        with patch.multiple(constants, **changed), patch.dict("os.environ", environment):
            yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
