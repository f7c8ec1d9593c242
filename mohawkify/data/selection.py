"""Which text a recipe means: what every stage reads, and what is held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mohawkify.data.corpus import Corpus, build_corpus, hold_out
from mohawkify.data.evaluation import evaluation_rows
from mohawkify.data.files import find_files
from mohawkify.recipe import Recipe, Source, StageRecipe, StagesRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def stage_recipes(recipe: Recipe) -> dict[str, StageRecipe]:
    """The recipe's stages by name, in order."""
    return {name: getattr(recipe.stages, name) for name in StagesRecipe.model_fields}


def tokens_to_read(recipe: Recipe) -> dict[str, int]:
    """How many tokens all stages together read of ``train`` and of ``finish``."""
    tokens = {"train": 0, "finish": 0}
    for stage in stage_recipes(recipe).values():
        for segment in stage.segments():
            tokens[segment.data] += segment.num_steps * segment.sequence_length * stage.batch_sequences
    return tokens


@dataclass(frozen=True)
class TextReader:
    """Reads the text of a recipe with a teacher's tokenizer; what was tokenised once is used again.

    Args:
        recipe: names the sources and the budgets.
        tokenizer: the teacher's.
        directory: where tokenised text is kept.
        teacher_directory: the folder that ``teacher:`` paths start from.
        vocab_size: every token id must be below.
    """

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    directory: Path
    teacher_directory: Path
    vocab_size: int

    def require_files(self) -> None:
        """Look for every local file the recipe names, before anything slow; raises DataError for a missing one."""
        for sources in (self.recipe.data.train, self.recipe.data.finish, self.recipe.data.validation):
            for source in sources:
                if source.path is not None:
                    find_files(source.path, self.teacher_directory)

    def training(self) -> dict[str, Corpus]:
        """The corpora that the stages read: ``train``, and ``finish`` where a stage has one."""
        wanted = tokens_to_read(self.recipe)
        if self.recipe.data.validation:
            corpora = {"train": self._build(self.recipe.data.train, max(wanted["train"], 1))}
        else:
            corpora = {"train": self._split_train()[0]}
        if wanted["finish"]:
            corpora["finish"] = self._build(self.recipe.data.finish, wanted["finish"])
        return corpora

    def held_out(self) -> list[np.ndarray]:
        """The rows of text that students are measured on; see `evaluation_rows`."""
        evaluation, sources = self.recipe.evaluation, self.recipe.data.validation
        corpus = self._build(sources, evaluation.tokens) if sources else self._split_train()[1]
        return evaluation_rows(corpus, sequence_length=evaluation.sequence_length, num_tokens=evaluation.tokens)

    def _split_train(self) -> tuple[Corpus, Corpus]:
        """The training text and, from its end, the held-out text that the recipe does not name."""
        held = self.recipe.evaluation.tokens
        return hold_out(self._build(self.recipe.data.train, tokens_to_read(self.recipe)["train"] + held), held)

    def _build(self, sources: Sequence[Source], num_tokens: int) -> Corpus:
        return build_corpus(
            sources,
            self.tokenizer,
            directory=self.directory,
            num_tokens=num_tokens,
            teacher_directory=self.teacher_directory,
            vocab_size=self.vocab_size,
        )
