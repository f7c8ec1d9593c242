"""What the training loop needs from whatever holds weights and optimiser, and its plain implementation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mohawkify.errors import CheckpointError
from mohawkify.recipe.schema import OptimizerRecipe


class Engine(Protocol):
    """The student during one stage: its parameters, gradients and updates, however they are spread over processes.

    All processes of a run make the same calls in the same order. Whole tensors are exchanged by name, in float32, so
    that a checkpoint knows nothing of the engine that wrote it.
    """

    def accumulating(self) -> AbstractContextManager[object]:
        """Encloses all forward and backward passes of one step, but not the step itself."""

    def autocast(self) -> AbstractContextManager[object]:
        """The precision a forward pass runs in."""

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function that runs a part of the student; the parameters of the modules it calls are whole."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss; the losses of all calls in all processes make up the step's, as a sum."""

    def step(self, learning_rate: float) -> float:
        """Update the weights and clear the gradients; returns the gradient norm before clipping, of all processes.

        Nothing is updated where it is not finite.
        """

    def shard(self, name: str) -> Tensor:
        """A parameter in float32, or as much of it as is in this process, which may be nothing."""

    def gradient(self, name: str) -> Tensor | None:
        """The gradient of a trained parameter's `shard`, after `accumulating`; None where there is none."""

    def parameters(self) -> dict[str, Tensor]:
        """All parameters of the student, whole and on the CPU or their device; in the main process, else empty."""

    def load_parameters(self, tensors: Mapping[str, Tensor]) -> None:
        """Set all parameters of the student; every process gives all of them."""

    def state(self) -> dict[str, Tensor]:
        """The optimiser's whole moments, in the main process, else empty.

        ``exp_avg/NAME`` and ``exp_avg_sq/NAME``, and the number of updates as ``step/NAME``.
        """

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave; every process gives all of it."""

    def close(self) -> None:
        """Give the student back with plain whole parameters in every process; the engine is of no use after that."""


def make_adamw(trained: Mapping[str, nn.Parameter], optimizer: OptimizerRecipe) -> torch.optim.AdamW:
    """AdamW as the recipe has it; matrices decay, vectors do not."""
    matrices = [p for p in trained.values() if p.dim() >= 2]
    vectors = [p for p in trained.values() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": optimizer.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], betas=optimizer.betas, eps=optimizer.epsilon
    )


class LocalEngine:
    """One process, plain torch: AdamW on float32 master weights, the forward pass under autocast.

    Args:
        student: the student.
        trained: those of its parameters that the stage trains, by name. Matrices decay; vectors (biases, norms, skips)
            do not.
        optimizer: AdamW's settings and the gradient clip.
        precision: ``fp32`` or ``bf16``.
        device: where the weights are.
    """

    def __init__(
        self,
        student: nn.Module,
        trained: dict[str, nn.Parameter],
        optimizer: OptimizerRecipe,
        precision: str,
        device: torch.device,
    ) -> None:
        self.student, self.trained = student, trained
        self._named = dict(student.named_parameters())
        for name, parameter in self._named.items():  # or frozen ones would pile up gradients that nobody uses
            parameter.requires_grad_(name in trained)
        self.gradient_clip = optimizer.gradient_clip
        self.precision, self.device = precision, device
        self.adamw = make_adamw(trained, optimizer)

    def accumulating(self) -> AbstractContextManager[object]:
        """Nothing to do: torch adds gradients up by itself."""
        return nullcontext()

    def autocast(self) -> AbstractContextManager[object]:
        """bf16 autocast, or nothing."""
        if self.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call it: the parameters are always whole."""
        return function(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss."""
        loss.backward()

    def step(self, learning_rate: float) -> float:
        """Clip, update, clear; returns the gradient norm before clipping, and updates nothing if it is not finite."""
        gradients = [p.grad for p in self.trained.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        value = float(norm)
        if value == value and abs(value) != float("inf"):
            if self.gradient_clip is not None:
                torch.nn.utils.clip_grads_with_norm_(list(self.trained.values()), self.gradient_clip, norm)
            for group in self.adamw.param_groups:
                group["lr"] = learning_rate
            self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return value

    def shard(self, name: str) -> Tensor:
        """The whole parameter."""
        return self._named[name].detach()

    def gradient(self, name: str) -> Tensor | None:
        """The whole gradient."""
        return self.trained[name].grad

    def parameters(self) -> dict[str, Tensor]:
        """The parameters themselves."""
        return dict(self.student.named_parameters())

    def load_parameters(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors into the parameters."""
        with torch.no_grad():
            for name, parameter in self.student.named_parameters():
                parameter.copy_(tensors[name])

    def state(self) -> dict[str, Tensor]:
        """The optimiser's own tensors."""
        return {
            f"{key}/{name}": value
            for name, parameter in self.trained.items()
            for key, value in self.adamw.state.get(parameter, {}).items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take moments back; every one must belong to a parameter of this stage."""
        for key, value in state.items():
            kind, _, name = key.partition("/")
            if name not in self.trained:
                raise CheckpointError(f"the checkpoint has optimiser state for {name}, which this stage does not train")
            parameter = self.trained[name]
            device = torch.device("cpu") if kind == "step" else parameter.device
            self.adamw.state[parameter][kind] = value.to(device)

    def close(self) -> None:
        """Let every parameter learn again."""
        self.student.requires_grad_(True)
