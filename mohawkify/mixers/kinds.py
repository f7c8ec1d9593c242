"""The kinds of mixers that come with mohawkify, with the operators and starts that do not travel with exports."""

from __future__ import annotations

from functools import partial

from torch import nn

from mohawkify.mixers.mamba2 import DiscreteMamba2
from mohawkify.mixers.mixer import Mixer, matrix_parameters, mixer_class, mixer_kinds, mixers_of
from mohawkify.mixers.start_attention import start_from_attention
from mohawkify.mixers.start_calibrated import CalibratedStart, start_silent
from mohawkify.mixers.start_identity import start_identity
from mohawkify.ops import dispatch

__all__ = ["Mixer", "matrix_parameters", "mixer_class", "mixer_kinds", "mixers_of", "use_kernels"]

# The code that travels with a student computes in plain torch; where mohawkify is installed, kernels are used.
DiscreteMamba2.scan = staticmethod(dispatch.scan)
DiscreteMamba2.step = staticmethod(dispatch.step)
DiscreteMamba2.starts = {
    "identity": start_identity,
    "attention": start_from_attention,
    "calibrated": start_silent,
}
DiscreteMamba2.calibration = CalibratedStart


def use_kernels(student: nn.Module, kernels: str) -> None:
    """Make a student's mixers compute by a recipe's ``compute.kernels``; see `dispatch.backend`."""
    for mixer in mixers_of(student).values():
        if isinstance(mixer, DiscreteMamba2):
            mixer.scan = partial(dispatch.scan, kernels=kernels)
            mixer.step = partial(dispatch.step, kernels=kernels)
