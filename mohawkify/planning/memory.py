"""Memory of a conversion on one GPU, part by part, and what to change where it does not fit. No torch here.

Everything is a formula over a few frozen values: how training is laid out over GPUs (`Layout`), how large the models
are (`Sizes`), and what one layer takes on its way (`Footprint`). docs/plan.md explains every term.

Letters: P parameters of the student, T those a stage trains, N GPUs, b sequences of a micro-batch, l their length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

from mohawkify.ops.constants import band_rows, chunk_tokens
from mohawkify.student.student_spec import StudentSpec
from mohawkify.teacher.teacher_spec import TeacherSpec

STAGES = ("orient", "align", "distill")
FP32, BF16, FP64 = 4, 2, 8  # bytes
MOMENTS = 2 * FP32  # of AdamW, bytes per parameter
# The parts of a plan in the order they are printed.
PARTS = ("teacher", "weights", "gradients", "optimizer", "buffers", "activations", "loss")

WHOLE_LOGITS = 7  # matrices of tokens by vocabulary in float32 without chunks
CHUNKS = 3  # student's and teacher's log-probabilities, and probabilities
# DeepSpeed's defaults, in numbers: the buffer that gradients are reduced in, and the parameters ZeRO-3 keeps gathered.
REDUCE_BUCKET, MOST_GATHERED = 5 * 10**8, 10**9


@dataclass(frozen=True)
class Layout:
    """How training is laid out over GPUs.

    Args:
        engine: ``single``, ``deepspeed`` or ``fsdp``.
        zero: stage of ZeRO, with DeepSpeed.
        num_gpus: N, GPUs that share the work, each with micro-batches of its own.
        offload: what is kept in the memory of the CPU: ``none``, ``optimizer`` or ``all``.
        precision: ``fp32`` or ``bf16``, of forward and backward passes; weights stay float32.
        micro_batch: b, sequences per forward pass on one GPU.
        checkpointing: whether layers keep their input only, and are computed again for their gradients.
        shard_teacher: whether the GPUs share the teacher's layers too.
    """

    engine: str = "single"
    zero: int = 0
    num_gpus: int = 1
    offload: str = "none"
    precision: str = "bf16"
    micro_batch: int = 1
    checkpointing: bool = False
    shard_teacher: bool = False

    @property
    def number_bytes(self) -> int:
        """Bytes of a number in the precision."""
        return BF16 if self.precision == "bf16" else FP32


@dataclass(frozen=True)
class Footprint:
    """The memory of one sequence of a stage's greatest length, in bytes, beside weights and their gradients.

    Args:
        parts: stage 1: when B, C and decay of a layer are there and their loss begins, the teacher's side included.
        orient: stage 1: at most, while they are differentiated.
        align: stage 2: at most, in a layer of student and teacher, there and back.
        entering: stage 3: a layer's input.
        ends: stage 3: kept outside of the layers.
        kept: stage 3: kept by a layer from its forward to its backward pass, its output included.
        passing: stage 3: at most, beside what is kept, while a layer is differentiated.
        teacher: stage 3: at most, in the teacher's own forward pass.
        counted: whether the family's code was run to count it, or a rule of thumb stands in.
    """

    parts: float
    orient: float
    align: float
    entering: float
    ends: float
    kept: float
    passing: float
    teacher: float
    counted: bool


@dataclass(frozen=True)
class Sizes:
    """The sizes of teacher and student, and of one stage, that memory depends on.

    Args:
        stage: ``calibrate``, ``orient``, ``align`` or ``distill``.
        length: l, its greatest.
        trained_parts: parameters that the stage trains, by part.
        whole_logits: whether stage 3 makes all logits at once, as in families with an unknown head.
        sums_bytes: what a calibration adds up at most.
        working_bytes: what one sequence takes in a layer of a calibration, at most.
    """

    stage: str
    length: int
    teacher: TeacherSpec
    student_spec: StudentSpec
    trained_parts: dict[str, int]
    whole_logits: bool = False
    sums_bytes: int = 0
    working_bytes: int = 0

    @property
    def student(self) -> int:
        """P."""
        return self.student_spec.num_parameters

    @property
    def trained(self) -> int:
        """T."""
        return sum(self.trained_parts.values())

    @property
    def trained_ends(self) -> int:
        """Those among T that are in the head."""
        embedding = self.trained_parts.get("embedding", 0) if self.teacher.tie_word_embeddings else 0
        return self.trained_parts.get("head", 0) + embedding

    @property
    def ends(self) -> int:
        """Parameters of embedding and head, which every GPU has."""
        return ends_of(self.teacher)

    @property
    def layer(self) -> int:
        """Parameters of a layer."""
        return (self.student - self.ends) // self.teacher.num_hidden_layers

    @property
    def mixer(self) -> int:
        """Parameters of one mixer."""
        return self.student_spec.mixer_parameters // len(self.student_spec.mixer_layers)

    @property
    def num_layers(self) -> int:
        """Layers that the stage goes through."""
        return self.teacher.num_hidden_layers if self.stage == "distill" else len(self.student_spec.mixer_layers)

    @property
    def matrices(self) -> int:
        """Weights of products that the stage computes with, beside the head."""
        if self.stage == "orient":
            return self.trained
        if self.stage == "align" and set(self.trained_parts) == {"mixer"}:
            return self.student_spec.mixer_parameters
        return (self.student - self.ends) * self.num_layers // self.teacher.num_hidden_layers


def ends_of(teacher: TeacherSpec) -> int:
    """Parameters of a teacher's embedding and head."""
    return teacher.embedding_parameters + (0 if teacher.tie_word_embeddings else teacher.head_parameters)


