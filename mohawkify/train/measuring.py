"""The comparison of student and teacher on held-out text, after every stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from mohawkify.data.validation import EvaluationBatch, evaluation_batches, first_rows
from mohawkify.distributed.shutdown import Shutdown
from mohawkify.evaluation.fidelity import Fidelity, Processes, measure_fidelity
from mohawkify.train.conversion import Conversion
from mohawkify.train.engines.engine import Engine
from mohawkify.train.plateau import Phases
from mohawkify.train.training_state import TrainingState
from mohawkify.train.watchdog import Watchdog

START = "init"  # the measurement before the first stage
WITHIN_TOKENS = 4096  # held-out tokens of a measurement within a stage, at most


def measured(conversion: Conversion) -> list[str]:
    """The names of the measurements in results.json: `START` and stages."""
    return conversion.world.on_rank0(lambda: list(conversion.run.results()["stages"]))


def drop_lost_measurements(conversion: Conversion, state: TrainingState) -> None:
    """Drop the measurements of stages that are not finished any more, because their checkpoints are lost."""

    def drop() -> None:
        results = conversion.run.results()
        kept = {START} if not state.stage else {START, *_finished_stages(conversion, state)}
        lost = [name for name in results["stages"] if name not in kept]
        for name in lost:
            conversion.options.report(
                f"the checkpoints that {name} was measured at are lost: it will be measured again"
            )
            del results["stages"][name]
        if lost:
            conversion.run.write_results(results)

    conversion.world.on_rank0(drop)


def _finished_stages(conversion: Conversion, state: TrainingState) -> list[str]:
    blocks = conversion.recipe.stages.blocks()
    names = list(blocks)
    number = names.index(state.stage) + (state.stage_step == blocks[state.stage].num_steps)
    return names[:number]


def measure(conversion: Conversion, name: str, state: TrainingState, stop: Shutdown) -> dict[str, float]:
    """Compare student and teacher on held-out text, of which each process reads a part, and record the metrics.

    Args:
        conversion: the run; its teacher is the first one.
        name: the stage, or `START`.
        state: how far the run is.
        stop: a request to stop ends the measurement.

    Returns:
        ``perplexity``, ``kl`` (nats per token) and ``top1``.
    """
    world, report = conversion.world, conversion.options.report
    with Watchdog(conversion.options.hang_timeout, f"measuring after {name}", world) as hang:

        def on_batch(num_tokens: int) -> None:
            hang.heartbeat()
            stop.check(f"while measuring after {name}")

        agreement = _compare(conversion, conversion.held_out, on_batch)
    metrics = {"perplexity": agreement.perplexity, "kl": agreement.kl, "top1": agreement.top1}

    def record() -> None:
        results = conversion.run.results()
        results["teacher"]["perplexity"] = agreement.teacher_perplexity
        results["evaluation_tokens"] = agreement.tokens
        results["stages"][name] = {
            "tokens": state.tokens,
            "steps": state.global_step,
            **metrics,
            "seconds": state.seconds.get(name, 0.0),
            **({} if name == START else {"phases": _phases(conversion, name, state)}),
            **({"idle_steps": state.num_idle} if state.num_idle else {}),
        }
        conversion.run.write_results(results)
        _report_if_worse(conversion, name, results["stages"])

    world.on_rank0(record)
    if state.num_idle:
        report(f"{name}: in {state.num_idle:,} steps no prediction counted; they changed nothing")
    report(
        f"after {name}: KL {agreement.kl:.4f} nats/token, top-1 {agreement.top1:.4f}, "
        f"perplexity {agreement.perplexity:.3f} (teacher {agreement.teacher_perplexity:.3f})"
    )
    return metrics


def _compare(
    conversion: Conversion, rows: list[np.ndarray], on_batch: Callable[[int], None], engine: Engine | None = None
) -> Fidelity:
    """Compare student and teacher; each process reads a part of the rows. An engine holds the student, if given."""
    world = conversion.world
    batches = list(evaluation_batches(rows, conversion.recipe.evaluation.batch_sequences))
    while len(batches) % world.size:  # all processes call a teacher that is spread over them equally often
        batches.append(EvaluationBatch(batches[-1].input_ids, torch.zeros_like(batches[-1].valid)))
    with nullcontext() if engine is None else engine.autocast():
        return measure_fidelity(
            conversion.models.student,
            conversion.models.teacher,
            batches[world.rank :: world.size],
            device=conversion.device,
            progress=on_batch,
            processes=Processes(world.sum) if engine is None else Processes(world.sum, engine.call),
        )


def measure_within(
    conversion: Conversion, state: TrainingState, engine: Engine, on_batch: Callable[[int], None]
) -> dict[str, float]:
    """Compare student and teacher within a stage, on `WITHIN_TOKENS` held-out tokens at most.

    Args:
        conversion: the run; its teacher is the first one.
        state: how far the run is; it keeps the KL of the stage's first measurement.
        engine: holds the student.
        on_batch: called after every batch.

    Returns:
        ``perplexity``, ``kl`` (nats per token) and ``top1``.
    """
    agreement = _compare(conversion, first_rows(conversion.held_out, WITHIN_TOKENS), on_batch, engine)
    report = conversion.options.report
    report(
        f"{state.stage} after {state.stage_step:,} steps: KL {agreement.kl:.4f} nats/token, top-1 {agreement.top1:.4f}"
        f" on {agreement.tokens:,} held-out predictions"
    )
    if state.first_kl is None:
        state.first_kl = agreement.kl
    elif agreement.kl > state.first_kl:
        report(
            f"stage {state.stage} has made the student worse so far: KL {state.first_kl:.4f} at its first measurement;"
            f" a lower stages.{state.stage}.learning_rate may help"
        )
    return {"perplexity": agreement.perplexity, "kl": agreement.kl, "top1": agreement.top1}


def _report_if_worse(conversion: Conversion, name: str, stages: Mapping[str, Mapping[str, float]]) -> None:
    """Say so where a stage left the student further from its teacher than it found it."""
    names = list(stages)
    before = names[names.index(name) - 1] if name != START else name
    if stages[name]["kl"] > stages[before]["kl"]:
        conversion.options.report(
            f"stage {name} made the student worse: KL {stages[before]['kl']:.4f} before it, {stages[name]['kl']:.4f}"
            f" after it; a lower stages.{name}.learning_rate or more tokens may help"
        )


def _phases(conversion: Conversion, name: str, state: TrainingState) -> list[dict[str, Any]]:
    """How each phase of a stage ended; reported where a stage has several or may end early."""
    block = conversion.recipe.stages.blocks()[name]
    outcome = Phases(block, conversion.recipe.schedule).outcome(state.skipped)
    if block.plateau is not None or len(outcome) > 1:
        phases = (f"{row['tokens']:,} tokens of {row['data']} text, ended by {row['ended_by']}" for row in outcome)
        conversion.options.report(f"{name}: {'; '.join(phases)}")
    return outcome
