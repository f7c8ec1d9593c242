"""DeepSpeed's ZeRO-0 to 3, called directly, behind the interface of `Engine`.

Several backward passes per step are what DeepSpeed gets wrong unless it is told: docs/engine.md says how and why.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mohawkify.distributed.process_group import World, require_group
from mohawkify.errors import CheckpointError, MissingExtraError, UsageError
from mohawkify.recipe.schema import OptimizerRecipe
from mohawkify.train.engines.call_wrapper import Root
from mohawkify.train.engines.engine import make_adamw
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
    """Let DeepSpeed use the group of processes that is there; it reads some variables all the same."""
    variables = {"RANK": world.rank, "WORLD_SIZE": world.size, "LOCAL_RANK": world.local_rank}
    for name, value in variables.items():
        os.environ.setdefault(name, str(value))
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


class DeepSpeedEngine:
    """A student under DeepSpeed: AdamW on float32 master weights, spread over the processes as the stage of ZeRO says.

    Args:
        student: the student, whole in every process, with the same values in all.
        trained: those of its parameters that the stage trains, by name.
        optimizer: AdamW's settings and the gradient clip.
        precision: ``fp32`` or ``bf16``: autocast, over float32 weights.
        device: this process's device.
        world: the processes.
        layers: the student's decoder layers.
        config: DeepSpeed's settings, from `deepspeed_config.engine_config`.
        backwards_per_step: how often a step calls `backward`, where every call reaches all trained parameters, as in
            stage 3; None where a call reaches a layer, as in stages 1 and 2.
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
        config: Mapping[str, Any],
        backwards_per_step: int | None = None,
    ) -> None:
        self.precision, self.device, self.world = precision, device, world
        self.zero: int = config["zero_optimization"]["stage"]
        self.backwards_per_step = backwards_per_step
        self._num_backwards = 0
        self._plain = PlainModel(student)
        self._deepspeed = import_deepspeed(device)
        require_group()
        join_deepspeed(self._deepspeed, world)
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(name in trained)
        # Any: DeepSpeed puts attributes of its own on them.
        self._parameters: dict[str, Any] = dict(student.named_parameters())
        self._trained = {name: self._parameters[name] for name in trained}
        self.adamw = make_adamw(self._trained, optimizer)
        root = Root(student, layers)
        self.engine, _, _, _ = self._deepspeed.initialize(
            model=root, optimizer=self.adamw, config=dict(config), dist_init_required=False
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
        self._forget_gradients()
        with self._gathering_gradients():
            yield
        if self.zero == 0:
            self.engine.allreduce_gradients()

    def _forget_gradients(self) -> None:
        """Clear ZeRO-3's buffer of gradients, which DeepSpeed never does.

        A step's first backward pass copies into it and later ones add to it: what only a later one reaches would be
        added to the step before, and what none reaches would be that step's again.
        """
        if self.zero == 3 and not self._offloads:
            self.zero_optimizer.grad_partitions_flat_buffer.zero_()

    @property
    def _offloads(self) -> bool:
        return self.zero > 0 and bool(getattr(self.zero_optimizer, "offload_optimizer", False))

    def _gathering_gradients(self) -> AbstractContextManager[object]:
        if self.zero == 0:
            return self.engine.no_sync()
        if self.backwards_per_step is None and (self.zero < 3 or self._offloads):
            return self.engine.coalesce_grad_reduction()
        return nullcontext()

    def autocast(self) -> AbstractContextManager[object]:
        """bf16 autocast, or nothing; copies of weights are not kept, since those of all layers would be whole."""
        if self.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=False)
        return nullcontext()

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call it within DeepSpeed's forward pass, which gathers what the modules under way need."""
        return self.engine(function=function, args=args, kwargs=kwargs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss; DeepSpeed averages over the processes, so it is scaled to sum."""
        self._num_backwards += 1
        if self.backwards_per_step is not None and self.zero > 0:
            self.engine.set_gradient_accumulation_boundary(self._num_backwards == self.backwards_per_step)
        self.engine.backward(loss * self.world.size, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float:
        """Clip, update, clear; returns the gradient norm before clipping, and updates nothing if it is not finite."""
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        if self.zero == 0:
            gradients = [p.grad for p in self._trained.values() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
            if not torch.isfinite(torch.tensor(norm)):
                self.engine.zero_grad()
                return norm
            self.engine.step()
            return norm
        self.engine.step()
        if self.zero_optimizer.overflow:
            return float("nan")
        return float(self.engine.get_global_grad_norm())

    def shard(self, name: str) -> Tensor:
        """This process's part of the float32 weights."""
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
        """This process's part of a gradient."""
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
        """All parameters, gathered one at a time; whole on the CPU of the main process."""
        gathered = {}
        for name, parameter in self._parameters.items():
            with self._whole(parameter):
                if self.world.is_rank0:
                    gathered[name] = parameter.detach().to("cpu", copy=True)
        return gathered

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
        """The optimiser's moments, gathered one at a time; whole on the CPU of the main process."""
        gathered: dict[str, Tensor] = {}
        if self.zero == 0:
            for name, parameter in self._trained.items():
                for kind, value in self.adamw.state.get(parameter, {}).items():
                    if self.world.is_rank0:
                        gathered[f"{kind}/{name}"] = value.to("cpu", copy=True)
            return gathered
        if not self.adamw.state:
            return gathered
        self._link_moments()
        step = next(iter(self.adamw.state.values()))["step"]
        for name, parameter in self._trained.items():
            for kind in MOMENTS:
                whole = self._deepspeed.utils.safe_get_full_optimizer_state(parameter, kind)
                if self.world.is_rank0:
                    gathered[f"{kind}/{name}"] = whole.to("cpu", copy=True)
            if self.world.is_rank0:
                gathered[f"step/{name}"] = step.to("cpu", copy=True)
        return gathered

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take moments back, one at a time; every one must belong to a parameter of this stage."""
        for key in state:
            name = key.partition("/")[2]
            if name not in self._trained:
                raise CheckpointError(f"the checkpoint has optimiser state for {name}, which this stage does not train")
        if self.zero == 0:
            for key in state:
                kind, _, name = key.partition("/")
                device = torch.device("cpu") if kind == "step" else self._trained[name].device
                self.adamw.state[self._trained[name]][kind] = state[key].to(device, copy=True)
            return
        steps = [state[key] for key in state if key.startswith("step/")]
        if not steps:
            return
        for partition in self._flat_partitions():
            self.adamw.state[partition] = {
                "step": torch.stack([step.cpu() for step in steps]).max(),  # a partition counts for all that is in it
                **{kind: torch.zeros_like(partition) for kind in MOMENTS},
            }
        self._link_moments()
        for key in state:
            kind, _, name = key.partition("/")
            if kind != "step":
                self._load_moment(self._trained[name], kind, state[key])

    def _link_moments(self) -> None:
        """Let DeepSpeed find each parameter's part of the flat moments.

        It does so itself once, after the first group of its first update: the vectors, the second group, have none yet.
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
        mine = value.flatten()[self.world.rank * size : (self.world.rank + 1) * size]
        part[: mine.numel()] = mine
        self._deepspeed.utils.safe_set_local_optimizer_state(parameter, part, kind)

    def close(self) -> None:
        """Gather every parameter in every process, and take DeepSpeed off the student."""
        tensors = {}
        for name, parameter in self._parameters.items():
            with self._whole(parameter):
                tensors[name] = parameter.detach().to(self._plain.device(name), copy=True)
        self.engine.destroy()
        self._plain.restore(tensors)