def rule_of_thumb(teacher: TeacherSpec, student: StudentSpec, precision: str, lengths: dict[str, int]) -> Footprint:
    """A footprint from sizes alone, for families whose code cannot be counted, and where seconds matter.

    The numbers per token are those counted on Llamas: 22 of the model's width in a mixer and the norms, 4 of the width
    of an MLP that one token meets. Other families are off by up to a third.
    """
    number = BF16 if precision == "bf16" else FP32
    tokens = {stage: float(lengths[stage]) for stage in STAGES}
    features = student.num_heads * (student.head_dim + 2 * student.state_size)
    mlp = (teacher.active_parameters - ends_of(teacher) - teacher.attention_parameters) / teacher.num_hidden_layers
    wide = mlp / (3 * teacher.hidden_size)
    scan = 4.0 * features * FP32
    layer = 5 * teacher.hidden_size * FP32 + 4 * features * number + scan + 4 * wide * number
    mixing = student.num_heads * student.state_size
    around = 8 * teacher.hidden_size * number
    return Footprint(
        parts=tokens["orient"] * (around + 12 * mixing * number),
        orient=tokens["orient"] * (around + 18 * mixing * number),
        align=tokens["align"] * (around + 1.1 * layer),
        entering=tokens["distill"] * teacher.hidden_size * FP32,
        ends=tokens["distill"] * 3 * teacher.hidden_size * FP32,
        kept=tokens["distill"] * layer,
        passing=tokens["distill"] * 0.15 * layer,
        teacher=tokens["distill"] * (around + 3 * wide * number),
        counted=False,
    )


def memory_parts(sizes: Sizes, layout: Layout, footprint: Footprint) -> dict[str, int]:
    """Bytes on one GPU at the fullest moment of a step, by part.

    Returns:
        Bytes by the names in `PARTS`; their sum is the most that is in use. The fused optimiser's step adds nothing.
    """
    parts = {**dict.fromkeys(PARTS, 0.0), "teacher": _teacher(sizes, layout), **_student(sizes, layout)}
    if sizes.stage == "calibrate":  # in every process a whole student, in no engine, beside copies of the attention
        parts |= {"weights": float(FP32 * sizes.student), "gradients": 0.0, "optimizer": 0.0}
        parts["buffers"] = float(FP32 * sizes.teacher.attention_parameters + sizes.sums_bytes)
        moving = float(layout.micro_batch * sizes.working_bytes), 0.0
    elif sizes.stage == "align":
        moving = layout.micro_batch * footprint.align, 0.0
    else:
        moving = (_orient if sizes.stage == "orient" else _distill)(sizes, layout, footprint)
    parts["activations"], parts["loss"] = moving
    return {name: ceil(parts[name]) for name in PARTS}


