"""What the training loop needs from whatever holds weights and optimiser, and its plain implementation."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from mohawkify.errors import CheckpointError
from mohawkify.recipe import OptimizerRecipe


class Engine(Protocol):
    """Gradients and updates of one stage's parameters, however they are held."""

    def autocast(self) -> AbstractContextManager[object]:
        """The precision a forward pass runs in."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss; several calls may make up one step."""

    def step(self, learning_rate: float) -> float:
        """Update the weights and clear the gradients; returns the gradient norm before clipping."""

    def state(self) -> dict[str, Tensor]:
        """The optimiser's moments by parameter name, for a checkpoint."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""


class LocalEngine:
    """One process, plain torch: AdamW on float32 master weights, the forward pass under autocast.

    Args:
        parameters: what this stage trains, by name. Matrices decay; vectors (biases, norms, skips) do not.
        optimizer: AdamW's settings and the gradient clip.
        precision: ``fp32`` or ``bf16``.
        device: where the weights are.
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter], optimizer: OptimizerRecipe, precision: str, device: torch.device
    ) -> None:
        self.parameters = parameters
        self.gradient_clip = optimizer.gradient_clip
        self.precision, self.device = precision, device
        matrices = [p for p in parameters.values() if p.dim() >= 2]
        vectors = [p for p in parameters.values() if p.dim() < 2]
        groups = [
            {"params": matrices, "weight_decay": optimizer.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]], betas=optimizer.betas, eps=optimizer.epsilon
        )

    def autocast(self) -> AbstractContextManager[object]:
        """bf16 autocast, or nothing."""
        if self.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss."""
        loss.backward()

    def step(self, learning_rate: float) -> float:
        """Clip, update, clear; returns the gradient norm before clipping, and updates nothing if it is not finite."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        value = float(norm)
        if value == value and abs(value) != float("inf"):
            if self.gradient_clip is not None:
                torch.nn.utils.clip_grads_with_norm_(list(self.parameters.values()), self.gradient_clip, norm)
            for group in self.adamw.param_groups:
                group["lr"] = learning_rate
            self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return value

    def state(self) -> dict[str, Tensor]:
        """Moments as ``exp_avg/NAME`` and ``exp_avg_sq/NAME``, and the number of updates as ``step/NAME``."""
        return {
            f"{key}/{name}": value
            for name, parameter in self.parameters.items()
            for key, value in self.adamw.state.get(parameter, {}).items()
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take moments back; every one must belong to a parameter of this stage."""
        for key, value in state.items():
            kind, _, name = key.partition("/")
            if name not in self.parameters:
                raise CheckpointError(f"the checkpoint has optimiser state for {name}, which this stage does not train")
            parameter = self.parameters[name]
            device = torch.device("cpu") if kind == "step" else parameter.device
            self.adamw.state[parameter][kind] = value.to(device)
