"""The rules of range tests: which rates, on how much text, and what becomes of the best."""

from __future__ import annotations

import math

import pytest

from mohawkify.planning.rules import RangeRules, RangeSize
from mohawkify.recipe.schema import DistillRecipe


def block(tokens: int, length: int = 256, batch: int = 4) -> DistillRecipe:
    return DistillRecipe(tokens=tokens, sequence_length=length, batch_sequences=batch, learning_rate="auto")


@pytest.mark.parametrize("tokens", [20_000, 34_000, 84_000, 280_000, 1_000_000, 10**8, 8 * 10**9])
def test_a_range_test_reads_a_small_share_of_its_stage(tokens: int) -> None:
    rules, stage = RangeRules(), block(tokens)
    size = rules.size(stage, 1)
    read = (size.tokens + size.sequences * size.length) * rules.usual_rates
    assert read <= 0.05 * tokens
    assert rules.fewest_steps <= size.steps <= rules.most_steps
    assert size.sequences <= stage.batch_sequences
    assert size.length <= stage.sequence_length


def test_processes_share_its_batches_evenly() -> None:
    assert RangeRules().size(block(34_000), 2).sequences == 2
    assert RangeRules().size(block(10**8, batch=6), 3) == RangeSize(steps=16, sequences=6, length=256)


def test_rates_go_up_from_the_first_and_then_down() -> None:
    up, down = RangeRules().walks()
    assert up[:4] == [1e-4, 2.2e-4, 4.6e-4, 1e-3]
    assert down[:3] == [4.6e-5, 2.2e-5, 1e-5]
    assert (max(up), min(down)) == (1e-1, 1e-6)


def test_the_best_lies_between_rates_and_grows_with_the_text() -> None:
    rules = RangeRules()
    even = {4.6e-5: 0.9, 1e-4: 0.8, 2.2e-4: 0.9}
    assert rules.best(even, 1.0, ratio=1) == 1e-4
    assert rules.best(even, 1.0, ratio=16) == 2e-4
    assert 1e-4 < rules.best({**even, 2.2e-4: 0.85}, 1.0, ratio=1) < 2.2e-4
    assert rules.best({1e-4: 0.9, 2.2e-4: math.inf}, 1.0, ratio=1) == 1e-4


def test_without_a_rate_that_helps_the_lowest_is_taken() -> None:
    assert RangeRules().best({1e-6: 1.1, 1e-5: 1.2, 1e-4: math.inf}, 1.0, ratio=10) == 1e-6