def largest_micro_batch(
    sizes: Sizes, layout: Layout, footprint: Footprint, usable_bytes: int, batch_sequences: int
) -> int:
    """The largest micro-batch that fits: a divisor of one GPU's share of the batch; 0 where not even one sequence fits.

    Args:
        layout: how training is laid out; its own micro-batch does not count.
        usable_bytes: memory of a GPU that may be filled.
        batch_sequences: sequences of a step on all GPUs.
    """
    share = batch_sequences // layout.num_gpus
    for micro in sorted((size for size in range(1, share + 1) if share % size == 0), reverse=True):
        if sum(memory_parts(sizes, replace(layout, micro_batch=micro), footprint).values()) <= usable_bytes:
            return micro
    return 0


@dataclass(frozen=True)
class Remedy:
    """Something to change so that less memory is needed.

    Args:
        kind: of a kind, the last one that is applied counts.
    """

    kind: str
    words: str
    layout: Layout

    def fields(self, before: Layout) -> dict[str, Any]:
        """The changed layout."""
        values = asdict(self.layout)
        return {name: value for name, value in values.items() if value != getattr(before, name)}


def remedies(layout: Layout) -> Iterator[Remedy]:
    """Yields what could be changed, the cheapest first."""
    if not layout.checkpointing:
        yield Remedy("checkpointing", "activation checkpointing", replace(layout, checkpointing=True))
    micro = layout.micro_batch // 2
    while micro:
        yield Remedy("micro", f"micro-batches of {micro}", replace(layout, micro_batch=micro))
        micro //= 2
    if layout.engine == "deepspeed":
        for zero in range(layout.zero + 1, 4):
            yield Remedy("zero", f"ZeRO-{zero}", replace(layout, zero=zero))
        if layout.num_gpus > 1:  # it keeps no float32 copy of the weights beside the moments
            yield Remedy("engine", "FSDP instead of DeepSpeed", replace(layout, engine="fsdp", zero=0))
    shards = layout.engine == "fsdp" or layout.zero > 0
    able = layout if shards else replace(layout, engine="deepspeed", zero=3)
    with_engine = "" if shards else "with DeepSpeed, ZeRO-3, "
    for num_gpus in (2, 4, 8, 16):
        if num_gpus > layout.num_gpus:
            words = f"{num_gpus} GPUs" if shards else f"{num_gpus} GPUs with DeepSpeed, ZeRO-3"
            yield Remedy("gpus", words, replace(able, num_gpus=num_gpus))
    if layout.offload == "none" and layout.engine != "fsdp":
        words = f"{with_engine}the optimiser in the CPU's memory"
        yield Remedy("offload", words, replace(able, offload="optimizer"))
    if layout.offload != "all":
        is_zero_3 = able.engine == "fsdp" or able.zero == 3
        words = f"{with_engine if is_zero_3 else 'ZeRO-3, '}weights and optimiser in the CPU's memory"
        yield Remedy("offload", words, replace(able, offload="all", zero=0 if able.engine == "fsdp" else 3))
    if layout.num_gpus > 1 and not layout.shard_teacher:
        words = "the teacher spread over the GPUs (compute.shard_teacher)"
        yield Remedy("teacher", words, replace(layout, shard_teacher=True))


def _teacher(sizes: Sizes, layout: Layout) -> float:
    """Every GPU has the whole teacher, or its embedding and head and a part of all else."""
    shards = layout.num_gpus if layout.shard_teacher else 1
    return ((sizes.teacher.num_parameters - sizes.ends) / shards + sizes.ends) * layout.number_bytes


