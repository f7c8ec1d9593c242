"""MLX's models on CPUs with torch's matrix products, for the comparison of an export with its run.

MLX's own make a thousand million operations a second there (measured on x86, in float32 as in four bits), and answer no
signal meanwhile: a student of 135 million parameters takes minutes, and this way seconds.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import torch
from mlx_lm.models.switch_layers import SwitchLinear


def use_torch_on_cpu(model: Any) -> None:
    """Let torch multiply by a model's weights where MLX would do it on a CPU.

    The weights stay as they are stored, and are made float32 for each product; the model is quantised and saved as
    before.
    """
    if mx.default_device() != mx.Device(mx.cpu):
        return
    for module in model.modules():
        module.__class__ = _BY_TORCH.get(type(module), type(module))
        if isinstance(module, SwitchLinear):
            module.weight = module.weight.astype(mx.float32)  # MLX multiplies experts in nothing else on CPUs


def _multiply(module: Any, x: mx.array) -> mx.array:
    """The rows of x (..., d) times the module's weight (f, d), and its bias, in the higher precision of both."""
    weight = module.weight
    dtype = mx.result_type(x, module.get("scales", weight))
    if "scales" in module:
        sizes = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
        weight = mx.dequantize(weight, module.scales, module.get("biases"), **sizes)
    y = mx.array((_as_torch(x) @ _as_torch(weight).T).numpy()).astype(dtype)
    return y + module.bias if "bias" in module else y


def _as_torch(array: mx.array) -> torch.Tensor:
    return torch.from_numpy(np.array(array.astype(mx.float32)))


class _Linear(nn.Linear):
    __call__ = _multiply


class _QuantizedLinear(nn.QuantizedLinear):
    __call__ = _multiply


class _Embedding(nn.Embedding):
    as_linear = _multiply


class _QuantizedEmbedding(nn.QuantizedEmbedding):
    as_linear = _multiply


_BY_TORCH: dict[type, type] = {
    nn.Linear: _Linear,
    nn.QuantizedLinear: _QuantizedLinear,
    nn.Embedding: _Embedding,
    nn.QuantizedEmbedding: _QuantizedEmbedding,
}
