"""Decoding: tokens per second and memory of a student and its teacher, over batch sizes and over contexts.

Both have random weights, and their caches are filled with random numbers as if the context had been read: how long a
step takes does not depend on them. The teacher decodes twice, with the cache that transformers gives it by default,
which is copied to grow, and with one that was allocated for the whole context.

Shapes: b batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache

from mohawkify.bench.markdown import Bound, Measure, Report
from mohawkify.bench.measure import available_bytes, side_by_side
from mohawkify.errors import NumericsError
from mohawkify.families.registry import load_adapter
from mohawkify.mixers.kinds import mixers_of
from mohawkify.student.build import classes_for, student_config
from mohawkify.student.cache import RecurrentLayer, StudentCache
from mohawkify.student.layer_spec import LayerSpec

ROUNDS = 5
CONSTANT_SPEED, OVER_TEACHER = 0.97, 3.0
STUDENT, TEACHER, TEACHER_STATIC = "student", "teacher", "teacher, static cache"
STUDENT_CAPTURED = "student, captured"
CHECKED_TOKENS = 12
ALLOWED_DIFFERENCE = 1e-4  # of logits, relative to the largest
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Plan:
    """The sizes of the measurement.

    Args:
        width, layers, vocabulary: of the teacher, a Llama whose heads are 64 wide.
        batches: sequences side by side, of the plot over batches.
        generated: tokens each of them has in that plot; a step is timed at half of them as context.
        contexts: of the plot over contexts, with one sequence; the first and the last are compared.
        many: sequences side by side that are timed at the last context too, where caches and not weights are most of
            what a step reads.
        steps: tokens in a row per timing.
    """

    width: int
    layers: int
    vocabulary: int
    batches: tuple[int, ...]
    generated: int
    contexts: tuple[int, ...]
    many: int
    steps: int


QUICK = Plan(64, 2, 97, (1, 2), 64, (16, 64), 2, 2)
ON_CPU = Plan(768, 12, 32000, (8, 32, 256), 2048, (512, 2048, 8192), 8, 2)
ON_GPU = Plan(
    2048, 16, 128256, (8, 32, 128, 512, 2048), 8192, (512, 1024, 2048, 4096, 8192, 16384, 32768), 8, 32
)  # fmt: skip


@dataclass(frozen=True)
class Models:
    """A teacher and its student, with random weights."""

    teacher: PreTrainedModel
    student: PreTrainedModel
    device: torch.device

    @classmethod
    def make(cls, plan: Plan, device: torch.device) -> Models:
        """Build both on the device: in bfloat16 on GPUs, in float32 elsewhere."""
        heads = plan.width // 64
        config = LlamaConfig(
            vocab_size=plan.vocabulary, hidden_size=plan.width, intermediate_size=plan.width * 8 // 3,
            num_hidden_layers=plan.layers, num_attention_heads=heads, num_key_value_heads=heads, head_dim=64,
            max_position_embeddings=max(plan.contexts) + plan.generated, tie_word_embeddings=True,
        )  # fmt: skip
        adapter = load_adapter("llama")
        mixer = {
            "layers": adapter.layers,
            "attention": adapter.attention,
            "layer_specs": [vars(LayerSpec("discrete_mamba2", heads, 0))] * plan.layers,
            "config": {"head_dim": 64},
        }
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with device:
            teacher = LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
            student = classes_for(adapter)[1](student_config(config, adapter, mixer))
        for model in (teacher, student):
            model.to(dtype).eval().requires_grad_(False)
        return cls(teacher, student, device)


def bench_decoding(device: torch.device, *, quick: bool, report: Report) -> dict[str, Any]:
    """Check a step, then time steps over batch sizes and contexts.

    Args:
        device: where it runs; the size of the models and the lists of batches and contexts follow from it.

    Returns:
        A JSON object: ``batches`` and ``contexts`` (rows of the two metrics), ``together`` (several sequences at the
        last context) and ``measures``.

    Raises:
        NumericsError: the student's logits token by token differ from those of one forward pass.
    """
    plan = QUICK if quick else ON_GPU if device.type == "cuda" else ON_CPU
    report(f"random models of width {plan.width} and {plan.layers} layers")
    models = Models.make(plan, device)
    error = require_same_by_steps(models.student, device)
    context = plan.generated // 2
    batches = []
    for batch in plan.batches:
        report(f"batch {batch}")
        batches += _rows(models, batch, context, plan.steps)
    contexts = []
    for context in plan.contexts:
        report(f"context {context}")
        contexts += _rows(models, 1, context, plan.steps)
    report(f"context {context}, batch {plan.many}")
    together = _rows(models, plan.many, context, plan.steps)
    report("side by side")
    sides = {STUDENT: models.student, TEACHER: models.teacher}
    return {
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in sides.items()},
        "error_by_steps": error,
        "generated": plan.generated,
        "batches": batches,
        "contexts": contexts,
        "together": together,
        "measures": [m.to_json() for m in _measures(models, contexts, together, plan)],
    }


def require_same_by_steps(student: PreTrainedModel, device: torch.device) -> float:
    """Compare the student token by token after a prompt with the student all at once.

    Returns:
        The largest difference of logits over the largest logit.

    Raises:
        NumericsError: it is too large.
    """
    model: Any = student
    ids_bl = torch.randint(student.config.vocab_size, (2, 2 * CHECKED_TOKENS), device=device)
    with torch.inference_mode():
        whole = model(ids_bl, use_cache=False).logits[:, CHECKED_TOKENS:].float()
        cache = model(ids_bl[:, :CHECKED_TOKENS], use_cache=True).past_key_values
        pieces = [
            model(ids_bl[:, t : t + 1], past_key_values=cache, use_cache=True).logits
            for t in range(CHECKED_TOKENS, 2 * CHECKED_TOKENS)
        ]
    difference = float((torch.cat(pieces, 1).float() - whole).abs().max() / whole.abs().max())
    allowed = ALLOWED_DIFFERENCE if student.dtype == torch.float32 else 3e-2
    if not difference <= allowed:
        raise NumericsError(
            f"decoding: token by token, logits differ by {difference:.2g} from all at once, allowed {allowed:.2g}",
            hint="no speed is reported for wrong results; this is a bug of the step or of the device",
        )
    return difference


def _rows(models: Models, batch: int, context: int, steps: int) -> list[dict[str, Any]]:
    """Time student and teacher at one batch and context, one after the other; what does not fit is a result too."""
    rows = []
    for name, make in _decoders(models, batch, context, steps).items():
        row: dict[str, Any] = {"model": name, "batch": batch, "context": context}
        row["cache_bytes"] = _cache_bytes(models, name, batch, context)
        free = available_bytes(models.device)
        # A fifth more for everything else: a cache that grows exists twice while a layer of it is copied.
        if free is not None and row["cache_bytes"] * 1.2 > free:
            row["says"] = f"{OUT_OF_MEMORY}: needs {row['cache_bytes']:,} bytes, {free:,} are free"
        else:
            try:
                timing = side_by_side({name: make()}, ROUNDS, models.device)[name]
                row |= {"tokens_per_second": batch * steps / timing.median, **timing.to_json()}
            except torch.OutOfMemoryError as error:
                row["says"] = f"{OUT_OF_MEMORY}: {str(error).splitlines()[0]}"
        rows.append(row)
    return rows


def _decoders(models: Models, batch: int, context: int, steps: int) -> dict[str, Callable[[], Callable[[], Tensor]]]:
    """For each way to decode, a maker of a function that decodes ``steps`` tokens; the maker allocates the memory."""
    student, teacher = models.student, models.teacher
    run = (batch, context, steps)

    def dynamic() -> Callable[[], Tensor]:
        return steps_of(teacher, _filled(DynamicCache(config=teacher.config), teacher, batch, context), *run)

    def static() -> Callable[[], Tensor]:
        cache = StaticCache(config=teacher.config, max_cache_len=context + steps * (ROUNDS + 1))
        return steps_of(teacher, _filled(cache, teacher, batch, context), *run)

    found = {
        STUDENT_CAPTURED: lambda: steps_of(student, student_cache(student, batch, context), *run, captured=True),
        STUDENT: lambda: steps_of(student, student_cache(student, batch, context), *run),
        TEACHER: dynamic,
        TEACHER_STATIC: static,
    }
    if models.device.type != "cuda":
        del found[STUDENT_CAPTURED]
    return found


def steps_of(
    model: PreTrainedModel, cache: Any, batch: int, context: int, steps: int, captured: bool = False
) -> Callable[[], Tensor]:
    """A function that decodes ``steps`` tokens greedily, from where the cache stands.

    Captured, every step is one CUDA graph: a student's memory is moved on in place, so the graph finds it again.
    """
    caller: Any = model
    ids_b1 = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
    positions_b1 = torch.full((batch, 1), context, device=model.device)

    def step() -> None:
        logits = caller(input_ids=ids_b1, position_ids=positions_b1, past_key_values=cache, use_cache=True).logits
        ids_b1.copy_(logits[:, -1:].argmax(-1))
        positions_b1.add_(1)

    with torch.inference_mode():
        take = _graph_of(step).replay if captured else step

    def run() -> Tensor:
        with torch.inference_mode():
            for _ in range(steps):
                take()
        return ids_b1

    return run


def _graph_of(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # whatever is made once is made before the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def student_cache(student: PreTrainedModel, batch: int, context: int) -> StudentCache:
    """A cache as after ``context`` tokens."""
    cache = StudentCache(student.config)
    for layer, mixer in zip(cache.layers, mixers_of(student).values(), strict=True):  # every layer is grafted
        assert isinstance(layer, RecurrentLayer)
        states = layer.in_place(mixer.state_spec(), torch.empty(batch, 1, dtype=student.dtype, device=student.device))
        layer.write({name: torch.randn_like(state) for name, state in states.items()}, context)
    return cache


def _filled(cache: Cache, teacher: PreTrainedModel, batch: int, context: int) -> Cache:
    """A teacher's cache as after ``context`` tokens."""
    config = teacher.config
    shape = (batch, config.num_key_value_heads, context, config.head_dim)
    for layer in range(config.num_hidden_layers):
        keys = torch.randn(shape, dtype=teacher.dtype, device=teacher.device)
        cache.update(keys, keys.clone(), layer)
    return cache


