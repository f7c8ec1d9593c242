"""Fuzzing: what strangers' files and odd command lines may do, drawn at random, with everything that ever failed kept.

Plain ``pytest`` runs the profile "change": few cases, the same ones every time. ``MOHAWKIFY_FUZZ=N`` runs the profile
"soak": N times as many, from a fresh seed that is printed (``MOHAWKIFY_FUZZ_SEED`` repeats one), each target going on
after a failure; ``MOHAWKIFY_FUZZ_LOG`` names a file that gets a line of JSON per target.
"""

from __future__ import annotations

import os
import random

from hypothesis import HealthCheck, settings

FACTOR = int(os.environ.get("MOHAWKIFY_FUZZ", "0"))
IS_SOAK = FACTOR > 0
SEED = int(os.environ.get("MOHAWKIFY_FUZZ_SEED", random.SystemRandom().getrandbits(48) if IS_SOAK else 0))
LOG = os.environ.get("MOHAWKIFY_FUZZ_LOG")

_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
CHANGE = settings(derandomize=True, deadline=None, database=None, suppress_health_check=_SLOW)
SOAK = settings(derandomize=False, deadline=None, suppress_health_check=_SLOW, print_blob=True)
settings.register_profile("change", CHANGE)
settings.register_profile("soak", SOAK)


def cases(number: int) -> int:
    """How many cases a target runs in the present profile.

    Args:
        number: how many on every change.
    """
    return number * max(1, FACTOR)


def profile(number: int, **changes: int) -> settings:
    """The settings of a Hypothesis test that runs this many examples on every change."""
    return settings(SOAK if IS_SOAK else CHANGE, max_examples=cases(number), **changes)
