"""The engine: weights, gradients and optimiser of one stage behind one interface, and its plain implementation."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mohawkify.errors import CheckpointError
from mohawkify.recipe.schema import OptimizerRecipe


class Engine(ABC):
    """The student during one stage: its parameters, gradients and updates, however they are spread over processes.

    All processes of a run make the same calls in the same order. Whole tensors are exchanged by name, in float32, so
    that a checkpoint does not depend on the engine that wrote it.

    Args:
        student: the student, whole in every process, with the same values in all.
        trained: those of its parameters that the stage trains, by name. Matrices decay; vectors (biases, norms, skips)
            do not.
        optimizer: AdamW's settings and the gradient clip.
        precision: ``fp32`` or ``bf16``: autocast over float32 weights.
    """

    # Autocast keeps copies of weights: those of all layers would be whole in an engine that shards them.
    caches_casts = False
    adamw: torch.optim.AdamW

    def __init__(
        self,
        student: nn.Module,
        trained: Mapping[str, nn.Parameter],
        optimizer: OptimizerRecipe,
        precision: str,
        device: torch.device,
    ) -> None:
        self.student, self.optimizer, self.precision, self.device = student, optimizer, precision, device
        self._trained_names = tuple(trained)
        for name, parameter in student.named_parameters():  # frozen ones would pile up gradients without use
            parameter.requires_grad_(name in trained)
        self._use_parameters()

    def _use_parameters(self) -> None:
        """Take the student's parameters, anew once they are wrapped, and make AdamW for the trained ones."""
        # Any: the libraries put attributes of their own on them.
        self._parameters: dict[str, Any] = dict(self.student.named_parameters())
        self._trained = {name: self._parameters[name] for name in self._trained_names}
        decay = self.optimizer.weight_decay
        matrices = {"params": [p for p in self._trained.values() if p.dim() >= 2], "weight_decay": decay}
        vectors = {"params": [p for p in self._trained.values() if p.dim() < 2], "weight_decay": 0.0}
        groups = [group for group in (matrices, vectors) if group["params"]]
        self.adamw = torch.optim.AdamW(groups, betas=self.optimizer.betas, eps=self.optimizer.epsilon, fused=True)

    def accumulating(self) -> AbstractContextManager[object]:
        """Encloses all forward and backward passes of one step, but not the step itself."""
        return nullcontext()

    def autocast(self) -> AbstractContextManager[object]:
        """The precision of a forward pass."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=self.caches_casts)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function that runs a part of the student; the parameters of the modules it calls are whole."""
        return function(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss; the losses of all calls in all processes make up the step's, as a sum."""
        loss.backward()

    def step(self, learning_rate: float) -> float:
        """Clip, update, clear; returns the gradient norm of all processes before clipping.

        Nothing is updated where the norm is not finite.
        """
        gradients = [p.grad for p in self._trained.values() if p.grad is not None]
        norm = self._gathered(torch.nn.utils.get_total_norm(gradients))
        if math.isfinite(norm):
            if self.optimizer.gradient_clip is not None:
                clip = self.optimizer.gradient_clip
                torch.nn.utils.clip_grads_with_norm_(list(self._trained.values()), clip, norm)
            self._set_rate(learning_rate)
            self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return float(norm)

    def _set_rate(self, learning_rate: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate

    def _gathered(self, tensor: Any) -> Tensor:
        """A tensor of which every process may hold a part, whole."""
        return tensor

    @abstractmethod
    def shard(self, name: str) -> Tensor:
        """A parameter in float32, or as much of it as is in this process, which may be nothing."""

    @abstractmethod
    def gradient(self, name: str) -> Tensor | None:
        """The gradient of a trained parameter's `shard`, after `accumulating`; None where there is none."""

    @abstractmethod
    def parameters(self) -> dict[str, Tensor]:
        """All parameters of the student, whole and on the CPU or their device; on rank 0, else empty."""

    @abstractmethod
    def load_parameters(self, tensors: Mapping[str, Tensor]) -> None:
        """Set all parameters of the student; every process gives all of them."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """The optimiser's whole moments on rank 0, else empty.

        ``exp_avg/NAME`` and ``exp_avg_sq/NAME``, and the number of updates as ``step/NAME``.
        """

    def _moments(self) -> dict[str, Any]:
        """AdamW's own tensors under the names that `state` gives them."""
        return {
            f"{kind}/{name}": value
            for name, parameter in self._trained.items()
            for kind, value in self.adamw.state.get(parameter, {}).items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back the tensors of `state`; every process gives all of them.

        Raises:
            CheckpointError: one belongs to a parameter that this stage does not train.
        """
        for key in state:
            name = key.partition("/")[2]
            if name not in self._trained:
                raise CheckpointError(f"the checkpoint has optimiser state for {name}, which this stage does not train")
        self._load_moments(state)

    def _load_moments(self, state: Mapping[str, Tensor]) -> None:
        for key, value in state.items():
            kind, _, name = key.partition("/")
            parameter = self._trained[name]
            self.adamw.state[parameter][kind] = (
                value.to(parameter.device, copy=True) if kind == "step" else self._moment_like(parameter, value)
            )

    def _moment_like(self, parameter: Any, whole: Tensor) -> Tensor:
        """A whole moment as AdamW holds it beside a parameter."""
        return whole.to(parameter.device, copy=True)

    @abstractmethod
    def close(self) -> None:
        """Give the student back with plain whole parameters in every process; the engine is of no use after that."""


class LocalEngine(Engine):
    """One process, plain torch."""

    caches_casts = True

    def shard(self, name: str) -> Tensor:
        return self._parameters[name].detach()

    def gradient(self, name: str) -> Tensor | None:
        return self._trained[name].grad

    def parameters(self) -> dict[str, Tensor]:
        return dict(self._parameters)

    @torch.no_grad()
    def load_parameters(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(tensors[name])

    def state(self) -> dict[str, Tensor]:
        return self._moments()

    def close(self) -> None:
        self.student.requires_grad_(True)