def _cache_bytes(models: Models, name: str, batch: int, context: int) -> int:
    """The size of a cache for a batch: constant for the student, linear in the context for the teacher."""
    if name in (STUDENT, STUDENT_CAPTURED):
        layers: Any = student_cache(models.student, 1, context).layers
        held = [t for layer in layers for t in layer.states.values()]
        return batch * sum(t.numel() * t.element_size() for t in held)
    config = models.teacher.config
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * context
    return batch * numbers * models.teacher.dtype.itemsize


def _measures(
    models: Models, contexts: list[dict[str, Any]], together: list[dict[str, Any]], plan: Plan
) -> list[Measure]:
    """Constant speed, constant state, and the speed over the teacher at the last context, each side by side."""
    first, last, steps = plan.contexts[0], plan.contexts[-1], plan.steps
    ways = {context: _decoders(models, 1, context, steps) for context in (first, last)}
    best = STUDENT_CAPTURED if STUDENT_CAPTURED in ways[first] else STUDENT
    both = side_by_side({str(context): ways[context][best]() for context in (first, last)}, 3 * ROUNDS, models.device)
    sizes = [row["cache_bytes"] for row in contexts if row["model"] == STUDENT]
    title = f"decoding: tokens/s at {last} over those at {first}"
    measures = [
        Measure(title, both[str(first)].over(both[str(last)]), Bound.AT_LEAST, CONSTANT_SPEED),
        Measure("decoding: largest state over smallest", max(sizes) / min(sizes), Bound.AT_MOST, 1.0),
    ]
    fit = [row for row in (*contexts, *together) if row["context"] == last and "says" not in row]
    for row in fit:
        name, batch = row["model"], row["batch"]
        if name in (TEACHER, TEACHER_STATIC):  # one at a time: two caches of this size may not fit
            makers = _decoders(models, batch, last, steps)
            timings = side_by_side({each: makers[each]() for each in (best, name)}, ROUNDS, models.device)
            title = f"decoding: speed over the {name} at {last}, batch {batch}"
            measures.append(Measure(title, timings[name].over(timings[best]), Bound.AT_LEAST, OVER_TEACHER))
    return measures