def _student(sizes: Sizes, layout: Layout) -> dict[str, float]:
    """Weights, gradients, optimiser and buffers, as the engine holds them."""
    num_gpus, trained = layout.num_gpus, sizes.trained
    copies = layout.number_bytes * sizes.matrices if layout.precision == "bf16" else 0
    one_copy = copies / max(sizes.num_layers, 1) if layout.checkpointing or sizes.stage != "distill" else copies
    weights, gradients, optimizer = float(FP32 * sizes.student), float(FP32 * trained), float(MOMENTS * trained)
    buffers = float(copies)
    if layout.engine == "fsdp":
        weights, gradients, optimizer = weights / num_gpus, gradients / num_gpus, optimizer / num_gpus
        gathered = layout.number_bytes * (sizes.layer - sizes.mixer) + FP32 * sizes.mixer
        ends = FP32 * sizes.ends if sizes.stage == "distill" else FP32 * sizes.ends / 2
        buffers = 2 * gathered + ends + FP32 * sizes.layer  # this layer and the next, and this one's gradient
    elif layout.engine == "deepspeed":
        buffers = one_copy
        if layout.zero >= 1:
            optimizer = (MOMENTS + FP32) * trained / num_gpus  # a float32 copy of the weights beside the moments
            buffers += FP32 * REDUCE_BUCKET
        # Stages 1 and 2 sum all gradients up before they are reduced, but at ZeRO-3 without offloading.
        reduces_at_once = sizes.stage == "distill" or (layout.zero == 3 and layout.offload == "none")
        if layout.zero >= 2 and reduces_at_once:
            gradients /= num_gpus
        if layout.zero == 3:
            weights /= num_gpus
            buffers += FP32 * min(sizes.student, MOST_GATHERED)
    if layout.offload != "none" and layout.engine != "single":
        optimizer = 0.0
        if layout.offload == "all":
            weights = 0.0
            gradients = 0.0 if layout.engine == "fsdp" else gradients
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer, "buffers": buffers}


def _orient(sizes: Sizes, layout: Layout, footprint: Footprint) -> tuple[float, float]:
    heads, state, length = sizes.student_spec.num_heads, sizes.student_spec.state_size, sizes.length
    matrices = layout.micro_batch * heads
    rows = band_rows(layout.micro_batch, heads, length)
    left = length - rows  # columns beside the last diagonal tile
    # The gradients of B and C, in bf16 their copies in float32 too, and running sums of the decay.
    lasting = length * ((2 + 2 * (layout.precision == "bf16")) * state * FP32 + 3 * FP64)
    band = rows * length * FP32  # of the teacher's matrix
    tile = rows * rows * (FP64 + 4 * FP32)  # decays pair by pair, in float64 first; matrix, difference, its square
    rectangle = rows * left * FP32 + 3 * left * state * FP32  # the difference; B decayed, its gradient, a product
    taken = matrices * (lasting + band + max(tile, rectangle))
    activations = layout.micro_batch * footprint.parts
    return activations, max(taken, layout.micro_batch * footprint.orient - activations)


def _distill(sizes: Sizes, layout: Layout, footprint: Footprint) -> tuple[float, float]:
    batch = layout.micro_batch
    if layout.checkpointing:
        kept = batch * (footprint.ends + sizes.num_layers * footprint.entering)
        passing = batch * (footprint.kept + footprint.passing)
    else:
        kept = batch * (footprint.ends + sizes.num_layers * footprint.kept)
        passing = batch * footprint.passing
    loss = _loss(sizes, layout)
    teacher = batch * footprint.teacher
    return kept + max(0.0, passing - loss, teacher - kept - loss), loss


def _loss(sizes: Sizes, layout: Layout) -> float:
    """Stage 3's loss in chunks of tokens: the chunk's logits, the head's gradient, and hidden states of both sides."""
    tokens, vocabulary = layout.micro_batch * sizes.length, sizes.teacher.vocab_size
    if sizes.whole_logits:
        return float(WHOLE_LOGITS * tokens * vocabulary * FP32)
    chunk = min(tokens, chunk_tokens(vocabulary)) * vocabulary * FP32
    head = vocabulary * sizes.teacher.hidden_size
    gradient = head * FP32 if sizes.trained_ends else 0
    hidden = tokens * sizes.teacher.hidden_size * (FP32 + 2 * layout.number_bytes)
    copy = head * BF16 if layout.precision == "bf16" else 0
    return max(CHUNKS * chunk + gradient, 2 * gradient) + hidden + copy
