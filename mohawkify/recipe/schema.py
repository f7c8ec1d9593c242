"""The schema of a recipe: everything that decides a run, as one frozen value."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Literal, Self

from pydantic import Field, create_model, model_validator

from mohawkify.recipe.messages import show

# Everything of the schema is imported from here; the part about stages only has a file of its own.
from mohawkify.recipe.stages import AlignRecipe as AlignRecipe
from mohawkify.recipe.stages import CalibrateRecipe as CalibrateRecipe
from mohawkify.recipe.stages import DistillFinalPhase as DistillFinalPhase
from mohawkify.recipe.stages import DistillRecipe as DistillRecipe
from mohawkify.recipe.stages import FinalPhase as FinalPhase
from mohawkify.recipe.stages import OrientRecipe as OrientRecipe
from mohawkify.recipe.stages import Plateau as Plateau
from mohawkify.recipe.stages import Segment as Segment
from mohawkify.recipe.stages import StageRecipe as StageRecipe
from mohawkify.recipe.stages import StagesRecipe as StagesRecipe
from mohawkify.recipe.types import (
    Count,
    KeptHeads,
    KeptLayers,
    Line,
    ListOf,
    MicroBatch,
    Name,
    Pair,
    PositiveCount,
    Scalars,
    Section,
    Share,
    Text,
    conflict,
)


class KeepRecipe(Section):
    """The teacher's attention that a hybrid keeps."""

    layers: KeptLayers = Field(
        default=(),
        description="numbers of the layers that keep all their attention; auto: those with the best scores",
    )
    number: PositiveCount | None = Field(default=None, description="how many layers auto chooses")
    share: Share | None = Field(default=None, description="the share of the layers that auto chooses, without number")
    heads: KeptHeads = Field(
        default=(),
        description="single heads that are kept beside the heads of a mixer, each as its layer and its number there, or"
        " the share of all heads that is kept: those with the best scores",
    )
    scores: Text | None = Field(
        default=None,
        description="scores.json of `mohawkify score`, for auto and shares; null: convert makes scores beside the run",
    )
    window: Annotated[int, Field(ge=2)] | None = Field(
        default=None,
        description="tokens that kept attention reaches back to, the current one included; null: as the teacher's does",
    )

    @model_validator(mode="after")
    def _choice_is_clear(self) -> Self:
        given = [key for key in ("number", "share") if getattr(self, key) is not None]
        if len(given) != (self.layers == "auto"):
            found = " and ".join(given) or "neither number nor share"
            conflict(("layers",), f"found {show(self.layers)} with {found}, expected one of both beside auto only")
        if self.scores is not None and self.layers != "auto" and not isinstance(self.heads, str):
            conflict(("scores",), "found scores, expected layers: auto or a share of heads that they choose")
        return self


class StudentRecipe(Section):
    """The student."""

    name: Name | None = Field(
        default=None, description="name of the student and of its run folder; null: the teacher's, with -mohawk"
    )
    mixer: Name = Field(
        default="discrete_mamba2",
        description="kind of the mixers: discrete_mamba2, mamba2, or one that an installed package registers",
    )
    init: Literal["calibrated", "attention", "identity"] | None = Field(
        default=None,
        description="start of the mixers: fitted to the teacher's attention on text by the stage calibrate, from the"
        " teacher's attention weights, or as published (identity); null: calibrated, or attention where the mixer has"
        " no calibrated start",
    )
    begin: Text | None = Field(
        default=None,
        description="a finished run whose student training goes on with, such as an imported one; null: a new student,"
        " with the teacher's weights and the start above",
    )
    state_size: int = Field(default=64, ge=1, le=65536, description="width of the state per head")
    conv_kernel: int = Field(default=4, ge=1, le=8, description="taps of the causal convolution")
    decay_bias: bool = Field(
        default=True,
        description="learned bias on the decay, half-lives spread over the heads; not representable in Llamba's layout",
    )
    write: Literal["plain", "decay"] | None = Field(
        default=None,
        description="what a token writes to the state: as published (plain), or multiplied by -log of its decay, as"
        " Mamba-2 does by nature (decay); null: as the mixer's kind has it",
    )
    conv_activation: Literal["none", "silu"] | None = Field(
        default=None, description="what follows the convolution; null: as the mixer's kind has it"
    )
    gated_norm: bool | None = Field(
        default=None,
        description="normalise the gated output before the output projection; null: as the mixer's kind has it",
    )
    keep: KeepRecipe = Field(default=KeepRecipe(), description="attention of the teacher that is kept: a hybrid")

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if self.begin is not None and self.init is not None:
            conflict(("init",), f"found {self.init} beside begin, expected null: the run's student is the start")
        return self

    @property
    def start(self) -> str:
        """The start of the mixers: ``init``, or the best one that the mixer has."""
        if self.begin is not None:  # whose weights take the place of any
            return "identity"
        is_plain = self.conv_activation != "silu" and not self.gated_norm and self.decay_bias
        best = "calibrated" if self.mixer == "discrete_mamba2" and is_plain else "attention"
        return self.init or best


