"""A server on this machine that answers as the Hugging Face hub does, for data sets."""

import hashlib
import http.server
import json
import threading
from collections.abc import Mapping

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(http.server.ThreadingHTTPServer):
    """Serves repositories {owner/name: {path: content}} of data sets."""

    def __init__(self, repositories: Mapping[str, Mapping[str, bytes]]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        super().__exit__(*_)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer(asked.get("paths"))

    def _answer(self, asked: list[str] | None = None) -> None:
        words = self.path.partition("?")[0].strip("/").split("/")
        is_api = words[0] == "api"
        _, owner, name, *rest = [*words[is_api:], "", "", ""]
        files = self.server.repositories.get(f"{owner}/{name}")
        if files is None:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif not is_api:
            self._file(files.get("/".join(rest[2:]).rstrip("/")))
        elif rest[:1] == ["tree"]:
            self._send(200, _tree(files, "/".join(rest[2:]).rstrip("/")))
        elif rest[:1] == ["paths-info"]:
            found = [_about(path, files[path]) for path in asked or () if path in files]
            self._send(200, json.dumps(found).encode())
        else:
            siblings = [{"rfilename": path} for path in files]
            about = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings}
            self._send(200, json.dumps(about | {"private": False, "tags": []}).encode())

    def _file(self, content: bytes | None) -> None:
        if content is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        else:
            self._send(200, content, {"ETag": f'"{_hash(content)}"', "X-Repo-Commit": COMMIT})

    def _send(self, status: int, content: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Prints nothing."""


def _tree(files: Mapping[str, bytes], folder: str) -> bytes:
    start = f"{folder}/" if folder else ""
    inside = [path for path in files if path.startswith(start)]
    folders = {
        start + p.removeprefix(start).split("/")[0] for p in inside if "/" in p[len(start) :]
    }
    entries = [_about(path, files[path]) for path in inside if "/" not in path[len(start) :]]
    entries += [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in folders]
    return json.dumps(entries).encode()


def _about(path: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "oid": _hash(content), "size": len(content), "path": path}


def _hash(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
