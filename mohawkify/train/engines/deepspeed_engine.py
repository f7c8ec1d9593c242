"""DeepSpeed's ZeRO-0 to 3, called directly, behind the interface of `Engine`.

By default DeepSpeed adds several backward passes per step up wrongly: docs/engine.md explains the settings used here.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mohawkify.distributed.process_group import World, require_group
from mohawkify.errors import MissingExtraError, UsageError
from mohawkify.recipe.schema import OptimizerRecipe
from mohawkify.train.engines.call_wrapper import CallWrapper
from mohawkify.train.engines.engine import Engine
from mohawkify.train.engines.unwrap import PlainModel

MOMENTS = ("exp_avg", "exp_avg_sq")


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, quiet and, on a CPU, without the one operator that it would compile at start.

    Raises:
        MissingExtraError: it is not installed.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
        import deepspeed.ops
    except ModuleNotFoundError as error:
        raise MissingExtraError("deepspeed", "train", "--engine deepspeed") from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        # It serves inference alone, needs g++ and ninja, and a killed build would block every later start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not hasattr(deepspeed.DeepSpeedEngine, "coalesce_grad_reduction"):
        raise UsageError(
            f"found deepspeed {deepspeed.__version__}, expected 0.19.8 or newer: before, several backward passes per"
            " step were silently wrong",
            hint='pip install -U "deepspeed>=0.19.8"',
        )
    return deepspeed


def join_deepspeed(deepspeed: Any, world: World) -> None:
    """Make DeepSpeed use the existing group of processes; it reads some environment variables too."""
    variables = {"RANK": world.rank, "WORLD_SIZE": world.size, "LOCAL_RANK": world.local_rank}
    for name, value in variables.items():
        os.environ.setdefault(name, str(value))
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


@dataclass(frozen=True)
class ZeroSettings:
    """How DeepSpeed is started.

    Args:
        config: DeepSpeed's settings, from `deepspeed_config.engine_config`.
        backwards_per_step: how often a step calls `backward`, where every call reaches all trained parameters, as in
            stage 3; None where a call reaches a layer, as in stages 1 and 2.
    """

    world: World
    layers: nn.ModuleList
    config: Mapping[str, Any]
    backwards_per_step: int | None = None


class DeepSpeedEngine(Engine):
    """A student under DeepSpeed: AdamW on float32 master weights, spread over the processes by the stage of ZeRO."""

    def __init__(
        self,
        student: nn.Module,
        trained: Mapping[str, nn.Parameter],
        optimizer: OptimizerRecipe,
        precision: str,
        device: torch.device,
        settings: ZeroSettings,
    ) -> None:
        self._plain = PlainModel(student)
        super().__init__(student, trained, optimizer, precision, device)
        self.world, self.backwards_per_step = settings.world, settings.backwards_per_step
        self.zero: int = settings.config["zero_optimization"]["stage"]
        self._num_backwards = 0
        self._deepspeed = import_deepspeed(device)
        require_group()
        join_deepspeed(self._deepspeed, self.world)
        self.engine, _, _, _ = self._deepspeed.initialize(
            model=CallWrapper(student, settings.layers),
            optimizer=self.adamw,
            config=dict(settings.config),
            dist_init_required=False,
        )
        # From ZeRO-1 on it holds the flat partitions; at ZeRO-0 it is AdamW itself.
        self.zero_optimizer = self.engine.optimizer
        if self.zero and not hasattr(self.zero_optimizer, "_coalesce_grad_reduction"):
            raise UsageError(
                f"DeepSpeed chose {type(self.zero_optimizer).__name__}, which adds several backward passes up wrongly",
                hint="take bf16, fp16 and data_types out of the DeepSpeed settings",
            )

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Encloses the passes of one step; at its end the gradients of all processes are added up."""
        self._num_backwards = 0
        self._clear_gradients()
        with self._adding_gradients():
            yield
        if self.zero == 0:
            self.engine.allreduce_gradients()

    def _clear_gradients(self) -> None:
        """Clear ZeRO-3's buffer of gradients, which DeepSpeed never does.

        A step's first backward pass copies into it and later ones add to it: gradients that only a later pass reaches
        would be added to those of the step before, and parameters that no pass reaches would keep the old ones.
        """
        if self.zero == 3 and not self._offloads:
            self.zero_optimizer.grad_partitions_flat_buffer.zero_()

    @property
    def _offloads(self) -> bool:
        return self.zero > 0 and bool(getattr(self.zero_optimizer, "offload_optimizer", False))

    def _adding_gradients(self) -> AbstractContextManager[object]:
        if self.zero == 0:
            return self.engine.no_sync()
        if self.backwards_per_step is None and (self.zero < 3 or self._offloads):
            return self.engine.coalesce_grad_reduction()
        return nullcontext()

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function within DeepSpeed's forward pass, which gathers the parameters of the modules it reaches."""
        return self.engine(function=function, args=args, kwargs=kwargs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss; DeepSpeed averages over the processes, so it is scaled to sum."""
        self._num_backwards += 1
        if self.backwards_per_step is not None and self.zero > 0:
            self.engine.set_gradient_accumulation_boundary(self._num_backwards == self.backwards_per_step)
        self.engine.backward(loss * self.world.size, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float:
        self._set_rate(learning_rate)
        if self.zero == 0:
            gradients = [p.grad for p in self._trained.values() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
            if math.isfinite(norm):
                self.engine.step()
            else:
                self.engine.zero_grad()
            return norm
        self.engine.step()
        return math.nan if self.zero_optimizer.overflow else float(self.engine.get_global_grad_norm())

    def shard(self, name: str) -> Tensor:
        parameter = self._parameters[name]
        if self.zero == 3:
            if name in self._trained:
                return self._deepspeed.utils.safe_get_local_fp32_param(parameter)
            return parameter.ds_tensor.detach()
        if self.zero == 0 or name not in self._trained:
            return parameter.detach()
        mapping = parameter._hp_mapping
        return parameter.detach().flatten()[:0] if mapping is None else mapping.hp_fragment.detach()

    def gradient(self, name: str) -> Tensor | None:
        parameter = self._trained[name]
        if self.zero == 3:
            return self._deepspeed.utils.safe_get_local_grad(parameter)
        if self.zero == 0:
            return parameter.grad
        mapping = parameter._hp_mapping
        if mapping is None:
            return parameter.detach().flatten()[:0]
        fragment = mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
        if fragment.numel() == parameter.numel():
            address = mapping.lp_fragment_address
            fragment = fragment.narrow(0, address.start, address.numel)
        return fragment

    def parameters(self) -> dict[str, Tensor]:
        gathered: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            with self._whole(parameter):
                self._keep(gathered, name, parameter)
        return gathered

    def _keep(self, gathered: dict[str, Tensor], name: str, tensor: Tensor) -> None:
        if self.world.is_rank0:
            gathered[name] = tensor.detach().to("cpu", copy=True)

    def _whole(self, parameter: Any, *, changes: bool = False) -> AbstractContextManager[object]:
        if self.zero < 3:
            return nullcontext()
        return self._deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if changes else None)

    @torch.no_grad()
    def load_parameters(self, tensors: Mapping[str, Tensor]) -> None:
        """Set all parameters, one at a time; the master weights follow."""
        for name, parameter in self._parameters.items():
            with self._whole(parameter, changes=True):
                if self.zero < 3 or self.world.is_rank0:
                    parameter.copy_(tensors[name])
        if self.zero:
            self.zero_optimizer.refresh_fp32_params()

    def state(self) -> dict[str, Tensor]:
        gathered: dict[str, Tensor] = {}
        if self.zero == 0:
            for key, value in self._moments().items():
                self._keep(gathered, key, value)
            return gathered
        if not self.adamw.state:
            return gathered
        self._link_moments()
        step = next(iter(self.adamw.state.values()))["step"]
        for name, parameter in self._trained.items():
            for kind in MOMENTS:
                whole = self._deepspeed.utils.safe_get_full_optimizer_state(parameter, kind)
                self._keep(gathered, f"{kind}/{name}", whole)
            self._keep(gathered, f"step/{name}", step)
        return gathered

    @torch.no_grad()
    def _load_moments(self, state: Mapping[str, Tensor]) -> None:
        if self.zero == 0:
            super()._load_moments(state)
            return
        steps = [value for key, value in state.items() if key.startswith("step/")]
        if not steps:
            return
        for partition in self._flat_partitions():
            self.adamw.state[partition] = {
                # One count for all parameters in it, where the fused update reads it.
                "step": torch.stack([step.cpu() for step in steps]).max().to(partition.device),
                **{kind: torch.zeros_like(partition) for kind in MOMENTS},
            }
        self._link_moments()
        for key, value in state.items():
            kind, _, name = key.partition("/")
            if kind != "step":
                self._load_moment(self._trained[name], kind, value)

    def _link_moments(self) -> None:
        """Link each parameter to its part of the flat moments.

        DeepSpeed does so once, after the first group of its first update: the vectors, the second group, have none yet.
        """
        if self.zero < 3:
            self.zero_optimizer._hp_optimizer_states_linked = False
            self.zero_optimizer._lazy_init_hp_params_optimizer_state()

    def _flat_partitions(self) -> list[Tensor]:
        optimizer = self.zero_optimizer
        return optimizer.fp32_partitioned_groups_flat if self.zero == 3 else optimizer.single_partition_of_fp32_groups

    def _load_moment(self, parameter: Any, kind: str, value: Tensor) -> None:
        if self.zero < 3:
            self._deepspeed.utils.safe_set_full_optimizer_state(parameter, value, kind)
            return
        # DeepSpeed's own setter of whole tensors fails where the last process's part is padded.
        size = parameter.ds_tensor.numel()
        part = torch.zeros(size, dtype=torch.float32, device=self.device)
        own = value.flatten()[self.world.rank * size : (self.world.rank + 1) * size]
        part[: own.numel()] = own
        self._deepspeed.utils.safe_set_local_optimizer_state(parameter, part, kind)

    def close(self) -> None:
        tensors = {}
        for name, parameter in self._parameters.items():
            with self._whole(parameter):
                tensors[name] = parameter.detach().to(self._plain.device(name), copy=True)
        self.engine.destroy()
        self._plain.restore(tensors)
