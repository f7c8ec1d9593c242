"""The stages of a recipe: budgets, other text and another teacher at the end, when a phase has saturated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

from pydantic import Field, model_validator

from mohawkify.recipe.messages import show
from mohawkify.recipe.types import (
    Count,
    LayerParts,
    Parts,
    PositiveCount,
    Section,
    Text,
    conflict,
    format_count,
)


class FinalPhase(Section):
    """The end of a stage, on other text and at another length."""

    tokens: Count = Field(description="how many of the stage's tokens, its last, come from data.final_phase")
    sequence_length: int = Field(ge=2, description="tokens per sequence at the end of the stage")


class DistillFinalPhase(FinalPhase):
    """The end of stage 3, which may be taught by another teacher of the same vocabulary."""

    teacher: Text | None = Field(
        default=None, description="teacher of the end of the stage: a Hub id or a folder; null: the same as before"
    )
    teacher_bits: Literal[8, 4] | None = Field(
        default=None, description="bits of that teacher's weights, by bitsandbytes; null: as the precision says"
    )
    logits: Text | None = Field(
        default=None,
        description="folder written by `mohawkify cache-logits`: its logits replace running a teacher",
    )

    @model_validator(mode="after")
    def _one_teacher(self) -> Self:
        if self.teacher is not None and self.logits is not None:
            conflict(("logits",), f"found {show(self.logits)} beside a teacher, expected at most one of both")
        if self.teacher_bits is not None and self.teacher is None:
            conflict(("teacher_bits",), f"found {self.teacher_bits} without a teacher, expected both or neither")
        return self


class Plateau(Section):
    """Ends a phase of a stage early where its loss no longer falls."""

    window: PositiveCount = Field(description="tokens over which losses are averaged")
    threshold: float = Field(
        gt=0, lt=1, description="least fraction by which the average must fall from one window to the next"
    )


@dataclass(frozen=True)
class Segment:
    """A run of steps on the same text at the same length.

    Args:
        data: which sources of `DataRecipe` the steps read.
        num_steps: optimizer steps.
        sequence_length: tokens per sequence.
    """

    data: Literal["train", "final_phase"]
    num_steps: int
    sequence_length: int


class StageRecipe(Section):
    """What every stage has."""

    tokens: Count = Field(description="training tokens of the stage; 0: the stage is left out")
    sequence_length: int = Field(ge=2, description="tokens per sequence")
    batch_sequences: int = Field(ge=1, description="sequences per optimizer step")
    learning_rate: float = Field(gt=0, description="peak learning rate")
    final_phase: FinalPhase | None = Field(
        default=None, description="other text at another length for the end of the stage"
    )
    plateau: Plateau | None = Field(
        default=None, description="when the stage goes on to its end before its tokens are used up; null: never"
    )

    @model_validator(mode="after")
    def _final_phase_fits(self) -> Self:
        if self.final_phase is not None and self.final_phase.tokens > self.tokens:
            most, found = format_count(self.tokens), format_count(self.final_phase.tokens)
            conflict(("final_phase", "tokens"), f"found {found}, expected at most the stage's tokens, {most}")
        if self.plateau is not None and 2 * self.plateau.window > self.tokens:
            found, most = format_count(self.plateau.window), format_count(self.tokens // 2)
            conflict(("plateau", "window"), f"found {found}, expected at most half of the stage's tokens, {most}")
        return self

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step before the final phase."""
        return self.batch_sequences * self.sequence_length

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the stage."""
        return sum(segment.num_steps for segment in self.segments())

    def segments(self) -> list[Segment]:
        """Lists the stage's segments in order; a segment without tokens is left out, any other has a step at least."""
        final_phase_tokens = self.final_phase.tokens if self.final_phase else 0
        segments = [self._segment("train", self.tokens - final_phase_tokens, self.sequence_length)]
        if self.final_phase:
            segments.append(self._segment("final_phase", final_phase_tokens, self.final_phase.sequence_length))
        return [segment for segment in segments if segment.num_steps > 0]

    def _segment(self, data: Literal["train", "final_phase"], tokens: int, sequence_length: int) -> Segment:
        num_steps = max(1, round(tokens / (self.batch_sequences * sequence_length))) if tokens else 0
        return Segment(data, num_steps, sequence_length)


class OrientRecipe(StageRecipe):
    """Stage 1: the student's mixing matrices learn the teacher's attention matrices."""


class AlignRecipe(StageRecipe):
    """Stage 2: each layer learns the teacher's output for the teacher's input."""

    target: Literal["block", "mixer"] = Field(
        default="block", description="output that is matched: the whole block's or the mixer's"
    )
    train: LayerParts = Field(
        default=("mixer", "mlp", "norm"),
        description="parts of the layers that learn; only the mixer where that is the target",
    )


class DistillRecipe(StageRecipe):
    """Stage 3: the whole student learns the teacher's predictions."""

    final_phase: DistillFinalPhase | None = Field(
        default=None, description="other text, length or teacher for the end of the stage"
    )
    temperature: float = Field(
        default=1.0, gt=0, description="temperature of both softmaxes; the loss is multiplied by its square"
    )
    train: Parts = Field(
        default=("mixer", "mlp", "norm", "embedding", "head"), description="parts of the student that learn"
    )

    @model_validator(mode="after")
    def _temperature_fits(self) -> Self:
        if self.temperature != 1 and self.final_phase is not None and self.final_phase.logits is not None:
            conflict(("temperature",), f"found {self.temperature} beside final_phase.logits, which are kept for 1")
        return self


class StagesRecipe(Section):
    """The three stages of MOHAWK, in order."""

    orient: OrientRecipe = Field(description="stage 1, matrix orientation")
    align: AlignRecipe = Field(description="stage 2, hidden-state alignment")
    distill: DistillRecipe = Field(description="stage 3, distillation")
