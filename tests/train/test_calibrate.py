"""The calibrated start of a hybrid."""

from __future__ import annotations

import torch

from mohawkify.data.packing import Batch
from mohawkify.distributed.process_group import World
from mohawkify.mixers.kinds import mixers_of
from mohawkify.train.calibrate import CalibrationText, calibrate, calibrations_of
from tests.tiny import packed, tiny_pair


def calibrated(folder, keep):
    """The student, and the distance of its mixing from attention, layer by layer as one number."""
    pair = tiny_pair("llama", folder, init="calibrated", student={"keep": keep}, num_hidden_layers=2)
    ids = torch.randint(3, 97, (8, 2, 32), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(20), torch.arange(12)]).expand(2, -1).clone()
    batches = [Batch(row, positions, torch.ones_like(row, dtype=torch.bool)) for row in ids]
    text = CalibrationText(len(batches), 32, lambda number: (batch for batch in batches[:number]))
    return pair, calibrate(pair, calibrations_of(pair), text, World())


def test_the_fit_knows_the_heads_that_are_kept(tmp_path):
    _, pure = calibrated(tmp_path / "pure", {})
    pair, two = calibrated(tmp_path / "two", {"heads": ((0, 1), (0, 2), (1, 0), (1, 3))})
    _, three = calibrated(tmp_path / "three", {"heads": ((0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 3))})
    assert three < 0.9 * two < 0.81 * pure
    # The error that was reported is that of the sum of both parts.
    attentions = [layer.self_attn for layer in pair.teacher.model.layers]
    assert len(mixers_of(pair.student)) == len(attentions)
    own = [layer.self_attn for layer in pair.student.model.layers]
    assert all(module.attention.o_proj.weight.shape == (32, 16) for module in own)
    before = tiny_pair("llama", tmp_path / "before", init="calibrated", student={"keep": {"heads": ((0, 1), (0, 2))}})
    left = before.student.model.layers[0].self_attn.attention
    assert torch.equal(left.q_proj.weight, own[0].attention.q_proj.weight)
    assert not torch.equal(left.o_proj.weight, own[0].attention.o_proj.weight)
    with torch.no_grad():
        logits = pair.student(input_ids=packed().input_ids).logits
    assert logits.isfinite().all()
