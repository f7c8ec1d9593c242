"""One server, one teacher and one undisturbed run for all trials."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands import make_recipe, make_teacher
from tests.soak.runs import Workshop, command
from tests.soak.server import Server


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    """A teacher, a recipe, a server of processes and a run that nothing disturbs."""
    folder: Path = tmp_path_factory.mktemp("soak")
    make_teacher(folder / "tiny-llama", num_hidden_layers=2)
    make_recipe(folder)
    (folder / "logs").mkdir()
    server = Server(folder / "logs")
    begin = time.perf_counter()
    ended = server.run(folder, *command(folder / "whole"))
    seconds = time.perf_counter() - begin
    assert ended.code == 0, ended.output
    yield Workshop(server, folder, folder / "whole", seconds)
    server.close()
