"""The rules by which a recipe is written for a teacher and a budget, and those of a range test: numbers, and no torch.

Every number was measured or is called assumed; docs/log.md has the experiments.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mohawkify.recipe.schema import StageRecipe

Steps = tuple[tuple[int, float], ...]  # from so many tokens on, a value


@dataclass(frozen=True)
class Budget:
    """What a recipe is to be written for; exactly one is known.

    Args:
        tokens: of all stages together.
        seconds: of the whole conversion; a measured step then gives the tokens.
    """

    tokens: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class RecipeRules:
    """What a recipe has for a teacher and a budget.

    Args:
        calibration_per_width: tokens of the calibration for each of the teacher's hidden dimensions; 28 are 16 k at the
            576 of SmolLM2-135M, measured there. Its features grow with the width.
        least_calibration: tokens of a narrow teacher's calibration.
        most_calibration: the share of a budget that a calibration may take.
        calibration: sequences of a batch of the calibration, and the most tokens of one.
        align: the share of the other tokens that align gets: none in short runs, where distillation alone is as good
            (50 k tokens, SmolLM2-135M), half in longer ones (100 k, SmolLM2-135M; 1.5 M, stories260k), and what Llamba
            has at its budget; the borders are assumed.
        align_mixers_to: the budget up to which align trains mixers alone, with more tokens per second.
        length: tokens per sequence; 2,048 as published, assumed in between.
        step_tokens: tokens of an optimizer step in short runs, measured on both teachers.
        step_tokens_from: the budget up to which that holds.
        step_growth: the power with which the tokens of a step grow from there, to 262,144 at 8 B tokens, as published.
        decay: the share of the steps in which the learning rate falls: half, measured up to 4 M; as published at 8 B.
        state_size: the least and the most; in between it is as wide as a head.
        narrow: teachers of less width compute fastest in one thread, and in float32 on a CPU.
        evaluation: the budget over the held-out tokens, and the least and the most of those.
        measurements: how many a run makes within stages, and the least tokens between them.
        checkpoints: how many a stage writes, and the least and the most steps between them.
        rates: by stage the learning rate of a teacher of width 64, and the power with which it falls with the width:
            good ones of stories260k (64 wide) and SmolLM2-135M (576); distill comes near Llamba-8B's (4,096). For
            stages that are too short for a range test.
        memory: the share of the memory of a machine without a GPU that a run may take.
    """

    calibration_per_width: int = 28
    least_calibration: int = 16_384
    most_calibration: float = 1 / 3
    calibration: tuple[int, int] = (4, 256)
    align: Steps = ((0, 0.0), (80_000, 0.48), (100_000_000, 0.35))
    align_mixers_to: int = 10_000_000
    length: Steps = ((0, 256), (2_000_000, 512), (30_000_000, 1024), (300_000_000, 2048))
    step_tokens: int = 1024
    step_tokens_from: int = 2_000_000
    step_growth: float = 0.67
    decay: Steps = ((0, 0.5), (100_000_000, 0.1))
    state_size: tuple[int, int] = (32, 64)
    narrow: int = 256
    evaluation: tuple[int, int, int] = (50, 8192, 200_000)
    measurements: tuple[int, int] = (10, 100_000)
    checkpoints: tuple[int, int, int] = (10, 50, 500)
    rates: tuple[tuple[str, float, float], ...] = (("align", 2e-3, 0.63), ("distill", 1e-3, 1.05))
    memory: float = 0.8

    def stage_tokens(self, tokens: int, width: int) -> dict[str, int]:
        """The tokens of every stage, which add up to the budget."""
        calibrate = min(
            max(self.calibration_per_width * width, self.least_calibration), int(self.most_calibration * tokens)
        )
        align = round_count(at(self.align, tokens) * (tokens - calibrate))
        return {"calibrate": calibrate, "orient": 0, "align": align, "distill": tokens - calibrate - align}

    def within(self, tokens: int) -> int | None:
        """The tokens between measurements within stages; None in runs that are too short for them."""
        number, least = self.measurements
        return max(round_count(tokens / number), least) if tokens >= 2 * least else None

    def batch(self, tokens: int, longest: int, num_processes: int) -> tuple[int, int]:
        """Tokens per sequence, and sequences per step, which the processes share evenly.

        Args:
            tokens: the budget.
            longest: the longest sequence that the teacher was made for.
            num_processes: the processes.
        """
        length = min(int(at(self.length, tokens)), longest)
        growth = max(tokens / self.step_tokens_from, 1.0) ** self.step_growth
        sequences = 2 ** max(round(math.log2(self.step_tokens * growth / length)), 1)
        return length, -(-sequences // num_processes) * num_processes

    def learning_rate(self, stage: str, width: int) -> float:
        """The peak for a stage that is too short for a range test; one without a rule of its own has that of align."""
        rates = {name: (rate, power) for name, rate, power in self.rates}
        rate, power = rates.get(stage, rates["align"])
        return round_rate(rate * (64 / width) ** power)

    def calibration_batch(self, length: int, num_processes: int) -> dict[str, int]:
        """Sequences of a calibration, whose matrices of attention are whole for a layer at a time."""
        sequences = -(-self.calibration[0] // num_processes) * num_processes
        return {"sequence_length": min(length, self.calibration[1]), "batch_sequences": sequences}


def at(steps: Steps, tokens: int) -> float:
    """The value of the last step that a budget reaches."""
    return max((step for step in steps if step[0] <= tokens), key=lambda step: step[0])[1]


def round_count(count: float) -> int:
    """A count of three digits."""
    return int(float(f"{count:.3g}"))


@dataclass(frozen=True)
class RangeRules:
    """Which rates a range test tries, how, and what it makes of the best.

    Args:
        first: the rate that it begins with; it goes on upwards, then downwards from there.
        factor: from one rate to the next.
        lowest: no lower rate is tried.
        highest: no higher rate is tried.
        share: of a stage's tokens that a test may read which a written recipe asks for.
        usual_rates: how many rates a test tries.
        fewest_steps: optimizer steps at a rate. With two of 133 tokens every rate from 1e-6 on made the loss on other
            text of SmolLM2-135M higher, where 5e-4 was good: so few tokens show noise.
        most_steps: optimizer steps at a rate where the budget allows more.
        growth: the stage's rate over the best one after so little text: the ratio of the texts to this power.
    """

    first: float = 1e-4
    factor: float = 10 ** (1 / 3)
    lowest: float = 1e-6
    highest: float = 1e-1
    share: float = 0.05
    usual_rates: int = 5
    fewest_steps: int = 3
    most_steps: int = 16
    growth: float = 0.3

    def walks(self) -> Iterator[list[float]]:
        """Yields the rates upwards from the first, then those downwards."""
        upwards = math.floor(math.log(self.highest / self.first, self.factor) + 1e-9)
        downwards = math.floor(math.log(self.first / self.lowest, self.factor) + 1e-9)
        for steps in (range(upwards + 1), range(-1, -downwards - 1, -1)):
            yield [round_rate(self.first * self.factor**step) for step in steps]

    def steps(self, block: StageRecipe) -> int:
        """Optimizer steps at a rate; the loss is measured on one batch more."""
        affordable = int(self.share * block.tokens / self.usual_rates / block.tokens_per_step) - 1
        return min(max(affordable, self.fewest_steps), self.most_steps)

    def least_tokens(self, step_tokens: int) -> int:
        """The tokens of a stage from which on its share pays for a test."""
        return math.ceil(self.usual_rates * (self.fewest_steps + 1) * step_tokens / self.share)

    def cost(self, block: StageRecipe) -> float:
        """What a test usually reads, over the stage's tokens."""
        return self.usual_rates * (self.steps(block) + 1) * block.tokens_per_step / block.tokens

    def best(self, losses: Mapping[float, float], start: float, ratio: float) -> float:
        """The rate for the stage.

        Args:
            losses: by rate, after the steps; infinite where a number was not finite.
            start: the loss before any step.
            ratio: tokens of the stage over those that a rate was tried on.

        Returns:
            The lowest point of the parabola through the best rate and its neighbours, grown; the lowest rate of all
            where none of them lowered the loss.
        """
        rates = sorted(losses)
        index = min(range(len(rates)), key=lambda number: losses[rates[number]])
        if not losses[rates[index]] < start:
            return round_rate(rates[0])
        shift = 0.0
        if 0 < index < len(rates) - 1:
            below, at, above = (min(losses[rate], start) for rate in rates[index - 1 : index + 2])
            shift = (below - above) / (2 * (below - 2 * at + above))
        return round_rate(rates[index] * self.factor**shift * max(ratio, 1.0) ** self.growth)


def round_rate(rate: float) -> float:
    """Two digits of a learning rate."""
    return float(f"{rate:.1e}")
