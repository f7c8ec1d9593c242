"""torch's fully sharded data parallelism (FSDP2) behind the interface of `Engine`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mohawkify.distributed.process_group import World, require_group
from mohawkify.mixers.mixer import Mixer
from mohawkify.recipe.schema import OptimizerRecipe
from mohawkify.train.engines.call_wrapper import CallWrapper
from mohawkify.train.engines.engine import Engine
from mohawkify.train.engines.unwrap import PlainModel


@dataclass(frozen=True)
class FsdpSettings:
    """How the student is spread.

    Args:
        offload: whether weights, gradients and moments are kept in the CPU's memory.
    """

    world: World
    layers: nn.ModuleList
    offload: bool = False


class FsdpEngine(Engine):
    """A student under FSDP2: every process holds its part of weights, gradients and moments, all in float32.

    Three kinds of modules are gathered as one each: a mixer, the rest of a layer, and the modules beside the layers.
    In bf16 a layer's weights are gathered in bfloat16.
    """

    def __init__(
        self,
        student: nn.Module,
        trained: Mapping[str, nn.Parameter],
        optimizer: OptimizerRecipe,
        precision: str,
        device: torch.device,
        fsdp: FsdpSettings,
    ) -> None:
        self._plain = PlainModel(student)
        super().__init__(student, trained, optimizer, precision, device)
        self.world = fsdp.world
        require_group()
        # Heads are views of features; nothing here changes an output in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        settings: dict[str, Any] = {
            "mesh": init_device_mesh(device.type, (fsdp.world.size,)),
            "offload_policy": CPUOffloadPolicy() if fsdp.offload and device.type != "cpu" else OffloadPolicy(),
            "reshard_after_forward": True,
        }
        # Mixers keep float32: their decays, convolutions and skips need it. Embeddings too: the residual stream does.
        half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        self.root = CallWrapper(student, fsdp.layers)
        for layer in fsdp.layers:
            for module in layer.modules():
                if isinstance(module, Mixer):
                    fully_shard(module, **settings)
            fully_shard(layer, **settings, mp_policy=half if precision == "bf16" else MixedPrecisionPolicy())
        fully_shard(self.root.outside_layers, **settings)
        fully_shard(self.root, **settings)
        for module in self.root.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # losses of all processes sum up
                module.set_force_sum_reduction_for_comms(True)
        self._use_parameters()

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function within FSDP2's forward pass, which gathers the parameters of the modules it reaches."""
        return self.root(function=function, args=args, kwargs=kwargs)

    def shard(self, name: str) -> Tensor:
        return self._parameters[name].detach().to_local()

    def gradient(self, name: str) -> Tensor | None:
        gradient = self._trained[name].grad
        return None if gradient is None else gradient.to_local()

    def parameters(self) -> dict[str, Tensor]:
        return self._on_rank0({name: parameter.detach() for name, parameter in self._parameters.items()})

    def state(self) -> dict[str, Tensor]:
        return self._on_rank0(self._moments())

    def _on_rank0(self, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
        """Whole copies on the CPU of rank 0, gathered one at a time."""
        gathered = {}
        for name, tensor in tensors.items():
            whole = self._gathered(tensor)
            if self.world.is_rank0:
                gathered[name] = whole.to("cpu", copy=True)
        return gathered

    def _gathered(self, tensor: Any) -> Tensor:
        """Whole and on the device, where offloaded parts are not; counts of steps are never sharded."""
        if not isinstance(tensor, DTensor):
            return tensor
        on_device: Any = tensor.to(self.device)
        return on_device.full_tensor()

    @torch.no_grad()
    def load_parameters(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(self._moment_like(parameter, tensors[name]))

    @torch.no_grad()
    def _moment_like(self, parameter: Any, whole: Tensor) -> Tensor:
        value = whole.to(device=self.device, dtype=parameter.dtype)
        part: Any = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        return part.to(parameter.device)

    def close(self) -> None:
        tensors = {
            name: self._gathered(parameter.detach()).to(self._plain.device(name), copy=True)
            for name, parameter in self._parameters.items()
        }
        for module in self.student.modules():
            _module_state_mapping.pop(module, None)  # torch has no way back from fully_shard, and shards nothing twice
        self._plain.restore(tensors)
