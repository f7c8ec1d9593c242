"""Ends a phase of a stage early where it is on a plateau: its loss no longer falls.

A phase ends where other text begins or where the learning rate begins to fall, whichever is next. A phase on a plateau
skips to there at once: only steps of the stable part are left out, none of warm-up, decay or final phase. So batch,
learning rate and teacher stay pure functions of the planned step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from mohawkify.recipe.schema import ScheduleRecipe, Segment, StageRecipe
from mohawkify.train.schedule import decay_step, warmup_steps


@dataclass
class PlateauDetector:
    """Compares the mean loss of one window of steps with that of the window before; checkpoints keep it.

    Args:
        num_losses: losses in the present window.
        total: their sum.
        before: mean loss of the window before; None where there was none.
    """

    num_losses: int = 0
    total: float = 0.0
    before: float | None = None

    def reset(self) -> None:
        """Start afresh for another phase."""
        self.num_losses, self.total, self.before = 0, 0.0, None

    def add(self, loss: float, window_steps: int, threshold: float) -> float | None:
        """Add a loss.

        Args:
            loss: of a step.
            window_steps: steps per window.
            threshold: the least relative improvement from window to window.

        Returns:
            The fraction by which the loss has fallen since the window before, where it is less than the threshold;
            else None.
        """
        self.num_losses += 1
        self.total += loss
        if self.num_losses < window_steps:
            return None
        mean, before = self.total / window_steps, self.before
        self.num_losses, self.total, self.before = 0, 0.0, mean
        if before is None:
            return None
        # A loss may be negative or 0 in theory: then nothing is left to improve.
        improvement = (before - mean) / before if before > 0 else 0.0
        return improvement if improvement < threshold else None


class Skip(NamedTuple):
    """A phase on a plateau.

    Args:
        step: the planned step to go on with, counted from 0.
        improvement: the fraction by which the loss fell within a window.
        threshold: the fraction that was expected.
        window: tokens of a window.
    """

    step: int
    improvement: float
    threshold: float
    window: int


class Phases:
    """A stage's planned steps: the text that they read, and the step at which a phase on a plateau goes on.

    Args:
        stage: budgets, and the threshold of a plateau.
        schedule: where the learning rate rises and falls.
    """

    def __init__(self, stage: StageRecipe, schedule: ScheduleRecipe) -> None:
        self.plateau, self.segments, self.batch_sequences = stage.plateau, stage.segments(), stage.batch_sequences
        self.num_steps = stage.num_steps
        self._warmup = warmup_steps(self.num_steps, schedule)
        self._decay = decay_step(self.num_steps, schedule)

    def segment_at(self, step: int) -> Segment:
        """The text of a step, counted from 0."""
        for segment in self.segments:
            if step < segment.num_steps:
                return segment
            step -= segment.num_steps
        raise IndexError("the step is beyond the stage's end")

    def border_after(self, step: int) -> int | None:
        """The step at which the phase of a step ends; None within the decay, which is never cut short."""
        if step >= self._decay:
            return None
        border = 0
        for segment in self.segments:
            border += segment.num_steps
            if border > step:
                break
        return min(border, self._decay)

    def window_steps(self, segment: Segment) -> int:
        """Steps of a window, one at least."""
        assert self.plateau is not None
        return max(1, round(self.plateau.window / (segment.sequence_length * self.batch_sequences)))

    def skip_to(self, step: int, metrics: Mapping[str, float], detector: PlateauDetector) -> Skip | None:
        """The skip that a step causes, if the phase is on a plateau with it.

        Compared is the KL divergence where the stage has one, else the loss: the entropy of the teacher's predictions,
        which is in the loss too, differs from text to text, and no student can lower it.

        Args:
            step: planned steps up to and with this one.
            metrics: of this step; none where no prediction counted: such a step says nothing about the loss.
            detector: of this phase so far; changed.
        """
        border = self.border_after(step - 1)
        if self.plateau is None or border is None or step <= self._warmup:
            return None
        if step == border:
            detector.reset()
            return None
        if not metrics:
            return None
        window = self.window_steps(self.segment_at(step - 1))
        improvement = detector.add(metrics.get("kl", metrics["loss"]), window, self.plateau.threshold)
        if improvement is None:
            return None
        detector.reset()
        return Skip(border, improvement, self.plateau.threshold, self.plateau.window)

    def tokens_between(self, first: int, end: int) -> int:
        """Tokens that planned steps read, from one up to, but not with, another."""
        tokens, begin = 0, 0
        for segment in self.segments:
            steps = max(0, min(end, begin + segment.num_steps) - max(first, begin))
            tokens += steps * segment.sequence_length * self.batch_sequences
            begin += segment.num_steps
        return tokens

    def tokens_to_read(self, skipped: Mapping[str, int]) -> int:
        """Tokens of all planned steps but the skipped ones."""
        return sum(row["tokens"] for row in self.outcome(skipped))

    def tokens_read(self, step: int, skipped: Mapping[str, int]) -> int:
        """Tokens of the planned steps before one, but the skipped ones."""
        num_skipped = self.tokens_between(0, self.num_steps) - self.tokens_to_read(skipped)
        return self.tokens_between(0, step) - num_skipped

    def outcome(self, skipped: Mapping[str, int]) -> list[dict[str, Any]]:
        """The outcome of each phase, as JSON: ``data``, ``steps``, ``tokens`` and ``ended_by``.

        Args:
            skipped: planned steps that were not taken, by text.
        """
        rows = []
        for segment in self.segments:
            num_skipped = skipped.get(segment.data, 0)
            steps = segment.num_steps - num_skipped
            tokens = steps * segment.sequence_length * self.batch_sequences
            ended_by = "plateau" if num_skipped else "budget"
            rows.append({"data": segment.data, "steps": steps, "tokens": tokens, "ended_by": ended_by})
        return rows
