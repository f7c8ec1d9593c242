"""torch's own fully sharded data parallelism (FSDP2) behind the interface of `Engine`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mohawkify.distributed.process_group import World, require_group
from mohawkify.errors import CheckpointError
from mohawkify.mixers.mamba2 import DiscreteMamba2
from mohawkify.recipe.schema import OptimizerRecipe
from mohawkify.train.engines.call_wrapper import Root
from mohawkify.train.engines.engine import make_adamw
from mohawkify.train.engines.unwrap import PlainModel


class FsdpEngine:
    """A student under FSDP2: every process holds its part of weights, gradients and moments, all in float32.

    Gathered together are: each mixer, the rest of each layer, and what lies beside the layers.

    Args:
        student: the student, whole in every process, with the same values in all.
        trained: those of its parameters that the stage trains, by name.
        optimizer: AdamW's settings and the gradient clip.
        precision: ``fp32`` or ``bf16``: autocast over float32 weights, which are gathered in bfloat16 where a layer
            needs them in it alone.
        device: this process's device.
        world: the processes.
        layers: the student's decoder layers.
        offload: whether weights, gradients and moments are kept in the CPU's memory.
    """

    def __init__(
        self,
        student: nn.Module,
        trained: Mapping[str, nn.Parameter],
        optimizer: OptimizerRecipe,
        precision: str,
        device: torch.device,
        world: World,
        *,
        layers: nn.ModuleList,
        offload: bool = False,
    ) -> None:
        self.precision, self.device, self.world = precision, device, world
        self.gradient_clip = optimizer.gradient_clip
        self.student = student
        self._plain = PlainModel(student)
        require_group()
        # Heads are views of features; nothing here changes an output in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(name in trained)
        settings: dict[str, Any] = {
            "mesh": init_device_mesh(device.type, (world.size,)),
            "offload_policy": CPUOffloadPolicy() if offload and device.type != "cpu" else OffloadPolicy(),
            "reshard_after_forward": True,
        }
        # Mixers keep float32: their decays, convolutions and skips need it. Embeddings too: the residual stream does.
        half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        self.root = Root(student, layers)
        for layer in layers:
            for module in layer.modules():
                if isinstance(module, DiscreteMamba2):
                    fully_shard(module, **settings)
            fully_shard(layer, **settings, mp_policy=half if precision == "bf16" else MixedPrecisionPolicy())
        fully_shard(self.root.ends, **settings)
        fully_shard(self.root, **settings)
        for module in self.root.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # losses of all processes sum up
                module.set_force_sum_reduction_for_comms(True)
        self._parameters: dict[str, Any] = dict(student.named_parameters())
        self._trained = {name: self._parameters[name] for name in trained}
        self.adamw = make_adamw(self._trained, optimizer)

    def accumulating(self) -> AbstractContextManager[object]:
        """Nothing to do: every backward pass adds its gradients up over the processes."""
        return nullcontext()

    def autocast(self) -> AbstractContextManager[object]:
        """bf16 autocast, or nothing; copies of weights are not kept, since those of all layers would be whole."""
        if self.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=False)
        return nullcontext()

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call it within FSDP2's forward pass, which gathers what the layers under way need."""
        return self.root(function=function, args=args, kwargs=kwargs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss."""
        loss.backward()

    def step(self, learning_rate: float) -> float:
        """Clip, update, clear; returns the gradient norm before clipping, and updates nothing if it is not finite."""
        gradients = [p.grad for p in self._trained.values() if p.grad is not None]
        total = torch.nn.utils.get_total_norm(gradients)
        norm = self._whole(total)
        if torch.isfinite(norm):
            if self.gradient_clip is not None:
                torch.nn.utils.clip_grads_with_norm_(list(self._trained.values()), self.gradient_clip, norm)
            for group in self.adamw.param_groups:
                group["lr"] = learning_rate
            self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return float(norm)

    def shard(self, name: str) -> Tensor:
        """This process's rows."""
        return self._parameters[name].detach().to_local()

    def gradient(self, name: str) -> Tensor | None:
        """The gradient of this process's rows."""
        gradient = self._trained[name].grad
        return None if gradient is None else gradient.to_local()

    def parameters(self) -> dict[str, Tensor]:
        """All parameters, gathered one at a time; whole on the CPU of the main process."""
        return self._gather({name: parameter.detach() for name, parameter in self._parameters.items()})

    def _gather(self, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
        gathered = {}
        for name, tensor in tensors.items():
            whole = self._whole(tensor)
            if self.world.is_rank0:
                gathered[name] = whole.to("cpu", copy=True)
        return gathered

    def _whole(self, tensor: Any) -> Tensor:
        """Gathered on the device, where offloaded parts are not; counts of steps are no parts of anything."""
        if not isinstance(tensor, DTensor):
            return tensor
        on_device: Any = tensor.to(self.device)
        return on_device.full_tensor()

    @torch.no_grad()
    def load_parameters(self, tensors: Mapping[str, Tensor]) -> None:
        """Set all parameters: every process takes its rows."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self._sharded(tensors[name], parameter))

    def _sharded(self, whole: Tensor, like: DTensor) -> DTensor:
        value = whole.to(device=self.device, dtype=like.dtype)
        part: Any = distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
        return part.to(like.device)

    def state(self) -> dict[str, Tensor]:
        """The optimiser's moments, gathered one at a time; whole on the CPU of the main process."""
        return self._gather(
            {
                f"{kind}/{name}": value
                for name, parameter in self._trained.items()
                for kind, value in self.adamw.state.get(parameter, {}).items()
            }
        )

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take moments back; every one must belong to a parameter of this stage."""
        for key in state:
            kind, _, name = key.partition("/")
            if name not in self._trained:
                raise CheckpointError(f"the checkpoint has optimiser state for {name}, which this stage does not train")
            parameter = self._trained[name]
            value = state[key]
            self.adamw.state[parameter][kind] = (
                value.to("cpu", copy=True) if kind == "step" else self._sharded(value, parameter)
            )

    def close(self) -> None:
        """Gather every parameter in every process, and take FSDP2 off the student."""
        tensors = {
            name: self._whole(parameter.detach()).to(self._plain.device(name), copy=True)
            for name, parameter in self._parameters.items()
        }
        for module in self.student.modules():
            _module_state_mapping.pop(module, None)  # torch has no way back from fully_shard, and shards nothing twice
        self._plain.restore(tensors)
