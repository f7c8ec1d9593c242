"""A run and an MLX export behind the interface of OpenAI, asked by OpenAI's own client on loopback."""

from __future__ import annotations

import os
import queue
import re
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mohawkify.errors import CheckpointError, UsageError
from mohawkify.files.atomic import atomic_directory
from mohawkify.serving.served import find_served, serve
from tests.commands import run
from tests.finished import scripted_run

openai = pytest.importorskip("openai", reason="needs the extra `serve`")
pytest.importorskip("fastapi", reason="needs the extra `serve`")

ANSWER = "Hi ther."
ENDLESS = "ab\n"


class Server:
    """A model served in a thread, and a client for it."""

    def __init__(self, path: Path) -> None:
        said: queue.Queue[str] = queue.Queue()
        threading.Thread(target=serve, args=(find_served(path), "127.0.0.1", 0, said.put), daemon=True).start()
        self.name, self.engine, self.url = re.findall(
            r"(\S+) by (\w+) on (http://127\.0\.0\.1:\d+/v1)", said.get(timeout=60)
        )[0]
        self.client = openai.OpenAI(base_url=self.url, api_key="none", max_retries=6, timeout=120)

    def chat(self, **more: Any) -> Any:
        messages = more.pop("messages", [{"role": "user", "content": "Hello"}])
        return self.client.chat.completions.create(**{"model": self.name, "messages": messages, **more})

    def refused(self, **more: Any) -> str:
        with pytest.raises(openai.APIStatusError) as caught:
            self.chat(**more)
        assert 400 <= caught.value.status_code < 500
        return str(caught.value)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs whose students give one answer, and one that never ends."""
    folder = tmp_path_factory.mktemp("runs")
    scripted_run(folder / "brief", ANSWER)
    scripted_run(folder / "endless", ENDLESS)
    return folder


@pytest.fixture(scope="module", params=["transformers", "mlx"])
def servers(request: pytest.FixtureRequest, runs: Path) -> Iterator[dict[str, Server]]:
    """Both students behind a server."""
    with pytest.MonkeyPatch.context() as patch:
        yield from started_servers(request, runs, patch)


def started_servers(
    request: pytest.FixtureRequest, runs: Path, patch: pytest.MonkeyPatch
) -> Iterator[dict[str, Server]]:
    paths = {name: runs / name for name in ("brief", "endless")}
    if request.param == "mlx":
        pytest.importorskip("mlx_lm", reason="needs mlx-lm: pip install 'mohawkify[mlx]'")
        for name, path in paths.items():
            if not (path / "exports" / "mlx").exists():
                done = run("export", path, "--target", "mlx")
                assert done.exit_code == 0, done.stderr
            paths[name] = path / "exports" / "mlx"
    generators: list[Any] = []
    if request.param == "mlx":
        from mlx_lm import server as mlx

        class Kept(mlx.ResponseGenerator):
            def __init__(self, *args: Any) -> None:
                generators.append(self)
                super().__init__(*args)

        patch.setattr(mlx, "ResponseGenerator", Kept)
    started = {name: Server(path) for name, path in paths.items()}
    assert {server.engine for server in started.values()} == {request.param}
    yield started
    for generator in generators:  # whose threads would outlive the tests
        generator.stop_and_join()


def test_the_real_client_gets_answers(servers):
    server = servers["brief"]
    assert [model.id for model in server.client.models.list()] == [server.name]
    answer = server.chat()
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (ANSWER, "stop")
    assert answer.usage.completion_tokens in (len(ANSWER), len(ANSWER) + 1)  # engines count the end, or do not
    done = server.client.completions.create(model=server.name, prompt="Say\n", max_tokens=5)
    assert (done.choices[0].text, done.choices[0].finish_reason) == (ANSWER[:5], "length")


def test_answers_come_piece_by_piece(servers):
    server = servers["brief"]
    chunks = list(server.chat(stream=True))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert ("".join(pieces), len(pieces) > 2) == (ANSWER, True)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    texts = [
        part.choices[0].text for part in server.client.completions.create(model=server.name, prompt="\n", stream=True)
    ]
    assert "".join(texts) == ANSWER


def test_two_clients_at_once_get_their_own_answers(servers):
    server = servers["brief"]
    answers: dict[int, str] = {}

    def ask(number: int) -> None:
        prompt = ("Say\n", "H")[number % 2]
        done = server.client.completions.create(model=server.name, prompt=prompt, max_tokens=20)
        answers[number] = done.choices[0].text

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {0: ANSWER, 1: ANSWER[1:], 2: ANSWER, 3: ANSWER[1:]}


def test_a_broken_request_is_refused_and_the_next_one_answered(servers):
    server = servers["brief"]
    for wrong in (
        {"messages": 3},
        {"model": "/etc"},
        {"extra_body": {"max_tokens": "many"}},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/"}}]}
            ]
        },
    ):
        server.refused(**wrong)
    if server.engine == "transformers":
        assert "has no messages" in server.refused(messages=[])
        assert "pinned to" in server.refused(model="other")
        assert "expected at least 1" in server.refused(max_tokens=0)
        assert "chat_template_kwargs" in server.refused(extra_body={"chat_template_kwargs": {"chat_template": "x"}})
        assert "generation_config" in server.refused(extra_body={"generation_config": "{}"})
        for path in ("/../load_model", "/../reset", "/responses", "/../docs"):
            with pytest.raises(openai.NotFoundError):
                server.client.post(path, body={}, cast_to=object)
    assert server.chat().choices[0].message.content == ANSWER


def test_a_cancelled_stream_frees_the_model(servers):
    server = servers["endless"]
    stream = server.chat(stream=True, max_tokens=1_000_000)
    seen = "".join(chunk.choices[0].delta.content or "" for chunk, _ in zip(stream, range(20), strict=False))
    assert seen.startswith("ab\nab\n")
    stream.close()
    assert server.chat(max_tokens=6).choices[0].message.content == "ab\nab\n"


def test_sampling_is_by_the_request(servers):
    server = servers["endless"]
    if server.engine == "mlx":
        pytest.skip("mlx-lm compiles its sampler for half a minute on CPUs; the settings are its own")
    hot = server.chat(max_tokens=30, temperature=2.0, seed=1).choices[0].message.content
    assert hot != "ab\n" * 10
    assert server.chat(max_tokens=30, temperature=0).choices[0].message.content == "ab\n" * 10


def test_what_cannot_be_served_is_one_line(runs, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="no such run"):
        find_served(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UsageError, match="expected a run or an export of mohawkify"):
        find_served(tmp_path)
    done = run("export", runs / "brief", "--target", "hf", "--output", tmp_path / "hf")
    assert done.exit_code == 0, done.stderr
    assert find_served(tmp_path / "hf").engine == "transformers"
    weights = tmp_path / "hf" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors has changed"):
        find_served(tmp_path / "hf")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused = run("serve", runs / "brief", "--port", taken.getsockname()[1])
    assert (refused.exit_code, "hint: choose another --port" in refused.stderr) == (2, True)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    missing = run("serve", runs / "brief")
    assert missing.exit_code == 69
    assert missing.stderr.splitlines()[-1] == 'hint: pip install "mohawkify[serve]"'


def test_an_export_of_a_stock_type_is_handed_to_vllm_where_that_is_installed(tmp_path, monkeypatch):
    with atomic_directory(tmp_path / "granite") as folder:
        (folder / "config.json").write_text('{"model_type": "granitemoehybrid"}')
    assert find_served(tmp_path / "granite").engine == "transformers"
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\nexit 3\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    served = find_served(tmp_path / "granite")
    lines: list[str] = []
    with pytest.raises(UsageError, match="`vllm serve` ended with exit code 3"):
        serve(served, "127.0.0.1", 0, lines.append)
    port = re.findall(r":(\d+)/v1", lines[0])[0]
    arguments = f"serve {tmp_path}/granite --host 127.0.0.1 --port {port} --served-model-name granite"
    assert (tmp_path / "called").read_text().split() == arguments.split()
