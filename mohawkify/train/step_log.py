"""The log of a run: a line of metrics for every step, and the same metrics for trackers."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from mohawkify.run.metrics import MetricsLog
from mohawkify.train.checks import RefusedStepError
from mohawkify.train.conversion import Conversion
from mohawkify.train.loop import StepReport
from mohawkify.train.tracking import TrackedRun, Tracking, tracking_id
from mohawkify.train.training_state import TrainingState


class StepLog:
    """Writes metrics in the main process, and reports losses that leap; leaving the block closes the trackers.

    Args:
        conversion: the run.
        first_step: optimizer steps taken before.
    """

    def __init__(self, conversion: Conversion, first_step: int) -> None:
        run, options = conversion.run, conversion.options
        self._report, self._is_rank0 = options.report, conversion.world.is_rank0
        self._metrics = MetricsLog(run.metrics_file, options.report)
        self._tracking: Tracking | None = None
        if options.track and self._is_rank0:
            self._tracking = Tracking(
                options.track,
                first_step,
                TrackedRun(
                    options.track_project,
                    tracking_id(run.tracking_file),
                    conversion.models.spec.name,
                    run.tracking,
                    conversion.recipe.model_dump(mode="json"),
                ),
                options.report,
            )

    def __enter__(self) -> StepLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tracking is not None:
            self._tracking.close()

    def add_step(self, step: StepReport, state: TrainingState, improvement: float | None) -> None:
        """Write a step's line.

        Args:
            step: the step.
            state: how far the run is with it.
            improvement: of the loss, where it is so small that the phase ends here.
        """
        deviations = state.losses.add(step.metrics["loss"]) if step.metrics else None
        if not self._is_rank0:
            return
        if deviations is not None:
            self._report(
                f"step {step.step:,} of stage {state.stage}: the loss {step.metrics['loss']:.4g} is"
                f" {deviations:.1f} standard deviations above the recent ones"
            )
        record = {
            "stage": state.stage,
            "step": step.step,
            "global_step": state.global_step,
            "tokens": state.tokens,
            **step.metrics,
            "learning_rate": step.learning_rate,
            **({"gradient_norm": step.gradient_norm} if step.metrics else {"idle": True}),
            "seconds": step.seconds,
            **({} if deviations is None else {"spike": deviations}),
            **({} if improvement is None else {"plateau": improvement}),
        }
        self._metrics.append(record)
        self._track(state.stage, {key: value for key, value in record.items() if key != "global_step"}, state)

    def add_refused(self, error: RefusedStepError, state: TrainingState, data: str) -> None:
        """Write the line of a step that was refused, with the text that it read."""
        if self._is_rank0:
            step = {"stage": state.stage, "step": state.stage_step + 1, "global_step": state.global_step + 1}
            self._metrics.append({**step, **error.metrics, "refused": True, "text": data, "sequences": error.sequences})

    def add_measurement(self, metrics: Mapping[str, float], state: TrainingState) -> None:
        """Send the metrics on held-out text to the trackers."""
        self._track("held-out", metrics, state)

    def add_measurement_within(self, metrics: Mapping[str, float], state: TrainingState) -> None:
        """Write a line with the metrics on held-out text within a stage."""
        if self._is_rank0:
            step = {"stage": state.stage, "step": state.stage_step, "global_step": state.global_step}
            self._metrics.append({**step, "tokens": state.tokens, "held_out": dict(metrics)})
        self._track("held-out-within", metrics, state)

    def flush(self) -> None:
        """Force all lines to the disk."""
        self._metrics.flush()

    def _track(self, group: str, metrics: Mapping[str, Any], state: TrainingState) -> None:
        if self._tracking is not None:
            self._tracking.log({f"{group}/{key}": value for key, value in metrics.items()}, state.global_step)
