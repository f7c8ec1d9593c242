"""Exports to the Hub: shown, refused or uploaded, to a stand-in of it on loopback and nowhere else."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from mohawkify.exporters.card_facts import card_metadata, teacher_licence
from tests.commands import run, run_well
from tests.finished import finished_run

REPO = "someone/tiny-mohawk"


class Hub(BaseHTTPRequestHandler):
    """What an upload asks of the Hub: the repository made, modes chosen, large files stored, one commit."""

    protocol_version = "HTTP/1.1"
    requests: list[str]
    stored: dict[str, bytes]
    committed: dict[str, bytes]
    status: int

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.requests.append(f"{self.command} {self.path}")
        if self.status != 200:
            self._send(self.status, {"error": "no"})
        elif self.path == "/api/repos/create":
            self._send(200, {"url": f"{constants.ENDPOINT}/{REPO}"})
        elif self.path == "/api/validate-yaml":
            self._send(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [("lfs" if file["path"].endswith(".safetensors") else "regular") for file in files]
            answer = [
                {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
                for file, mode in zip(files, modes, strict=True)
            ]
            self._send(200, {"files": answer})
        elif self.path.endswith("/objects/batch"):
            objects = json.loads(body)["objects"]
            answer = [
                {**each, "actions": {"upload": {"href": f"{constants.ENDPOINT}/store/{each['oid']}"}}}
                for each in objects
            ]
            self._send(200, {"transfer": "basic", "objects": answer})
        elif self.path.startswith("/store/"):
            assert hashlib.sha256(body).hexdigest() == self.path.rpartition("/")[2]
            self.stored[self.path.rpartition("/")[2]] = body
            self._send(200, {})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.committed[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.committed[value["path"]] = self.stored[value["oid"]]
            self._send(200, {"commitUrl": f"{constants.ENDPOINT}/{REPO}/commit/1", "commitOid": "1"})
        else:
            self._send(404, {"error": "not found"})

    do_GET = do_POST = do_PUT = _answer

    def _send(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Quietly."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Hub]]:
    """A stand-in for the Hub that remembers what it was asked."""

    class Fresh(Hub):
        requests, stored, committed, status = [], {}, {}, 200

    server = ThreadingHTTPServer(("127.0.0.1", 0), Fresh)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", constants.ENDPOINT, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    close_session()
    yield Fresh
    close_session()
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with an export, and its teacher with a licence."""
    folder = tmp_path_factory.mktemp("runs")
    finished_run(folder / "run")
    results = json.loads((folder / "run" / "results.json").read_text())
    results["student"] = {"perplexity": 12.5, "kl": 0.25, "top1": 0.75}
    (folder / "run" / "results.json").write_text(json.dumps(results))
    recipe = folder / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace('path: "teacher:text.txt"', "hub: someone/stories"))
    teacher = folder / "run" / "teacher-folder"
    (teacher / "LICENSE").write_text("MIT License\n\nPermission is hereby granted ...\n")
    (teacher / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# A teacher\n")
    run_well("export", folder / "run", "--target", "hf")
    for name in ("README.md", "LICENSE"):
        (teacher / name).unlink()
    run_well("export", folder / "run", "--target", "hf", "--output", folder / "unlicensed")
    return folder


def test_nothing_is_sent_unless_asked_for(runs, hub):
    shown = run_well("push", runs / "run" / "exports" / "hf", "--repo", REPO)
    assert hub.requests == []
    assert "model.safetensors" in shown.stdout
    assert "license: apache-2.0" in shown.stdout
    assert shown.stdout.splitlines()[-1].startswith(f"nothing was uploaded to {REPO}: --upload does it (")


def test_an_upload_is_the_export_byte_by_byte_and_its_card_says_what_is_known(runs, hub):
    export = runs / "run" / "exports" / "hf"
    done = json.loads(run_well("push", export, "--repo", REPO, "--upload", "--json").stdout)
    assert (done["uploaded"], done["url"]) == (True, f"{constants.ENDPOINT}/{REPO}/commit/1")
    assert hub.committed.keys() == done["files"].keys()
    for name, content in hub.committed.items():
        assert len(content) == done["files"][name]
        assert name == "README.md" or content == (export / name).read_bytes()
    assert hub.committed["LICENSE"].startswith(b"MIT License")
    card = card_metadata(hub.committed["README.md"].decode())
    assert (card["license"], card["datasets"], card["library_name"]) == (
        "apache-2.0",
        ["someone/stories"],
        "transformers",
    )
    metrics = card["model-index"][0]["results"][0]["metrics"]
    assert {metric["type"]: metric["value"] for metric in metrics} == {"perplexity": 12.5, "kl": 0.25, "top1": 0.75}
    assert "## Quality" in hub.committed["README.md"].decode()


def test_a_student_of_a_teacher_of_unknown_licence_needs_one(runs, hub):
    refused = run("push", runs / "unlicensed", "--repo", REPO, "--upload")
    assert (refused.exit_code, hub.requests) == (2, [])
    assert "states no licence" in refused.stderr
    assert "--licence apache-2.0" in refused.stderr
    run_well("push", runs / "unlicensed", "--repo", REPO, "--yes", "--licence", "llama3.2")
    assert card_metadata(hub.committed["README.md"].decode())["license"] == "llama3.2"


def test_what_is_no_whole_export_is_never_uploaded(runs, hub, tmp_path, monkeypatch):
    def refused(folder: Path, says: str, code: int, repo: str = REPO) -> None:
        done = run("push", folder, "--repo", repo, "--upload")
        assert (done.exit_code, hub.requests) == (code, [])
        assert says in done.stderr.splitlines()[-2 if "hint:" in done.stderr else -1]

    refused(runs / "run", "is no export of mohawkify", 2)
    refused(runs / "run" / "final", "has no README.md", 2)
    refused(tmp_path, "is no export of mohawkify", 2)
    refused(runs / "unlicensed", "expected owner/name", 2, repo="tiny")
    for name, change in (("config.json", b"{}"), ("model.safetensors", None), ("more.txt", b"left over")):
        folder = tmp_path / name
        run_well("export", runs / "run", "--target", "hf", "--output", folder)
        if change is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(change)
        refused(folder, name, 66)
    monkeypatch.chdir(tmp_path)
    assert "no finished run" in run("push", "--repo", REPO).stderr


@pytest.mark.parametrize(("status", "says"), [(401, "hf auth login"), (403, "hf auth login"), (500, "the Hub refuses")])
def test_a_hub_that_refuses_is_one_line(runs, hub, status, says, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.status = status
    done = run("push", runs / "run" / "exports" / "hf", "--repo", REPO, "--upload")
    assert done.exit_code == 74
    assert says in done.stderr


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({}, {}),
        ({"README.md": "# no metadata"}, {}),
        (
            {"README.md": "---\nlicense: [1\n---\n", "LICENSE": "Apache License\n  Version 2.0, January 2004"},
            {"license": "apache-2.0"},
        ),
        ({"LICENSE.txt": "MIT License\n"}, {"license": "mit"}),
        (
            {"LICENSE": "LLAMA 3.2 COMMUNITY"},
            {"license": "other", "license_name": "teacher", "license_link": "LICENSE"},
        ),
        (
            {"README.md": "---\nlicense: other\nlicense_name: own\nlicense_link: L\n---\n"},
            {"license": "other", "license_name": "own", "license_link": "L"},
        ),
    ],
)
def test_the_licence_is_what_the_teachers_files_say(tmp_path, files, licence):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert teacher_licence(tmp_path) == licence