Epochs = Annotated[int, Field(ge=1, le=1_000_000)] | None


class Condition(Section):
    """Keeps the rows of a source whose column compares true."""

    column: Text = Field(description="column that is compared")
    operator: Literal["==", "!=", "<", "<=", ">", ">=", "in"] = Field(description="comparison")
    value: Scalars = Field(description="what the column is compared with; a list for the operator in")

    @model_validator(mode="after")
    def _list_for_in(self) -> Self:
        if self.operator == "in" and not isinstance(self.value, tuple):
            conflict(("value",), f"found {show(self.value)}, expected a list for the operator in")
        if self.operator != "in" and isinstance(self.value, tuple):
            conflict(("value",), f"found a list, expected one value for the operator {self.operator}")
        return self


class Source(Section):
    """Where text comes from: exactly one of path, hub and demo."""

    path: Text | None = Field(
        default=None,
        description="file, folder or glob of .txt, .jsonl, .parquet or .arrow; teacher:FILE starts in its folder",
    )
    hub: Text | None = Field(default=None, description="dataset id on the Hugging Face Hub")
    demo: Literal["train", "validation"] | None = Field(
        default=None, description="the demo stories that come with mohawkify"
    )
    name: Text | None = Field(default=None, description="configuration of the Hub dataset")
    split: Text = Field(default="train", description="split of the Hub dataset, or of a DatasetDict on the disk")
    revision: Text | None = Field(
        default=None, description="branch, tag or commit of the Hub dataset; null: its newest state"
    )
    text: Text = Field(default="text", description="column that holds the text")
    chat: Text | None = Field(
        default=None,
        description="column that holds a conversation, written with the teacher's chat template; replaces text",
    )
    tools: Text | None = Field(
        default="tools",
        description="column with the functions of a conversation, for the template; null: not read",
    )
    documents: Text | None = Field(
        default="documents", description="column with the documents of a conversation likewise"
    )
    loss: Literal["completion", "all"] = Field(
        default="completion",
        description="of a conversation stage 3 counts the predictions of what the assistant wrote, or all; of text all",
    )
    separator: Text | None = Field(
        default="<|endoftext|>", description="where a new document begins in a .txt file; null: a file is one document"
    )
    where: ListOf[Condition] = Field(default=(), description="conditions that a row must meet, all of them")
    weight: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="share in a mixture, by tokens and relative to the other sources of its list; null: one by one",
    )

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        given = [key for key in ("path", "hub", "demo") if getattr(self, key) is not None]
        if len(given) != 1:
            conflict((), f"found {' and '.join(given) or 'none'}, expected exactly one of path, hub and demo")
        for key in ("name", "revision"):
            if self.hub is None and getattr(self, key) is not None:
                conflict((key,), f"found {show(getattr(self, key))} without hub, expected it for a Hub dataset only")
        if self.demo is not None and self.split != "train":
            conflict(("split",), f"found {show(self.split)} beside demo, expected it for hub or path only")
        return self


class DataRecipe(Section):
    """The text of a run."""

    train: ListOf[Source] = Field(default=(), description="text of all stages")
    final_phase: ListOf[Source] = Field(default=(), description="text of the end of a stage that has a final_phase")
    validation: ListOf[Source] = Field(
        default=(), description="held-out text; empty: the last documents of train are held out"
    )
    epochs: Epochs = Field(
        default=1, description="how many times the text of train is read; null: as often as the stages need"
    )
    final_phase_epochs: Epochs = Field(
        default=1, description="how many times the text of final_phase is read; null likewise"
    )
    skip_bad_rows: Count = Field(
        default=0,
        description="rows that cannot be read which are passed over and counted, at most, in each of the three texts",
    )

    @model_validator(mode="after")
    def _all_weights_or_none(self) -> Self:
        for key in ("train", "final_phase", "validation"):
            weights = [source.weight for source in getattr(self, key)]
            if None in weights and any(weights):
                index = weights.index(None)
                conflict((key, str(index)), "found no weight beside sources with one, expected all of them or none")
        return self


