"""Steps of stage 3 in which no prediction counts: batches that hold nothing but prompts."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from mohawkify.files import atomic
from mohawkify.run.checkpoint import newest_valid
from mohawkify.train import trainer
from mohawkify.train.loop import StepReport, steps
from mohawkify.train.plateau import PlateauDetector
from mohawkify.train.training_state import read_training_state
from tests.commands import make_recipe, make_teacher, run, run_well
from tests.data.test_stage_text import talker


def test_they_change_nothing_and_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    question = "a question that is longer than two sequences"
    source = talker(make_teacher(tmp_path / "teacher"), tmp_path / "chat", question, 60)
    sizes = (
        "stages.distill={tokens: 320, sequence_length: 16, batch_sequences: 1, learning_rate: 1e-3,"
        " plateau: {window: 16, threshold: 0.01}}"
    )
    options = ["--recipe", make_recipe(tmp_path), "--set", source, "--set", sizes, "--set", "seed=3"]
    options += ["--set", "stages.orient.tokens=0", "--set", "stages.align.tokens=0", "--output", tmp_path / "run"]
    weights, losses = [], []

    def watched(*arguments: Any) -> Generator[StepReport]:
        stage, engine = arguments[1:3]
        for step in steps(*arguments):
            if stage.name == "distill":
                weights.append({name: tensor.clone() for name, tensor in engine.parameters().items()})
                if len(weights) == 1:  # a checkpoint without moments: nothing has learned yet
                    os.kill(os.getpid(), signal.SIGTERM)
            yield step

    monkeypatch.setattr(trainer, "steps", watched)
    monkeypatch.setattr(PlateauDetector, "add", lambda self, loss, *more: losses.append(loss))
    assert run("convert", tmp_path / "chat", *options).exit_code == 143
    result = run_well("convert", tmp_path / "chat", *options)
    lines = [line for line in atomic.read_lines(tmp_path / "run" / "metrics.jsonl") if line["stage"] == "distill"]
    idle = [line for line in lines if line.get("idle")]
    assert lines[0] in idle
    assert 1 < len(idle) < len(lines) == len(weights) == 20
    assert not any({"loss", "kl", "gradient_norm"} & line.keys() for line in idle)
    for line, before, after in zip(lines[1:], weights, weights[1:], strict=False):
        assert all(torch.equal(before[name], after[name]) for name in before) == (line in idle)
    assert losses
    assert 0 not in losses
    saved = newest_valid(tmp_path / "run" / "checkpoints", print)
    assert saved is not None
    assert read_training_state(saved, ["distill"]).losses.num_losses == len(lines) - len(idle)
    assert f"distill: in {len(idle)} steps no prediction counted; they changed nothing" in result.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["stages"]["distill"]["idle_steps"] == len(idle)
