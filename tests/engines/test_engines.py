"""Every engine does what plain torch in one process does: two real processes, real DeepSpeed, real FSDP2."""

from __future__ import annotations

from pathlib import Path

import pytest

from mohawkify.train.world import World
from tests.engines import cases
from tests.engines.processes import run_processes
from tests.tiny import save_teacher, tiny_teacher

STEPS = 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Tiny teachers: Llama with a tied head and grouped keys, Qwen2 with biases and a head of its own."""
    return {
        family: save_teacher(tiny_teacher(family), tmp_path_factory.mktemp(family)) for family in ("llama", "qwen2")
    }


@pytest.fixture(scope="module")
def alone(folders) -> dict[str, dict[str, list[list[float]]]]:
    """What plain torch in one process finds."""
    return {family: cases.run_stages(World(), "single", family, folders[family], STEPS) for family in folders}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", cases.ENGINES)
def test_two_processes_train_as_one_does(kind, family, folders, alone):
    for found in run_processes(cases.run_stages, 2, kind, family, folders[family], STEPS):
        for stage, expected in alone[family].items():
            for step, pair in enumerate(zip(found[stage], expected, strict=True)):
                assert pair[0] == pytest.approx(pair[1], rel=1e-5), f"{stage}, step {step + 1}: loss, norm"
