"""The learning rate is a pure function of the step: the same bits wherever a run continues, within its bounds."""

from __future__ import annotations

import math

from hypothesis import assume, given
from hypothesis import strategies as st

from mohawkify.recipe.schema import ScheduleRecipe
from mohawkify.train.schedule import learning_rate
from tests.fuzz import profile
from tests.fuzz.campaign import counted

PARTS = st.floats(0, 1)


def test_any_schedule() -> None:
    with counted("schedule") as seen:

        @given(
            num_steps=st.integers(1, 300),
            peak=st.floats(1e-12, 10),
            warmup=PARTS,
            decay=PARTS,
            floor=st.floats(0, 1e-3),
            resume=st.integers(0, 299),
        )
        @profile(500)
        def judge(num_steps: int, peak: float, warmup: float, decay: float, floor: float, resume: int) -> None:
            assume(warmup + decay <= 1)
            seen.append(1)
            schedule = ScheduleRecipe(warmup=warmup, decay=decay, floor=floor)
            rates = [learning_rate(step, num_steps, peak, schedule) for step in range(num_steps)]
            again = ScheduleRecipe.model_validate(schedule.model_dump())
            for step in reversed(range(min(resume, num_steps), num_steps)):  # whatever was asked before
                assert learning_rate(step, num_steps, peak, again).hex() == rates[step].hex()
            low, high = min(peak / num_steps, floor, peak), max(peak, floor)
            assert all(math.isfinite(rate) and low * 0.999 <= rate <= high * 1.001 for rate in rates)
            assert all(rate > 0 for rate in rates), "a step that learns nothing"
            rising = rates[: round(warmup * num_steps)]
            assert rising == sorted(rising)

        judge()
