"""The rules of range tests: which rates, on how much text, and what becomes of the best."""

from __future__ import annotations

import math

import pytest

from mohawkify.planning.rules import RangeRules, RecipeRules
from mohawkify.recipe.schema import DistillRecipe


def block(tokens: int, length: int = 256, batch: int = 4) -> DistillRecipe:
    return DistillRecipe(tokens=tokens, sequence_length=length, batch_sequences=batch, learning_rate="auto")


@pytest.mark.parametrize("tokens", [420_000, 1_000_000, 10**8, 8 * 10**9])
def test_a_range_test_reads_a_small_share_of_its_stage(tokens: int) -> None:
    rules, stage = RangeRules(), block(tokens)
    assert tokens >= rules.least_tokens(stage.tokens_per_step)
    assert rules.cost(stage) <= 0.05
    assert rules.fewest_steps <= rules.steps(stage) <= rules.most_steps


def test_a_short_stage_is_tried_for_some_steps_all_the_same() -> None:
    rules, short = RangeRules(), block(34_000)
    assert rules.steps(short) == rules.fewest_steps, "fewer would show noise"
    assert short.tokens < rules.least_tokens(short.tokens_per_step)


def test_rates_of_short_stages_are_those_that_were_good() -> None:
    rules = RecipeRules()
    assert (rules.learning_rate("align", 64), rules.learning_rate("distill", 64)) == (2e-3, 1e-3)
    assert (rules.learning_rate("align", 576), rules.learning_rate("distill", 576)) == (5e-4, 1e-4)
    assert rules.learning_rate("distill", 4096) == pytest.approx(1e-5, rel=0.3)


def test_rates_go_up_from_the_first_and_then_down() -> None:
    up, down = RangeRules().walks()
    assert up[:4] == [1e-4, 2.2e-4, 4.6e-4, 1e-3]
    assert down[:3] == [4.6e-5, 2.2e-5, 1e-5]
    assert (max(up), min(down)) == (1e-1, 1e-6)


def test_the_best_lies_between_rates_and_grows_with_the_text() -> None:
    rules = RangeRules()
    even = {4.6e-5: 0.9, 1e-4: 0.8, 2.2e-4: 0.9}
    assert rules.best(even, 1.0, ratio=1) == 1e-4
    assert rules.best(even, 1.0, ratio=10) == 2e-4
    assert 1e-4 < rules.best({**even, 2.2e-4: 0.85}, 1.0, ratio=1) < 2.2e-4
    assert rules.best({1e-4: 0.9, 2.2e-4: math.inf}, 1.0, ratio=1) == 1e-4


def test_without_a_rate_that_helps_the_lowest_is_taken() -> None:
    assert RangeRules().best({1e-6: 1.1, 1e-5: 1.2, 1e-4: math.inf}, 1.0, ratio=10) == 1e-6
