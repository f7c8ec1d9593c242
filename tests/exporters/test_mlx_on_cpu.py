"""The matrix products by torch are MLX's own, whatever multiplies."""

from __future__ import annotations

import numpy
import pytest
import torch

from tests.close import assert_close

pytest.importorskip("mlx_lm", reason="needs mlx-lm: pip install 'mohawkify[mlx]'")

import mlx.core as mx
import mlx.nn as nn

from mohawkify.exporters.mlx_on_cpu import use_torch_on_cpu


class Everything(nn.Module):
    """A module of every kind that multiplies, and their products."""

    def __init__(self, bits: int | None) -> None:
        super().__init__()
        self.embedding, self.linear, self.biased = nn.Embedding(12, 64), nn.Linear(64, 10, False), nn.Linear(64, 7)
        if bits:
            nn.quantize(self, 64, bits)

    def __call__(self, ids: mx.array, dtype: mx.Dtype) -> list[mx.array]:
        x = self.embedding(ids).astype(dtype)
        return [self.linear(x), self.biased(x), self.embedding.as_linear(x)]


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_products_are_those_of_mlx(bits: int | None, dtype: mx.Dtype) -> None:
    mx.random.seed(0)
    model, ids = Everything(bits), mx.array([[3, 1, 11], [0, 5, 2]])
    expected = model(ids, dtype)
    use_torch_on_cpu(model)
    if mx.default_device() == mx.Device(mx.cpu):
        assert type(model.linear) not in (nn.Linear, nn.QuantizedLinear)
    for found, wanted in zip(model(ids, dtype), expected, strict=True):
        assert found.dtype == wanted.dtype
        found, wanted = (torch.from_numpy(numpy.array(each.astype(mx.float32))) for each in (found, wanted))
        assert_close("product", found, wanted, tolerance=1e-5 if dtype == mx.float32 else 2**-7)
