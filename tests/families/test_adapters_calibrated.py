"""The calibrated start of every family, on a small random model with its peculiarities on."""

from __future__ import annotations

import pytest
import torch

from mohawkify.data.packing import Batch
from mohawkify.distributed.process_group import World
from mohawkify.families.registry import adapter_names
from mohawkify.objectives.objective import model_inputs
from mohawkify.train.calibrate import CalibrationText, calibrate, calibrations_of
from tests.families.layouts import each_family
from tests.tiny import tiny_pair

LAYERS = 2


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.full), pytest.param(2, marks=pytest.mark.full)])
@pytest.mark.parametrize("family", each_family(adapter_names()))
def test_a_calibrated_start_is_nearer_to_the_teacher_than_mixers_that_add_nothing(family, seed, tmp_path):
    """With documents in one sequence, on text that the fit did not read."""
    torch.manual_seed(seed)
    pair = tiny_pair(family, tmp_path, init="calibrated", num_hidden_layers=LAYERS)
    vocabulary = pair.teacher.get_input_embeddings().num_embeddings
    ids = torch.randint(3, vocabulary, (17, 2, 32), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat([torch.arange(20), torch.arange(12)]).expand(2, -1).clone()
    batches = [Batch(row, positions, torch.ones_like(row, dtype=torch.bool)) for row in ids]
    held_out = batches.pop()

    def distance() -> float:
        with torch.no_grad():
            ours, theirs = (model(**model_inputs(model, held_out, pair.spec)).logits.log_softmax(-1)
                            for model in (pair.student, pair.teacher))  # fmt: skip
        return float((theirs.exp() * (theirs - ours)).sum(-1).mean())

    before = distance()
    text = CalibrationText(len(batches), 32, lambda number: (batch for batch in batches[:number]))
    relative = calibrate(pair, calibrations_of(pair), text, World())
    assert relative < 1.0  # of mixers that add nothing
    assert distance() < before
