"""The published start of Discrete Mamba-2."""

from __future__ import annotations

import math
from typing import Any

import torch

from mohawkify.mixers.mamba2 import DiscreteMamba2


@torch.no_grad()
def start_identity(mixer: DiscreteMamba2, weights: Any, num_layers: int) -> None:
    """Identity convolution, gate and skip; random projections, the last one divided by the root of the layers.

    Source: Llamba (arXiv 2502.14458), section 3 and the authors' initializer map.
    """
    mixer.reset_parameters()
    mixer.out_proj.weight.mul_(1.0 / math.sqrt(num_layers))
