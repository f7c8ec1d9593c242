"""DeepSpeed's settings: those the tool writes, and a user's own file, checked against the recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mohawkify.errors import CheckpointError, RecipeError
from mohawkify.files.atomic import read_json
from mohawkify.recipe.schema import OptimizerRecipe

AUTO = "auto"  # Hugging Face's word in such files for "as in the trainer"
# Keys that change the computation in ways that the recipe does not describe, by the reason for refusing them.
_REASONS = {
    "the recipe's schedule sets the learning rate": ("scheduler",),
    "weights are float32 under autocast": ("amp",),
    "precision is fp32 or bf16": ("fp16",),
    "weights stay float32; torch_autocast is the setting for bf16": ("bf16",),
    "gradients are summed in float32": ("data_types", "communication_data_type"),
    "losses are weighted by the recipe": ("prescale_gradients", "gradient_predivide_factor"),
    "gradients are dense": ("sparse_gradients",),
    "the engine counts the passes of a step": ("managed_gradient_accumulation",),
    "the student is trained as it is": ("compression_training", "quantize_training", "hybrid_engine", "compile"),
    "every layer is trained in every step": ("progressive_layer_drop",),
    "the recipe sets the order of the text": ("curriculum_learning", "data_efficiency"),
    "a run continues on any number of processes": ("elasticity",),
    "the recipe sets the batch size": ("autotuning",),
    "layers are not spread over processes": ("pipeline", "tensor_parallel"),
    "the run writes its own metrics": ("tensorboard", "wandb", "comet", "csv_monitor"),
    "no file is read or written outside the run": ("flops_profiler", "comms_logger", "aio", "checkpoint"),
    "compute.activation_checkpointing is the setting": ("activation_checkpointing",),
}
_ZERO_REASONS = {
    "weights are gathered as they are": ("zero_quantized_weights", "zero_quantized_nontrainable_weights"),
    "gradients are summed in float32": ("zero_quantized_gradients",),
    "every weight is updated in every step": ("zenflow",),
}
REFUSED = {key: reason for reason, keys in _REASONS.items() for key in keys}
REFUSED_ZERO = {key: reason for reason, keys in _ZERO_REASONS.items() for key in keys}
_SWITCH, _SIZE, _COUNT = "true or false", "a whole number from 0", "a whole number from 1"
# Keys that a user's file may set beyond the recipe. DeepSpeed's other keys name files to write and modules to import.
PASSED_ON = dict.fromkeys(("wall_clock_breakdown", "memory_breakdown", "dump_state"), _SWITCH)
PASSED_ON_ZERO = {
    **dict.fromkeys(("allgather_partitions", "contiguous_gradients", "overlap_comm"), _SWITCH),
    **dict.fromkeys(("reduce_scatter", "round_robin_gradients", "use_multi_rank_bucket_allreduce"), _SWITCH),
    **dict.fromkeys(("stage3_allgather_sequential", "stage3_use_all_reduce_for_fetch_params"), _SWITCH),
    **dict.fromkeys(("stage3_gather_16bit_weights_on_model_save", "ignore_unused_parameters"), _SWITCH),
    **dict.fromkeys(("allgather_bucket_size", "sub_group_size", "stage3_max_reuse_distance"), _SIZE),
    **dict.fromkeys(("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"), _SIZE),
    **dict.fromkeys(("stage3_model_persistence_threshold", "stage3_max_live_parameters"), _SIZE),
    **dict.fromkeys(("reduce_bucket_size", "zero_hpz_partition_size"), _COUNT),
}
PASSED_ON_OFFLOAD = {"pin_memory": _SWITCH, "buffer_count": _COUNT}
SAFE_MODULES = ("torch.nn.Linear", "torch.nn.Embedding", "torch.nn.Conv1d")  # DeepSpeed imports these names
_OFFLOADS = ("offload_optimizer", "offload_param")
# Keys that the recipe or the engine sets: compared if the two can differ, and never passed on.
_DECIDED = {
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("optimizer", "torch_autocast", "zero_optimization", "steps_per_print"),
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
}

LEAST_ZERO = {"none": 0, "optimizer": 1, "all": 3}  # the first stage of ZeRO that can offload so


@dataclass(frozen=True)
class EngineFacts:
    """Settings of the recipe and the command line that a user's file may not contradict.

    Args:
        optimizer: AdamW's settings and the gradient clip.
        learning_rate: the stage's peak, or ``auto``.
        micro_batch_sequences: sequences per forward pass in one process.
        zero: ZeRO's stage, or None for the file's.
        offload: ``none``, ``optimizer`` or ``all``, or None for the file's.
    """

    optimizer: OptimizerRecipe
    learning_rate: float | str
    precision: str
    batch_sequences: int
    micro_batch_sequences: int
    num_processes: int
    zero: int | None = None
    offload: str | None = None


def engine_config(facts: EngineFacts, user: Mapping[str, Any] | None = None, source: str = "") -> dict[str, Any]:
    """The settings that DeepSpeed is started with.

    Args:
        user: a user's own settings, as `read_settings` gave them.
        source: the file they come from, for messages.

    Raises:
        RecipeError: they contradict the recipe or the command line; every contradiction is named.
    """
    user = dict(user or {})
    zero = user.pop("zero_optimization", {})
    problems = [] if isinstance(zero, Mapping) else [f"zero_optimization: found {zero!r}, expected settings in braces"]
    zero = dict(zero) if isinstance(zero, Mapping) else {}
    problems += _contradictions(facts, user, zero)
    if problems:
        raise RecipeError(
            f"{source or 'the DeepSpeed file'} contradicts the recipe: {'; '.join(problems)}",
            hint='change them there, or leave them to the recipe: take them out, or write "auto"',
        )
    stage, offload = zero_and_offload(facts.zero, facts.offload, {"zero_optimization": zero})
    return {
        **_passed_on(user, PASSED_ON),
        "train_micro_batch_size_per_gpu": facts.micro_batch_sequences,
        "gradient_accumulation_steps": 1,  # passes of a step are counted by the engine
        "gradient_clipping": facts.optimizer.gradient_clip or 0.0,  # DeepSpeed would clip at 1.0 by itself
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW needs no compiler
        "steps_per_print": 10**9,
        "torch_autocast": _autocast(facts.precision, user.get("torch_autocast")),
        "zero_optimization": {
            **_passed_on(zero, PASSED_ON_ZERO),
            "stage": stage,
            **_offload_settings(offload, zero),
        },
    }


def zero_and_offload(zero: int | None, offload: str | None, settings: Mapping[str, Any]) -> tuple[int, str]:
    """ZeRO's stage and the offloading: the arguments, else those of a user's settings, else ZeRO-3 without offloading.

    Raises:
        RecipeError: DeepSpeed would ignore the offloading at that stage without an error.
    """
    own = settings.get("zero_optimization", {})
    own = own if isinstance(own, Mapping) else {}
    stage = own.get("stage", AUTO) if zero is None else zero
    stage = 3 if stage == AUTO else stage
    offload = offload or _offload(own)
    if type(stage) is int and stage < LEAST_ZERO[offload]:
        raise RecipeError(
            f"found ZeRO-{stage}, expected at least ZeRO-{LEAST_ZERO[offload]} to offload {offload}",
            hint="choose another --zero or --offload (compute.zero, compute.offload)",
        )
    return stage, offload


def read_settings(path: str | None) -> dict[str, Any]:
    """A user's DeepSpeed settings, a JSON object; none without a file.

    Raises:
        RecipeError: there is no such file, it is no JSON object, or it has keys that are not passed on to DeepSpeed.
    """
    if path is None:
        return {}
    file = Path(path)
    if not file.is_file():
        raise RecipeError(f"compute.deepspeed_config: there is no file {path}")
    try:
        settings = read_json(file)
    except CheckpointError as error:
        raise RecipeError(error.message) from error
    if not isinstance(settings, dict):
        raise RecipeError(f"{path} is not a JSON object")
    problems = list(_unfit(settings))
    if problems:
        raise RecipeError(
            f"{path} has settings that are not passed on to DeepSpeed: {'; '.join(problems)}",
            hint="docs/engine.md lists the keys that a file may have: take the others out",
        )
    return settings


def _unfit(settings: Mapping[str, Any]) -> Iterator[str]:
    """The settings that are not passed on to DeepSpeed, each with its key."""
    yield from _unfit_keys(settings, PASSED_ON, {*_DECIDED, *REFUSED})
    zero = settings.get("zero_optimization")
    if isinstance(zero, Mapping):
        yield from _unfit_keys(zero, PASSED_ON_ZERO, {"stage", *_OFFLOADS, *REFUSED_ZERO}, "zero_optimization.")
        for key in _OFFLOADS:
            if isinstance(zero.get(key), Mapping):
                yield from _unfit_keys(zero[key], PASSED_ON_OFFLOAD, {"device"}, f"zero_optimization.{key}.")
    autocast = settings.get("torch_autocast")
    if isinstance(autocast, Mapping):
        yield from _unfit_keys(autocast, {}, {"enabled", "dtype", "lower_precision_safe_modules"}, "torch_autocast.")
        modules = autocast.get("lower_precision_safe_modules", [])
        if not isinstance(modules, list) or any(module not in SAFE_MODULES for module in modules):
            expected = f"a list of {', '.join(SAFE_MODULES)}"
            yield f"torch_autocast.lower_precision_safe_modules: found {modules!r}, expected {expected}"


def _unfit_keys(
    settings: Mapping[str, Any], passed_on: Mapping[str, str], others: set[str], prefix: str = ""
) -> Iterator[str]:
    for key, value in settings.items():
        if key not in passed_on and key not in others:
            yield f"{prefix}{key}"
        elif key in passed_on and value != AUTO and not _is_a(value, passed_on[key]):
            yield f"{prefix}{key}: found {value!r}, expected {passed_on[key]}"


def _is_a(value: Any, kind: str) -> bool:
    if kind == _SWITCH:
        return isinstance(value, bool)
    # Such files write sizes as 5e8, which JSON reads as a fraction.
    is_whole = isinstance(value, int | float) and not isinstance(value, bool) and value % 1 == 0
    return is_whole and (1 if kind == _COUNT else 0) <= value < 1 << 63


def _passed_on(settings: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key in keys and value != AUTO}


def _contradictions(facts: EngineFacts, user: dict[str, Any], zero: dict[str, Any]) -> list[str]:
    problems = [
        f"{key}: found {found!r}, expected {expected!r}"
        for key, found, expected in _pairs(facts, user, zero)
        if found is not None and found != AUTO and not _equal(found, expected)
    ]
    for settings, refused, prefix in ((user, REFUSED, ""), (zero, REFUSED_ZERO, "zero_optimization.")):
        for key, reason in refused.items():
            if _is_on(settings.get(key)):
                problems.append(f"{prefix}{key}: found {settings[key]!r}, expected none ({reason})")
    stage = zero.get("stage", AUTO)
    if stage != AUTO and (type(stage) is not int or stage not in range(4)):
        problems.append(f"zero_optimization.stage: found {stage!r}, expected 0, 1, 2 or 3")
    for key in _OFFLOADS:
        device = _device(zero, key)
        if device not in ("none", "cpu"):
            problems.append(f"zero_optimization.{key}.device: found {device!r}, expected 'none' or 'cpu'")
    if facts.precision == "bf16" and isinstance(user.get("torch_autocast"), Mapping):
        dtype = user["torch_autocast"].get("dtype", "bfloat16")
        if dtype not in ("bfloat16", "torch.bfloat16", AUTO):
            problems.append(f"torch_autocast.dtype: found {dtype!r}, expected 'bfloat16'")
    return problems


def _pairs(facts: EngineFacts, user: dict[str, Any], zero: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(key, found, expected) of all settings that the recipe has too."""
    yield "train_batch_size", user.get("train_batch_size"), facts.batch_sequences
    micro = facts.micro_batch_sequences
    yield "train_micro_batch_size_per_gpu", user.get("train_micro_batch_size_per_gpu"), micro
    passes = -(-facts.batch_sequences // (micro * facts.num_processes))
    yield "gradient_accumulation_steps", user.get("gradient_accumulation_steps"), passes
    yield "gradient_clipping", user.get("gradient_clipping"), facts.optimizer.gradient_clip or 0.0
    autocast = user.get("torch_autocast")
    if isinstance(autocast, Mapping):
        yield "torch_autocast.enabled", autocast.get("enabled", False), facts.precision == "bf16"
    if facts.zero is not None:
        yield "zero_optimization.stage", zero.get("stage"), facts.zero
    if facts.offload is not None:
        for key, kinds in (("offload_optimizer", ("optimizer", "all")), ("offload_param", ("all",))):
            if key in zero:
                device = "cpu" if facts.offload in kinds else "none"
                yield f"zero_optimization.{key}.device", _device(zero, key), device
    optimizer = user.get("optimizer")
    if isinstance(optimizer, Mapping):
        yield "optimizer.type", optimizer.get("type"), "AdamW"
        parameters = optimizer.get("params", {})
        expected: dict[str, Any] = {
            "lr": facts.learning_rate,
            "betas": list(facts.optimizer.betas),
            "eps": facts.optimizer.epsilon,
            "weight_decay": facts.optimizer.weight_decay,
        }
        for key, found in parameters.items() if isinstance(parameters, Mapping) else ():
            if key not in ("torch_adam", "adam_w_mode"):
                yield f"optimizer.params.{key}", found, expected.get(key, "none")
    elif optimizer is not None:
        yield "optimizer", optimizer, "AdamW"


def _equal(found: Any, expected: Any) -> bool:
    if isinstance(found, bool) or isinstance(expected, bool):
        return found is expected
    if isinstance(found, list | tuple) and isinstance(expected, list):
        return list(found) == expected
    return found == expected


def _is_on(value: Any) -> bool:
    """Whether a setting changes anything: files often list features only to switch them off."""
    if isinstance(value, Mapping):
        return value.get("enabled", True) not in (False, AUTO)
    return value not in (None, False, AUTO)


def _device(zero: Mapping[str, Any], key: str) -> Any:
    settings = zero.get(key)
    return settings.get("device", "none") if isinstance(settings, Mapping) else settings or "none"


def _offload(zero: Mapping[str, Any]) -> str:
    if _device(zero, "offload_param") == "cpu":
        return "all"
    return "optimizer" if _device(zero, "offload_optimizer") == "cpu" else "none"


def _offload_settings(offload: str, zero: Mapping[str, Any]) -> dict[str, Any]:
    """The parts that are offloaded to the CPU, with a user's own pinning and buffers."""
    settings = {}
    for key, kinds in (("offload_optimizer", ("optimizer", "all")), ("offload_param", ("all",))):
        if offload in kinds:
            own = zero.get(key)
            own = _passed_on(own, PASSED_ON_OFFLOAD) if isinstance(own, Mapping) else {}
            settings[key] = {**own, "device": "cpu"}
    return settings


def _autocast(precision: str, own: Any) -> dict[str, Any]:
    if precision != "bf16":
        return {"enabled": False}
    # Nothing is summed or gathered in bfloat16 unless the user lists the modules whose parameters may be.
    modules = own.get("lower_precision_safe_modules", []) if isinstance(own, Mapping) else []
    return {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": modules}
