"""Hybrids in memory are the hybrids that a conversion would make."""

from __future__ import annotations

import pytest
import torch

from mohawkify.analysis.hybrid import Hybrids, fits_of
from mohawkify.data.packing import Batch
from mohawkify.data.validation import EvaluationBatch
from mohawkify.distributed.process_group import World
from mohawkify.errors import RecipeError
from mohawkify.families.decoder_layers import find_layers
from mohawkify.train.calibrate import CalibrationText, calibrate, calibrations_of
from tests.tiny import tiny_pair

HEADS = ((0, 1), (1, 0), (1, 3))


def text() -> CalibrationText:
    ids = torch.randint(3, 97, (8, 2, 32), generator=torch.Generator().manual_seed(0))
    batches = [Batch(row, torch.arange(32).expand(2, -1), torch.ones_like(row, dtype=torch.bool)) for row in ids]
    return CalibrationText(len(batches), 32, lambda number: (batch for batch in batches[:number]))


def held_out() -> list[EvaluationBatch]:
    ids = torch.randint(3, 97, (2, 3, 24), generator=torch.Generator().manual_seed(1))
    valid = torch.ones(3, 24, dtype=torch.bool)
    valid[2, 17:] = False
    return [EvaluationBatch(row, valid) for row in ids]


def calibrated(family, folder, keep, change=lambda teacher: None):
    pair = tiny_pair(family, folder, init="calibrated", student={"keep": keep}, num_hidden_layers=2)
    change(pair.teacher)
    calibrate(pair, calibrations_of(pair), text(), World())
    return pair


def hybrids_of(pair) -> Hybrids:
    fits = fits_of(pair)
    calibrate(pair, fits, text(), World())
    return Hybrids(pair, fits, held_out())


def distance(pair) -> float:
    total, tokens = 0.0, 0
    with torch.no_grad():
        for batch in held_out():
            ours, theirs = (model(batch.input_ids).logits.log_softmax(-1) for model in (pair.student, pair.teacher))
            kl_bl = (theirs.exp() * (theirs - ours)).sum(-1)[:, :-1] * batch.valid[:, 1:]
            total, tokens = total + float(kl_bl.sum()), tokens + int(batch.valid[:, 1:].sum())
    return total / tokens


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_hybrid_in_memory_is_the_one_that_is_converted(family, tmp_path):
    kept = {0: (1,), 1: (0, 3)}
    pure = calibrated(family, tmp_path / "pure", {})
    expected = distance(pure)
    hybrids = hybrids_of(pure)
    assert hybrids.kl({}) == pytest.approx(expected, rel=1e-3)
    assert hybrids.kl(kept) == pytest.approx(
        distance(calibrated(family, tmp_path / "heads", {"heads": HEADS})), rel=1e-3
    )
    layer = distance(calibrated(family, tmp_path / "layer", {"layers": (1,)}))
    assert hybrids.kl({1: (0, 1, 2, 3)}) == pytest.approx(layer, rel=1e-3)
    assert hybrids.kl({0: (0, 1, 2, 3), 1: (0, 1, 2, 3)}) == pytest.approx(0.0, abs=1e-5)
    assert hybrids.kl({}) == pytest.approx(expected, rel=1e-3)


def test_the_head_that_matters_saves_most(tmp_path):
    def silence(teacher):
        """Only head 2 of layer 1 and what is next to nothing is left of attention."""
        for index, layer in enumerate(find_layers(teacher, "model.layers")):
            weight = layer.self_attn.o_proj.weight
            factor = torch.full((4,), 0.01)
            factor[2] = 3.0 if index == 1 else 0.01
            weight.mul_(factor.repeat_interleave(weight.shape[1] // 4))

    pair = tiny_pair("llama", tmp_path, init="calibrated", num_hidden_layers=2)
    silence(pair.teacher)
    calibrate(pair, calibrations_of(pair), text(), World())
    hybrids = hybrids_of(pair)
    every = [(layer, (head,)) for layer in range(2) for head in range(4)]
    saved = dict(zip(every, hybrids.savings({}, every), strict=True))
    assert max(every, key=saved.__getitem__) == (1, (2,))
    pure = hybrids.kl({})
    measured = {one: pure - hybrids.kl({one[0]: one[1]}) for one in every}
    assert max(every, key=measured.__getitem__) == (1, (2,))


def test_families_with_another_output_projection_are_refused(tmp_path):
    pair = tiny_pair("gpt2", tmp_path, init="calibrated", num_hidden_layers=2)
    with pytest.raises(RecipeError, match="found GPT-2, whose attention has no linear layer o_proj"):
        fits_of(pair)
