"""Shared test settings and real material; everything heavy is made once per session."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch

# Tiny tensors: a second thread costs more than it brings, and one thread makes results repeatable to the bit.
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"


def _shared(*parts: str) -> Path:
    path = SHARED_DATA.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs ../shared/data/{'/'.join(parts)}, which is not here")
    return path


@pytest.fixture(scope="session")
def stories_teacher() -> Path:
    """The folder of a real Llama with grouped key heads, 260 k parameters."""
    return _shared("stories260k", "model")


@pytest.fixture(scope="session")
def stories_text() -> Path:
    """The folder of its training and held-out text."""
    return _shared("stories260k", "text")


@pytest.fixture(scope="session")
def teacher_configs() -> Path:
    """The folder of real config.json files of teachers people use."""
    return _shared("configs")


# By time, so that no process is left alone with a long file at the end; all other files follow in their order.
SLOWEST_FIRST = (
    "test_adapters_cli", "test_adapters_save", "test_adapters_mlx", "test_engines", "test_ranks", "test_adapters",
    "test_memory", "test_kill", "test_main", "test_device", "test_ranks_ending", "test_trust", "test_triton",
    "test_second_teacher", "test_space", "test_numbers", "test_stories", "test_huggingface", "test_mlx", "test_convert",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the slowest files to the front."""
    order = {name: index for index, name in enumerate(SLOWEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
