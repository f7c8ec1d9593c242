"""A real pretrained Llama, converted with a small part of the recipe `stories`, comes near its teacher."""

from __future__ import annotations

import pytest

from mohawkify.recipe.loading import apply_overrides, load_recipe
from mohawkify.train.conversion import ConvertOptions
from mohawkify.train.trainer import convert

# A twentieth of the recipe's tokens; the whole recipe reaches a KL of 0.105 (docs/log.md).
SMALL = [
    "stages.orient.tokens=30k",
    "stages.align.tokens=40k",
    "stages.distill.tokens=8k",
    "stages.distill.learning_rate=5e-4",
    "evaluation.tokens=8k",
]


@pytest.mark.full
def test_a_real_llama_is_followed_after_seconds_of_training(stories_teacher, stories_text, tmp_path):
    recipe = apply_overrides(load_recipe("stories"), SMALL)
    run = convert(str(stories_teacher), recipe, ConvertOptions(output=tmp_path / "run", resume="never"))
    results = run.results()
    stages = results["stages"]
    kl = {name: row["kl"] for name, row in stages.items()}
    assert kl["init"] > kl["orient"] > kl["align"]
    assert stages["distill"]["kl"] < 0.55
    assert stages["distill"]["top1"] > 0.6
    assert stages["distill"]["perplexity"] < 1.75 * results["teacher"]["perplexity"]
