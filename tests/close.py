"""One way to compare tensors; the tolerances are the same everywhere."""

from __future__ import annotations

import torch

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def assert_close(name: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None) -> None:
    """Compare by the largest difference over the largest expected magnitude (at least 1).

    Args:
        name: what is compared, for the message.
        actual: the tensor under test.
        expected: the reference.
        tolerance: by default that of the lower of the two precisions.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if tolerance is None:
        tolerance = max(TOLERANCE[actual.dtype], TOLERANCE[expected.dtype])
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    if actual.numel() == 0:
        return
    scale = max(1.0, expected.double().abs().max().item())
    error = (actual.double() - expected.double()).abs().max().item() / scale
    assert error <= tolerance, f"{name}: relative error {error:.3g}, allowed {tolerance:.3g}"
