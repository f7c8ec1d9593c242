"""The stages of a recipe: an ordered mapping from names to blocks, and the model of each block by its objective."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any, ClassVar, Literal, Self, cast

from pydantic import ConfigDict, Field, create_model, model_validator

from mohawkify.recipe.messages import show
from mohawkify.recipe.types import (
    Count,
    LayerParts,
    LearningRate,
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
        data: the sources of `DataRecipe` that the steps read.
        num_steps: optimizer steps.
        sequence_length: tokens per sequence.
    """

    data: Literal["train", "final_phase"]
    num_steps: int
    sequence_length: int

    @property
    def length_key(self) -> str:
        """Where a stage's block has the length."""
        return "sequence_length" if self.data == "train" else "final_phase.sequence_length"


class StageRecipe(Section):
    """The keys of every stage.

    A subclass narrows ``objective`` to its own name; ``plans_as`` is the standard stage that it resembles in a plan.
    """

    plans_as: ClassVar[Literal["calibrate", "orient", "align", "distill"]] = "distill"

    objective: str = Field(description="registered objective whose loss the stage minimises")
    tokens: Count = Field(description="training tokens of the stage; 0: the stage is left out")
    sequence_length: int = Field(ge=2, description="tokens per sequence")
    batch_sequences: int = Field(ge=1, description="sequences per optimizer step")
    learning_rate: LearningRate = Field(
        description="peak learning rate; auto: found by a short range test when the stage begins"
    )
    final_phase: FinalPhase | None = Field(
        default=None, description="other text at another length for the end of the stage"
    )
    plateau: Plateau | None = Field(
        default=None, description="when the stage goes on to its end before its tokens are used up; null: never"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.final_phase is not None and self.final_phase.tokens > self.tokens:
            found, most = format_count(self.final_phase.tokens), format_count(self.tokens)
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


class CalibrateRecipe(StageRecipe):
    """Before stage 1: the mixers are fitted to attention on text, in closed form."""

    plans_as = "calibrate"

    objective: Literal["closed_form"] = Field(default="closed_form", description="sums over text, and one solution")
    tokens: PositiveCount = Field(default=16_384, description="tokens of text that the sums are taken over")
    sequence_length: int = Field(default=256, ge=2, description="tokens per sequence")
    batch_sequences: int = Field(default=4, ge=1, description="sequences per forward pass")
    learning_rate: None = Field(default=None, description="none: there are no gradients")  # type: ignore[assignment]
    final_phase: None = Field(default=None, description="none")
    plateau: None = Field(default=None, description="none")


class OrientRecipe(StageRecipe):
    """Stage 1: the student's mixing matrices learn the teacher's attention matrices."""

    plans_as = "orient"

    objective: Literal["matrix"] = Field(default="matrix", description="loss: distance of mixing matrices")
    weighting: Literal["none", "values"] = Field(
        default="none",
        description="weight of the matrices' columns; values: the length of each token's value, so that attention to"
        " tokens without content counts little",
    )


class AlignRecipe(StageRecipe):
    """Stage 2: each layer learns the teacher's output for the teacher's input."""

    plans_as = "align"

    objective: Literal["hidden_state"] = Field(default="hidden_state", description="loss: distance of hidden states")

    target: Literal["block", "mixer"] = Field(
        default="block", description="output that is matched: the whole block's or the mixer's"
    )
    train: LayerParts = Field(
        default=("mixer", "mlp", "norm"),
        description="parts of the layers that learn; only the mixer where that is the target",
    )


class DistillRecipe(StageRecipe):
    """Stage 3: the whole student learns the teacher's predictions."""

    objective: Literal["logits"] = Field(default="logits", description="loss: cross-entropy of predictions")

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


class _Stages(Section):
    """Stages by name, in the order in which they run."""

    def blocks(self) -> dict[str, StageRecipe]:
        """The stages' blocks by name, in order."""
        return {name: getattr(self, name) for name in type(self).model_fields}

    def second_teacher(self) -> tuple[str, DistillFinalPhase] | None:
        """The stage whose final phase a second teacher or its logits teach, and that phase; None where none does."""
        for name, block in self.blocks().items():
            phase = block.final_phase
            if isinstance(phase, DistillFinalPhase) and phase.tokens and (phase.teacher or phase.logits) is not None:
                return name, phase
        return None


class StagesRecipe(_Stages):
    """The stages in order: the three of MOHAWK, and others with an ``objective`` of their own."""

    orient: OrientRecipe = Field(description="stage 1, matrix orientation")
    align: AlignRecipe = Field(description="stage 2, hidden-state alignment")
    distill: DistillRecipe = Field(description="stage 3, distillation")


STANDARD_OBJECTIVES = {"orient": "matrix", "align": "hidden_state", "distill": "logits"}
OBJECTIVE_OF_NAME = {"calibrate": "closed_form", **STANDARD_OBJECTIVES}  # where a block names none
ENTRY_POINTS = "mohawkify.objectives"  # the group in which packages name the modules that register objectives
_BLOCKS: dict[str, type[StageRecipe]] = {
    "closed_form": CalibrateRecipe,
    "matrix": OrientRecipe,
    "hidden_state": AlignRecipe,
    "logits": DistillRecipe,
}
_RESERVED = {"init", *dir(_Stages)}  # the measurement before all stages, and names of attributes
_MOST_STAGES = 16


def register_stage_block(objective: str, block: type[StageRecipe]) -> None:
    """Register the model that stages with an objective have in a recipe."""
    _BLOCKS[objective] = block
    _unknown_block.cache_clear()


def stage_block(objective: str) -> type[StageRecipe] | None:
    """The model of an objective's block; loads the package that registers it, where one is installed."""
    if objective not in _BLOCKS:
        for entry in entry_points(group=ENTRY_POINTS, name=objective):
            entry.load()
    return _BLOCKS.get(objective)


def stages_model(stages: Any) -> type[StagesRecipe]:
    """The schema of a recipe's stages: a field for every key that names a stage, in the order of the keys.

    A stage of the objective ``closed_form`` comes first.

    Args:
        stages: the value of ``stages``, unchecked. Its other keys are left to the schema, which refuses them.
    """
    if not isinstance(stages, dict):
        return StagesRecipe
    blocks: dict[str, type[StageRecipe]] = {}
    for name, block in list(stages.items())[:_MOST_STAGES]:
        objective = objective_of(name, block)
        if objective is not None and _is_stage_name(name):
            blocks[name] = (stage_block(objective) if isinstance(objective, str) else None) or _unknown_block()
    for name, objective in STANDARD_OBJECTIVES.items():
        blocks.setdefault(name, _BLOCKS[objective])
    # A calibration is of the start, wherever its key stands: an override adds it behind the others.
    ordered = sorted(blocks.items(), key=lambda item: item[1] is not CalibrateRecipe)
    return _stages_model(tuple(ordered))


def objective_of(name: Any, block: Any) -> Any:
    """The objective of an unchecked block: its own, or the one that its name stands for."""
    objective = block.get("objective") if isinstance(block, dict) else None
    return OBJECTIVE_OF_NAME.get(name) if objective is None else objective


def _is_stage_name(name: Any) -> bool:
    """Whether a key can name a field of the schema; pydantic keeps names like ``_x`` and ``model_x`` for itself."""
    is_name = isinstance(name, str) and name.isidentifier() and name not in _RESERVED
    return is_name and not name.startswith(("_", "model_"))


@cache
def _stages_model(blocks: tuple[tuple[str, type[StageRecipe]], ...]) -> type[StagesRecipe]:
    standard = StagesRecipe.model_fields
    if blocks == tuple((name, field.annotation) for name, field in standard.items()):
        return StagesRecipe
    fields: dict[str, Any] = {
        name: (block, Field(description=standard[name].description if name in standard else "a further stage"))
        for name, block in blocks
    }
    return cast("type[StagesRecipe]", create_model("StagesRecipe", __base__=_Stages, **fields))


class _AnyKeys(StageRecipe):
    model_config = ConfigDict(extra="ignore")


@cache
def _unknown_block() -> type[StageRecipe]:
    """The model of a block whose objective is not registered: refuses that, and no other key with it."""
    objectives: Any = Literal[tuple(_BLOCKS)]
    field = Field(description=StageRecipe.model_fields["objective"].description)
    return cast("type[StageRecipe]", create_model("StageRecipe", __base__=_AnyKeys, objective=(objectives, field)))
