"""When a phase has saturated: its loss no longer falls, and the steps that are left are better not taken.

A phase ends where other text begins or where the learning rate begins to fall, whichever is next. A saturated phase
jumps there at once: warm-up, decay and the text of the finish are the planned ones, and what is left out is the rest of
the stable part. So batch, learning rate and teacher stay pure functions of the planned step.
"""

from __future__ import annotations

from dataclasses import dataclass

from mohawkify.recipe import Saturation


@dataclass
class SaturationWatch:
    """Compares the mean loss of one window of steps with that of the window before; its numbers go into checkpoints.

    Args:
        num_losses: losses seen in the present window.
        total: their sum.
        before: mean loss of the window before; None where there was none.
    """

    num_losses: int = 0
    total: float = 0.0
    before: float | None = None

    def see(self, loss: float, window_steps: int, threshold: float) -> float | None:
        """Take one more loss.

        Args:
            loss: of a step.
            window_steps: steps per window.
            threshold: the least relative improvement from window to window.

        Returns:
            By what fraction the loss has fallen since the window before where that is less than the threshold, else
            None.
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


def next_border(step: int, segment_steps: list[int], decay_step: int) -> int | None:
    """Where the phase of a step ends: at the next segment or where the learning rate begins to fall.

    Args:
        step: steps of the stage taken, as planned.
        segment_steps: steps of each of its segments.
        decay_step: the step from which on the learning rate falls.

    Returns:
        The step at which the next phase begins; None within the decay, which is never cut short.
    """
    if step >= decay_step:
        return None
    border = 0
    for steps in segment_steps:
        border += steps
        if border > step:
            break
    return min(border, decay_step)


def window_steps(saturation: Saturation, tokens_per_step: int) -> int:
    """Steps of a window, one at least."""
    return max(1, round(saturation.window / tokens_per_step))
