"""Plans a conversion from the teacher's configuration alone: steps, FLOPs, memory, disk, time, money.

Steps and tokens are exact; all else is an estimate, and docs/plan.md lists the assumptions.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import gcd
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from mohawkify.errors import UsageError
from mohawkify.planning.gpus import UTILISATION, Gpu
from mohawkify.planning.memory import (
    FP32,
    MOMENTS,
    PARTS,
    STAGES,
    Footprint,
    Layout,
    Sizes,
    ends_of,
    largest_micro_batch,
    memory_parts,
    remedies,
    rule_of_thumb,
)
from mohawkify.planning.rules import RangeRules
from mohawkify.recipe.schema import Recipe, StageRecipe
from mohawkify.student.student_spec import StudentSpec
from mohawkify.teacher.teacher_spec import TeacherSpec
from mohawkify.train.engines.deepspeed_config import read_settings, zero_and_offload

if TYPE_CHECKING:
    from mohawkify.mixers.calibration import PassCost

# Assumed sustained speed without a GPU that is named or recognised: an order of magnitude.
ASSUMED_FLOPS_PER_SECOND = {"cuda": 1.0e14, "mps": 4.0e12, "cpu": 3.0e10}
UPDATE_BYTES = 28  # per parameter: weight, gradient and two moments are read, weight and moments written
MIXER_ONLY = ("mixer",)
# Bits per number of an export; a quantised one has a scale and an offset in 16 bits for every 64 numbers, and of 4
# bits nearly half of the numbers of a student of a thousand million have 6.
EXPORT_BITS = {"hf": 16.0, "mlx": 16.0, "mlx-q8": 8.5, "mlx-q4": 5.4}


@dataclass(frozen=True)
class Machine:
    """The hardware of a plan.

    Args:
        device: ``cpu``, ``cuda`` or ``mps``.
        gpu: the kind of GPU, where one is named or at hand.
        flops_per_second: sustained speed of everything together; None assumes one.
        utilisation: part of a GPU's peak arithmetic that is sustained, where no speed is given.
        price_per_hour: of one GPU, in whatever money; None plans no cost.
        memory_bytes: of the machine without a GPU, if known.
        free_bytes: free space on the run's disk, if known.
    """

    device: str
    gpu: Gpu | None = None
    flops_per_second: float | None = None
    utilisation: float = UTILISATION
    price_per_hour: float | None = None
    memory_bytes: int | None = None
    free_bytes: int | None = None


@dataclass(frozen=True)
class PlanInputs:
    """Everything that a plan depends on.

    Args:
        layout: how training is spread over GPUs; from `layout_of`.
        whole_logits: whether stage 3 makes all logits at once, as in families with an unknown head.
    """

    teacher: TeacherSpec
    student: StudentSpec
    recipe: Recipe
    machine: Machine
    layout: Layout
    whole_logits: bool = False

    @property
    def flops_per_second(self) -> float:
        """The sustained speed of everything together."""
        machine, layout = self.machine, self.layout
        if machine.flops_per_second is not None:
            return machine.flops_per_second
        gpu = machine.gpu
        peak = None
        if gpu is not None:
            peak = gpu.flops_per_second if layout.precision == "bf16" else gpu.fp32_flops_per_second
        if peak is None:
            return ASSUMED_FLOPS_PER_SECOND[machine.device] * layout.num_gpus
        return peak * machine.utilisation * layout.num_gpus

    def cost(self, seconds: float) -> float | None:
        """The price of a duration, if the machine has one."""
        if self.machine.price_per_hour is None:
            return None
        return seconds / 3600 * self.layout.num_gpus * self.machine.price_per_hour


def make_plan(inputs: PlanInputs, footprint: Footprint | None = None) -> dict[str, Any]:
    """Work out the plan.

    Args:
        footprint: the memory of one sequence in a layer; None takes the rule of thumb.

    Returns:
        A JSON object: teacher and student, a row per phase and per stage, memory by part, whether it fits and what to
        change, disk, FLOPs, time, cost. Bytes, FLOPs, seconds.
    """
    teacher, student, recipe = inputs.teacher, inputs.student, inputs.recipe
    machine, layout = inputs.machine, inputs.layout
    counted = footprint or rule_of_thumb(teacher, student, layout.precision, longest_by_kind(recipe))
    rows, phases, all_sizes = {}, [], {}
    for name, stage in recipe.stages.blocks().items():
        trained = trained_parameters(stage.plans_as, stage, teacher, student)
        all_sizes[name] = Sizes(stage.plans_as, longest(stage), teacher, student, trained, inputs.whole_logits)
        if stage.plans_as == "calibrate":
            all_sizes[name] = replace(all_sizes[name], **_calibration_bytes(inputs, longest(stage)))
        own = _phases(inputs, name, stage, trained)
        phases += own
        rows[name] = _stage(inputs, stage, all_sizes[name], counted, own)
    checkpoint = student.num_parameters * FP32 + max(row["trainable_parameters"] for row in rows.values()) * MOMENTS
    totals = {key: sum(row[key] for row in rows.values()) for key in ("tokens", "steps", "flops", "seconds")}
    disk = {
        "checkpoints": (recipe.checkpoint.keep + (2 if recipe.checkpoint.final == "best" else 1)) * checkpoint,
        "final": student.num_parameters * FP32,
        "tokens": totals["tokens"] * FP32,
    }
    used = {name: size for name, size in all_sizes.items() if rows[name]["steps"]}
    return {
        "teacher": teacher.to_json(),
        "student": student.to_json(),
        "recipe": recipe.name,
        "device": machine.device,
        "layout": asdict(layout),
        "gpu": None if machine.gpu is None else asdict(machine.gpu),
        "phases": phases,
        "stages": rows,
        **totals,
        "teacher_flops": sum(row["teacher_flops"] for row in rows.values()),
        "student_flops": sum(row["student_flops"] for row in rows.values()),
        "assumed_flops_per_second": inputs.flops_per_second,
        "utilisation": machine.utilisation,
        "price_per_hour": machine.price_per_hour,
        "cost": inputs.cost(totals["seconds"]),
        "peak_memory_bytes": max(row["memory_bytes"] for row in rows.values()),
        "activations_counted": counted.counted,
        "fit": _fit(machine, layout, used, counted, recipe),
        "disk_bytes": disk,
        "export_bytes": {name: int(student.num_parameters * bits / 8) for name, bits in EXPORT_BITS.items()},
        "free_bytes": machine.free_bytes,
        "warnings": [*_warnings(teacher, recipe, machine, rows, disk), *early_endings(recipe)],
    }


def layout_of(recipe: Recipe, *, engine: str, zero: int | None, num_gpus: int) -> Layout:
    """How a recipe is laid out over GPUs.

    Args:
        engine: ``single``, ``deepspeed`` or ``fsdp``; ``auto`` for the recipe's. Where that is ``auto`` too, one GPU
            means one process, and several mean DeepSpeed.
        zero: ZeRO's stage; None for the recipe's, or 3.

    Raises:
        UsageError: a batch cannot be shared out, one process should use several GPUs, or a stage of ZeRO is asked
            of an engine that has none.
        RecipeError: a user's DeepSpeed settings cannot be read, or ZeRO's stage cannot offload what is asked for.
    """
    compute = recipe.compute
    engine = compute.engine if engine == "auto" else engine
    if engine == "auto":
        engine = "single" if num_gpus == 1 else "deepspeed"
    if zero is not None and engine != "deepspeed":
        raise UsageError(f"--zero {zero}: found engine {engine}, expected deepspeed")
    zero = (compute.zero if zero is None else zero) if engine == "deepspeed" else None
    if engine == "single" and num_gpus > 1:
        raise UsageError(f"--engine single: found {num_gpus} GPUs, expected 1", hint="use deepspeed or fsdp")
    micro = 1
    for name, stage in recipe.stages.blocks().items():
        if not stage.num_steps:
            continue
        if stage.batch_sequences % num_gpus:
            raise UsageError(
                f"--gpus: found {num_gpus}, expected a divisor of stages.{name}.batch_sequences,"
                f" {stage.batch_sequences}"
            )
        micro = max(micro, _micro(stage, compute.micro_batch_sequences, num_gpus))
    offload: str = "none" if engine == "single" else compute.offload or "none"
    if engine == "deepspeed":
        zero, offload = zero_and_offload(zero, compute.offload, read_settings(compute.deepspeed_config))
    return Layout(
        engine=engine,
        zero=zero or 0,
        num_gpus=num_gpus,
        offload=offload,
        precision=compute.precision,
        micro_batch=micro,
        checkpointing=compute.activation_checkpointing,
        shard_teacher=compute.shard_teacher and num_gpus > 1,
    )


def longest(stage: StageRecipe) -> int:
    """The greatest sequence length of a stage."""
    return max((segment.sequence_length for segment in stage.segments()), default=stage.sequence_length)


def longest_by_kind(recipe: Recipe) -> dict[str, int]:
    """The greatest sequence length of the stages that resemble each of the standard ones in a plan."""
    blocks = list(recipe.stages.blocks().values())
    lengths = {kind: [longest(block) for block in blocks if block.plans_as == kind] for kind in STAGES}
    return {kind: max(own or [longest(block) for block in blocks]) for kind, own in lengths.items()}


def trained_parameters(name: str, stage: StageRecipe, teacher: TeacherSpec, student: StudentSpec) -> dict[str, int]:
    """How many parameters a stage trains, by part; norms count with the MLPs."""
    head = 0 if teacher.tie_word_embeddings else teacher.head_parameters
    if name == "calibrate":
        return {}
    if name == "orient":
        return {"mixer": student.matrix_parameters}
    parts = getattr(stage, "train", MIXER_ONLY)
    if name == "align" and getattr(stage, "target", None) == "mixer":
        parts = MIXER_ONLY
    blocks = student.num_parameters - teacher.embedding_parameters - head - student.mixer_parameters
    if name == "align":
        blocks = blocks * len(student.mixer_layers) // teacher.num_hidden_layers
    sizes = {
        "mixer": student.mixer_parameters,
        "mlp": blocks,
        "norm": 0,
        "embedding": teacher.embedding_parameters,
        "head": head,
    }
    return {part: sizes[part] for part in parts}


def _micro(stage: StageRecipe, wanted: int | str | None, num_gpus: int) -> int:
    """Sequences of one forward pass on one GPU: the recipe's, at most one GPU's share of the batch.

    For ``auto``, which a run finds out by trying, it is the whole share.
    """
    share = stage.batch_sequences // num_gpus
    if stage.plans_as == "calibrate":
        return share
    return min(wanted, share) if isinstance(wanted, int) else share


def _phases(inputs: PlanInputs, name: str, stage: StageRecipe, trained: dict[str, int]) -> list[dict[str, Any]]:
    """A row per run of steps over the same text at the same length."""
    final_phase = stage.final_phase.tokens if stage.final_phase else 0
    budgets = {"train": stage.tokens - final_phase, "final_phase": final_phase}
    layout, gpu = inputs.layout, inputs.machine.gpu
    bandwidth = None if gpu is None else gpu.bytes_per_second
    first, rows = 0, []
    for segment in stage.segments():
        tokens_per_step = stage.batch_sequences * segment.sequence_length
        tokens = segment.num_steps * tokens_per_step
        teacher_work, student_work = _work(inputs, stage, segment.sequence_length, trained)
        is_kept = segment.data == "final_phase" and getattr(stage.final_phase, "logits", None) is not None
        teacher_flops = 0 if is_kept else tokens * teacher_work  # its logits are read
        seconds = (teacher_flops + tokens * student_work) / inputs.flops_per_second
        if bandwidth is not None:
            shards = 1 if layout.engine == "single" else layout.num_gpus
            seconds += segment.num_steps * UPDATE_BYTES * sum(trained.values()) / shards / bandwidth
        micro = _micro(stage, layout.micro_batch, layout.num_gpus)
        rows.append(
            {
                "stage": name,
                "text": segment.data,
                "budget_tokens": budgets[segment.data],
                "tokens": tokens,
                "first_step": first + 1,
                "steps": segment.num_steps,
                "sequence_length": segment.sequence_length,
                "batch_sequences": stage.batch_sequences,
                "tokens_per_step": tokens_per_step,
                "micro_batch_sequences": micro,
                "accumulation": -(-(stage.batch_sequences // layout.num_gpus) // micro),
                "teacher_flops": teacher_flops,
                "student_flops": tokens * student_work,
                "seconds": seconds,
                "cost": inputs.cost(seconds),
            }
        )
        first += segment.num_steps
    return rows


def _stage(
    inputs: PlanInputs, stage: StageRecipe, sizes: Sizes, footprint: Footprint, phases: list[dict[str, Any]]
) -> dict[str, Any]:
    layout, machine = inputs.layout, inputs.machine
    num_steps, schedule = stage.num_steps, inputs.recipe.schedule
    warmup, decay = round(schedule.warmup * num_steps), round(schedule.decay * num_steps)
    is_trained = stage.plans_as != "calibrate"
    if not is_trained:
        warmup = decay = 0
    sums = {key: sum(row[key] for row in phases) for key in ("tokens", "teacher_flops", "student_flops", "seconds")}
    own = replace(layout, micro_batch=_micro(stage, layout.micro_batch, layout.num_gpus))
    memory = memory_parts(sizes, own, footprint) if phases else dict.fromkeys(PARTS, 0)
    return {
        **sums,
        "budget_tokens": stage.tokens,
        "steps": num_steps,
        "warmup_steps": warmup,
        "stable_steps": num_steps - warmup - decay,
        "decay_steps": decay,
        "learning_rate": stage.learning_rate,
        "floor": schedule.floor,
        "sequence_length": sizes.length,
        "batch_sequences": stage.batch_sequences,
        "trainable_parameters": sizes.trained,
        "flops": sums["teacher_flops"] + sums["student_flops"],
        "cost": inputs.cost(sums["seconds"]),
        "memory": memory,
        "memory_bytes": sum(memory.values()),
        "largest_micro_batch": (
            largest_micro_batch(sizes, layout, footprint, machine.gpu.usable_bytes, stage.batch_sequences)
            if machine.gpu is not None and is_trained
            else None
        ),
    }


def _work(inputs: PlanInputs, stage: StageRecipe, length: int, trained: dict[str, int]) -> tuple[float, float]:
    """FLOPs of a token, of the teacher and of the student.

    2 for every weight that it meets, forward, for the input's gradient and for the weight's. Matrices of attention and
    mixing count by their length; what is not a product of matrices is left out.
    """
    from mohawkify.student.build import mixer_flops

    name, teacher, student = stage.plans_as, inputs.teacher, inputs.student
    checkpointing = inputs.layout.checkpointing
    heads, width, state = teacher.num_attention_heads, student.head_dim, student.state_size
    num_grafted = len(student.mixer_layers)
    ends = ends_of(teacher)
    idle = teacher.num_parameters - teacher.active_parameters
    attended = [_mean_context(length, teacher.window_of(index)) for index in range(teacher.num_hidden_layers)]
    trunk = 2.0 * (teacher.active_parameters - ends) + 4.0 * heads * width * sum(attended)
    if name == "calibrate":
        groups, costs = _calibration_passes(inputs, length)
        passes = sum(cost.share * number for cost, number in zip(costs, groups, strict=True))
        return passes * trunk, num_grafted * sum(cost.share * cost.flops for cost in costs)
    if name == "orient":
        # The layers' inputs need no gradient. A band: the teacher's scores, the student's matrix, two gradients.
        bands = float(length * (width + 3 * state))
        return trunk, 4.0 * sum(trained.values()) + bands * sum(layer.mixer_heads for layer in student.layer_specs)
    scan = mixer_flops(student, length)
    if name == "align" and getattr(stage, "target", None) == "mixer":
        mixers, outputs = 2.0 * student.mixer_parameters, 2.0 * heads * width * teacher.hidden_size * num_grafted
        return trunk, mixers + scan + mixers + outputs + 2 * scan
    share = num_grafted / teacher.num_hidden_layers if name == "align" else 1.0
    body = 2.0 * (student.num_parameters - idle - ends) * share
    learning = sum(size for part, size in trained.items() if part not in ("embedding", "head"))
    weights = 2.0 * (learning - (idle * share if "mlp" in trained else 0))
    student_work = body + scan + (body + 2 * scan) + weights + (body + scan if checkpointing else 0.0)
    if name == "align":
        return trunk, student_work
    kept = (
        4.0
        * width
        * sum(
            layer.attention_heads * min(_mean_context(length, layer.window), mean)
            for layer, mean in zip(student.layer_specs, attended, strict=True)
        )
    )
    head = 2.0 * teacher.head_parameters
    head_learns = "head" in trained or (teacher.tie_word_embeddings and "embedding" in trained)
    return trunk + head, student_work + (4.0 if checkpointing else 3.0) * kept + head * (3 if head_learns else 2)


def _calibration_passes(inputs: PlanInputs, length: int) -> tuple[list[int], list[PassCost]]:
    """How many groups of layers read the text in every pass of a calibration, and what the passes take in a layer."""
    from mohawkify.mixers.calibration import MAX_SUMS_BYTES
    from mohawkify.mixers.kinds import mixer_class

    teacher, student = inputs.teacher, inputs.student
    attention = (teacher.num_attention_heads, teacher.num_key_value_heads, teacher.head_dim)
    costs = mixer_class(student.kind).calibration.costs(attention, teacher.hidden_size, length)
    layers = len(student.mixer_layers)
    groups = [max(1, -(-layers // max(1, MAX_SUMS_BYTES // max(1, cost.sums_bytes)))) for cost in costs]
    return groups, costs


def _calibration_bytes(inputs: PlanInputs, length: int) -> dict[str, Any]:
    groups, costs = _calibration_passes(inputs, length)
    layers = len(inputs.student.mixer_layers)
    most = max(cost.sums_bytes * -(-layers // number) for cost, number in zip(costs, groups, strict=True))
    return {"sums_bytes": most, "working_bytes": max(cost.working_bytes for cost in costs)}


def _mean_context(length: int, window: int | None) -> float:
    """The tokens that a token attends to, on average over a sequence."""
    if window is None or window >= length:
        return (length + 1) / 2
    return window - window * (window - 1) / (2 * length)


def _fit(
    machine: Machine, layout: Layout, sizes: dict[str, Sizes], footprint: Footprint, recipe: Recipe
) -> dict[str, Any] | None:
    """Whether the fullest moment fits the GPU, and what could be changed where it does not."""
    if machine.gpu is None:
        return None
    usable = machine.gpu.usable_bytes

    def peak(changed: Layout) -> int:
        peaks = []
        for name, size in sizes.items():
            stage = recipe.stages.blocks()[name]
            own = replace(changed, micro_batch=_micro(stage, changed.micro_batch, changed.num_gpus))
            peaks.append(sum(memory_parts(size, own, footprint).values()))
        return max(peaks, default=0)

    found: dict[str, Any] = {"usable_bytes": usable, "peak_bytes": peak(layout), "fits": peak(layout) <= usable}
    if found["fits"]:
        return {**found, "changes": [], "together": None}
    shareable = gcd(*(getattr(recipe.stages, name).batch_sequences for name in sizes)) or 1
    possible = [each for each in remedies(layout) if shareable % each.layout.num_gpus == 0]
    possible = [each for each in possible if peak(each.layout) < found["peak_bytes"]]
    found["changes"] = [
        {"change": each.words, "peak_bytes": peak(each.layout), "fits": peak(each.layout) <= usable}
        for each in possible
    ]
    if any(each["fits"] for each in found["changes"]):
        return {**found, "together": None}
    current, applied = layout, dict[str, str]()
    for each in possible:
        changed = replace(current, **each.fields(layout))
        if peak(current) > usable and peak(changed) < peak(current):
            current, applied[each.kind] = changed, each.words
    together = {"changes": list(applied.values()), "peak_bytes": peak(current), "fits": peak(current) <= usable}
    return {**found, "together": together}


def early_endings(recipe: Recipe) -> list[str]:
    """A line for every stage that may end before its budget is used up, or begins with a range test."""
    tests = [
        f"stage {name} begins with a range test: about {RangeRules().cost(stage):.0%} of its time more"
        for name, stage in recipe.stages.blocks().items()
        if stage.learning_rate == "auto" and stage.tokens
    ]
    return tests + [
        f"stage {name} may end on a plateau: its steps, tokens and time are what it takes at most"
        for name, stage in recipe.stages.blocks().items()
        if stage.plateau is not None and stage.tokens
    ]


def _warnings(
    teacher: TeacherSpec, recipe: Recipe, machine: Machine, rows: dict[str, Any], disk: dict[str, int]
) -> list[str]:
    found = []
    made_for = recipe.teacher
    if made_for is not None and _model_name(made_for) != _model_name(teacher.source):
        found.append(f"the recipe was made for {made_for}, not for {teacher.source}")
    longest_sequence = max(recipe.evaluation.sequence_length, *(row["sequence_length"] for row in rows.values()))
    if longest_sequence > teacher.max_position_embeddings:
        found.append(
            f"sequences of {longest_sequence} tokens are longer than the teacher was made for"
            f" ({teacher.max_position_embeddings})"
        )
    peak = max(row["memory_bytes"] for row in rows.values())
    if machine.gpu is None and machine.memory_bytes is not None and peak > machine.memory_bytes:
        found.append(f"{peak:,} bytes are needed, and this machine has {machine.memory_bytes:,}")
    second = recipe.stages.second_teacher()
    if second is not None and second[1].teacher is not None:
        found.append(f"the final phase is taught by {second[1].teacher}: what that teacher takes is not in this plan")
    needed = sum(disk.values())
    if machine.free_bytes is not None and needed > machine.free_bytes:
        found.append(f"{needed:,} bytes of disk are needed, and {machine.free_bytes:,} are free")
    return found


def _model_name(source: str) -> str:
    """The last part of a Hub id or a path; a config.json has the name of its folder."""
    path = PurePath(source)
    name = path.parent.name if path.name == "config.json" else path.name
    return name.removesuffix(".json").lower()
