"""The device of this process."""

from __future__ import annotations

import torch

from mohawkify.errors import UsageError


def choose_device(name: str) -> torch.device:
    """The device for a recipe's ``compute.device``; ``auto`` prefers a GPU.

    Raises:
        UsageError: this machine has no such device.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, is_present in present.items() if is_present)
    if not present[name]:
        raise UsageError(f"compute.device is {name}, which this machine does not have", hint="use auto or cpu")
    return torch.device(name)


def multiplies_bf16(device: str) -> bool:
    """Whether a device has instructions for products of bfloat16: CPUs without compute them slower than float32."""
    if device != "cpu":
        return True
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 has no such function
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has finished its queue, so that a measured time includes it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
