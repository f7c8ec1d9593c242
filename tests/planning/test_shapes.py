"""Tensors without numbers: what PyTorch and transformers take them for, and the bytes that are counted."""

import pytest
import torch
from transformers.utils.import_utils import is_tracing

from mohawkify.planning.shapes import Shapes


def test_what_is_alive_counts_once_and_the_most_is_remembered():
    with Shapes() as shapes:
        known = torch.empty(1000)
        shapes.start([known])
        known += 1
        made = known[:10] + torch.ones(10)  # 40 bytes each
        view = made.view(2, 5).t()
        assert (shapes.bytes, shapes.peak) == (40, 80)
        del made
        assert shapes.bytes == 40
        del view
        assert (shapes.bytes, shapes.peak) == (0, 80)


def test_autograd_and_autocast_work_as_on_the_cpu_and_keep_what_they_save():
    with Shapes() as shapes, torch.autocast("cpu", dtype=torch.bfloat16):
        weight = torch.nn.Parameter(torch.empty(7, 5))
        shapes.start([weight])
        out = torch.nn.functional.linear(torch.empty(3, 5), weight)
        assert (out.shape, out.dtype, out.device.type) == ((3, 7), torch.bfloat16, "cpu")
        assert shapes.bytes == 2 * (3 * 5 + 7 * 5 + 3 * 7)  # the input in bf16 is kept for the weight's gradient
        out.sum().backward()
        assert (weight.grad.shape, weight.grad.dtype) == ((7, 5), torch.float32)


def test_values_cannot_be_read_and_transformers_does_not_try():
    with Shapes():
        tensor = torch.ones(3)
        assert is_tracing(tensor)
        with pytest.raises(RuntimeError, match="meta"):
            bool(tensor.sum() > 0)
