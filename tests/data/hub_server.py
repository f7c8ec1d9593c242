"""A small HTTP server over loopback that stands in for the Hugging Face Hub: what streaming a dataset asks of it.

It answers `api/datasets/ID` (with a revision too), `.../tree/REVISION`, `.../paths-info/REVISION` and
`datasets/ID/resolve/REVISION/PATH` with byte ranges. Anything else is not found, as on the Hub. Faults are asked for by
path: a file that breaks off in the middle, a server that is busy, a dataset that is gated.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """The state of the server.

    Args:
        datasets: by id the files of each dataset by path.
        gated: ids that answer 403, for lack of access, and those that answer 401, for lack of a login.
        requests: method and path of every request.
        fault: asked before a file is sent: (path, first byte, its how-manieth request) to how many bytes are sent
            before the line breaks, a status to answer instead, or None.
        commit: of every dataset.
    """

    datasets: dict[str, dict[str, bytes]]
    gated: dict[str, int] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    fault: Callable[[str, int, int], int | str | None] = lambda path, first, number: None
    commit: str = COMMIT
    endpoint: str = ""
    sent: dict[str, int] = field(default_factory=dict)


@contextmanager
def hub_server(hub: Hub) -> Iterator[Hub]:
    """Serve a hub until the block ends; its endpoint is filled in."""

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer()

    def log_message(self, *arguments: Any) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        match = re.fullmatch(r"/api/datasets/([\w.-]+/[\w.-]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?", path)
        file = re.fullmatch(r"/datasets/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path)
        name = match[1] if match else file[1] if file else ""
        if name in self.hub.gated:
            status = self.hub.gated[name]
            code = "GatedRepo" if status == 403 else "RepoNotFound"
            self._json(status, {"error": "no access"}, {"X-Error-Code": code})
        elif name not in self.hub.datasets:
            self._json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif match:
            self._api(name, match[2], match[3], match[4] or "")
        else:
            assert file is not None
            self._file(self.hub.datasets[name], file[3])

    def _api(self, name: str, what: str | None, revision: str | None, path: str) -> None:
        files = self.hub.datasets[name]
        if what in (None, "revision"):
            siblings = [{"rfilename": each, "size": len(content)} for each, content in files.items()]
            sha = revision if revision and re.fullmatch("[0-9a-f]{40}", revision) else self.hub.commit
            facts = {"id": name, "sha": sha, "siblings": siblings, "private": False, "tags": []}
            self._json(200, {**facts, "lastModified": "2026-01-01T00:00:00.000Z"})
        elif what == "tree":
            self._json(200, [entry for entry in _entries(files) if _is_below(entry["path"], path)])
        else:
            wanted = set(_form(self._body, self.headers.get("Content-Type", "")))
            self._json(200, [entry for entry in _entries(files) if entry["path"] in wanted])

    def _file(self, files: dict[str, bytes], path: str) -> None:
        if path not in files:
            self._json(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        content = files[path]
        first, last = 0, len(content) - 1
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            first, last = int(asked[1]), min(int(asked[2] or last), last)
        number = self.hub.sent[path] = self.hub.sent.get(path, 0) + (self.command == "GET")
        fault = self.hub.fault(path, first, number) if self.command == "GET" else None
        if isinstance(fault, str):
            self._json(int(fault), {"error": "busy"})
            return
        part = content[first : last + 1]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.hub.commit)
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(part if fault is None else part[:fault])
            if fault is not None:
                self.close_connection = True
                self.wfile.flush()
                self.connection.shutdown(2)

    def _json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _entries(files: dict[str, bytes]) -> list[dict[str, Any]]:
    """What the tree says of files and of the folders they lie in."""
    folders = {"/".join(path.split("/")[:depth]) for path in files for depth in range(1, path.count("/") + 1)}
    found: list[dict[str, Any]] = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders]
    for path, content in files.items():
        oid = hashlib.sha1(content).hexdigest()
        found.append({"type": "file", "path": path, "size": len(content), "oid": oid})
    return found


def _is_below(path: str, folder: str) -> bool:
    return not folder or path.startswith(f"{folder}/")


def _form(body: bytes, kind: str) -> list[str]:
    """The paths of a paths-info request, as a form or as JSON."""
    if "json" in kind:
        return list(json.loads(body)["paths"])
    return [value for key, value in parse_qsl(body.decode()) if key == "paths"]
