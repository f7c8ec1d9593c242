"""A conversion survives anything: it is killed, starved and damaged here, and must end with the same bits or say why.

Plain ``pytest`` runs a small share, the same trials every time. ``MOHAWKIFY_SOAK=1`` (``make soak``) runs the long form
from a fresh seed that every failure names (``MOHAWKIFY_SOAK_SEED`` repeats one); ``MOHAWKIFY_SOAK_SHARE=0.1`` takes a
tenth of it. ``MOHAWKIFY_SOAK_LOG`` names a file that gets a line of JSON per promise.
"""

from __future__ import annotations

import os
import random

IS_SOAK = os.environ.get("MOHAWKIFY_SOAK", "") not in ("", "0")
SHARE = float(os.environ.get("MOHAWKIFY_SOAK_SHARE", "1"))
SEED = int(os.environ.get("MOHAWKIFY_SOAK_SEED", random.SystemRandom().getrandbits(48) if IS_SOAK else 0))
LOG = os.environ.get("MOHAWKIFY_SOAK_LOG")


def trials(on_change: int, in_soak: int) -> int:
    """How many trials a promise gets in the present form."""
    return max(on_change, round(in_soak * SHARE)) if IS_SOAK else on_change


def chooser(name: str, trial: int) -> random.Random:
    """What a trial draws its times and places from."""
    return random.Random(f"{name} {SEED} {trial}")