class OptimizerRecipe(Section):
    """AdamW."""

    betas: Pair[Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.95), description="decay rates of AdamW's two averages"
    )
    weight_decay: float = Field(
        default=0.1, ge=0, description="decoupled weight decay of the matrices that learn; vectors do not decay"
    )
    epsilon: float = Field(default=1e-8, gt=0, description="added to AdamW's denominator")
    gradient_clip: Annotated[float, Field(gt=0)] | None = Field(
        default=1.0, description="largest gradient norm; null: no clipping"
    )


class ScheduleRecipe(Section):
    """Warm-up, stable, decay."""

    warmup: float = Field(
        default=0.1, ge=0, le=1, description="fraction of a stage's steps in which the learning rate rises"
    )
    decay: float = Field(default=0.1, ge=0, le=1, description="fraction of a stage's steps in which it falls")
    floor: float = Field(default=1e-8, ge=0, description="learning rate that the decay falls towards")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.warmup + self.decay > 1:
            conflict(("decay",), f"found {self.decay} beside a warmup of {self.warmup}, expected a sum of at most 1")
        return self


class ComputeRecipe(Section):
    """How the run uses the machine; changes the result by rounding only."""

    precision: Literal["fp32", "bf16"] = Field(
        default="bf16", description="arithmetic of the forward passes; weights stay fp32"
    )
    micro_batch_sequences: MicroBatch | None = Field(
        default=None,
        description="sequences per forward pass in one process, a divisor of batch_sequences; auto: the most that a"
        " GPU's memory holds; null: all that a process has of a batch",
    )
    activation_checkpointing: bool = Field(default=False, description="recompute activations instead of keeping them")
    engine: Literal["auto", "single", "deepspeed", "fsdp"] = Field(
        default="auto",
        description="what holds weights and optimiser; auto: single in one process, in several deepspeed, or fsdp"
        " where deepspeed is not installed",
    )
    zero: Annotated[int, Field(ge=0, le=3)] | None = Field(
        default=None,
        description="stage of DeepSpeed's ZeRO: what is spread over the processes, from nothing (0) to the weights (3);"
        " null: as deepspeed_config says, else 3",
    )
    offload: Literal["none", "optimizer", "all"] | None = Field(
        default=None,
        description="what deepspeed or fsdp keeps in the CPU's memory; fsdp knows none and all; null: as"
        " deepspeed_config says, else none",
    )
    shard_teacher: bool = Field(
        default=False, description="spread the teacher over the processes, for one that does not fit on a GPU"
    )
    deepspeed_config: Text | None = Field(
        default=None, description="JSON file of further settings for DeepSpeed, which may not contradict the recipe"
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(default="auto", description="where the run computes")
    kernels: Literal["auto", "torch", "triton", "fla", "mamba-ssm"] = Field(
        default="auto",
        description="implementation of scan and stage 1 on CUDA devices; auto: Triton, and plain torch elsewhere",
    )
    threads: Annotated[int, Field(ge=1, le=4096)] | None = Field(
        default=None, description="CPU threads; null: torch decides"
    )
    data_workers: int = Field(
        default=1, ge=0, le=64, description="threads that read batches ahead; whatever their number, the same batches"
    )


class EvaluationRecipe(Section):
    """The comparison with the teacher after every stage."""

    tokens: PositiveCount = Field(default=200_000, description="held-out tokens that are used, at most")
    sequence_length: int = Field(default=2048, ge=2, description="tokens per sequence")
    batch_sequences: int = Field(default=8, ge=1, description="sequences per forward pass")
    every_tokens: PositiveCount | None = Field(
        default=None,
        description="training tokens between measurements within a stage, each on 4k of the held-out tokens at most;"
        " null: after stages only",
    )


class CheckpointRecipe(Section):
    """The checkpoints of a run."""

    every_steps: int = Field(default=500, ge=1, description="optimizer steps between checkpoints")
    keep: int = Field(default=2, ge=1, description="how many of the newest checkpoints stay")
    final: Literal["best", "last"] = Field(
        default="best", description="the student that is written: the one with the lowest KL after a stage, or the last"
    )


class Recipe(Section):
    """Everything that decides a run but the teacher."""

    name: Name = Field(description="name of the recipe")
    description: Line = Field(description="what the recipe is for")
    teacher: Text | None = Field(
        default=None, description="teacher that the recipe was made for; the command line decides"
    )
    student: StudentRecipe = Field(default=StudentRecipe(), description="the student")
    data: DataRecipe = Field(default=DataRecipe(), description="the text")
    stages: StagesRecipe = Field(description="the stages, in order")
    optimizer: OptimizerRecipe = Field(default=OptimizerRecipe(), description="AdamW")
    schedule: ScheduleRecipe = Field(default=ScheduleRecipe(), description="learning rate over a stage")
    compute: ComputeRecipe = Field(default=ComputeRecipe(), description="use of the machine")
    evaluation: EvaluationRecipe = Field(default=EvaluationRecipe(), description="comparison with the teacher")
    checkpoint: CheckpointRecipe = Field(default=CheckpointRecipe(), description="checkpoints")
    seed: int = Field(
        default=0, ge=0, le=2**32 - 1, description="seed of the start values and of the order of the text"
    )

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        blocks = self.stages.blocks()
        self._require_calibration(blocks)
        if self.compute.shard_teacher and any(
            getattr(block.final_phase, "teacher_bits", None) is not None for block in blocks.values()
        ):
            conflict(("compute", "shard_teacher"), "found true beside final_phase.teacher_bits, expected one or none")
        second = self.stages.second_teacher()
        for name, block in blocks.items():
            keys = [key for key in ("teacher", "logits") if getattr(block.final_phase, key, None) is not None]
            if second is not None and name != second[0] and keys:
                message = f"found beside that of stage {second[0]}, expected one second teacher at most"
                conflict(("stages", name, "final_phase", keys[0]), message)
        micro = self.compute.micro_batch_sequences
        for name, stage in blocks.items():
            if stage.tokens and isinstance(stage.learning_rate, float) and self.schedule.floor > stage.learning_rate:
                message = (
                    f"found {self.schedule.floor}, expected at most stages.{name}.learning_rate, {stage.learning_rate}"
                )
                conflict(("schedule", "floor"), message)
            if stage.final_phase is not None and not self.data.final_phase:
                conflict(
                    ("stages", name, "final_phase"),
                    "found without sources in data.final_phase, expected both or neither",
                )
            if isinstance(micro, int) and stage.learning_rate is not None and stage.batch_sequences % micro:
                message = f"found {micro}, expected a divisor of stages.{name}.batch_sequences, {stage.batch_sequences}"
                conflict(("compute", "micro_batch_sequences"), message)
            self._require_one_order(name, stage)
        return self

    def _require_calibration(self, blocks: Mapping[str, StageRecipe]) -> None:
        """The start ``calibrated`` and its stage belong together."""
        names = [name for name, block in blocks.items() if isinstance(block, CalibrateRecipe)]
        if len(names) > 1:
            conflict(("stages", names[1]), f"found beside {names[0]}, expected one calibration at most")
        if names and self.student.start != "calibrated":
            conflict(("stages", names[0]), f"found beside student.init: {self.student.start}, expected calibrated")
        if not names and self.student.start == "calibrated":
            conflict(("student", "init"), "found calibrated without stages.calibrate, expected both or neither")

    def longest_sequence(self, data: str) -> int:
        """Tokens of the longest sequences that the stages read of ``train`` or ``final_phase``; 0 if they read none."""
        segments = [segment for stage in self.stages.blocks().values() for segment in stage.segments()]
        return max((segment.sequence_length for segment in segments if segment.data == data), default=0)

    def _require_one_order(self, name: str, stage: StageRecipe) -> None:
        """Refuse lengths that cannot share an order where text is to be read a certain number of times."""
        places = {"train": ("sequence_length",), "final_phase": ("final_phase", "sequence_length")}
        for segment in stage.segments():
            longest = self.longest_sequence(segment.data)
            key = "epochs" if segment.data == "train" else "final_phase_epochs"
            if getattr(self.data, key) is not None and longest % segment.sequence_length:
                message = (
                    f"found {segment.sequence_length} beside {longest} on the same text, expected a divisor of it;"
                    f" or data.{key}: null, which lets some text be read again before all was read"
                )
                conflict(("stages", name, *places[segment.data]), message)


@cache
def recipe_model(stages: type[StagesRecipe]) -> type[Recipe]:
    """The schema of a recipe with these stages; see `mohawkify.recipe.stages.stages_model`."""
    if stages is StagesRecipe:
        return Recipe
    field = Field(description=Recipe.model_fields["stages"].description)
    return create_model("Recipe", __base__=Recipe, stages=(stages, field))
