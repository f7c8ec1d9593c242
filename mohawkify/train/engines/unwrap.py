"""Restores a model's modules to their state before an engine wrapped them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks"),
    *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)


class PlainModel:
    """A model's modules before DeepSpeed or FSDP2 changed their classes, hooks, attributes and parameters.

    Neither library can unwrap a model, but the next stage wraps the same one again.
    """

    def __init__(self, model: nn.Module) -> None:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._devices = {name: parameter.device for name, parameter in model.named_parameters()}
        self._modules = [_PlainModule(module, names) for module in model.modules()]

    def device(self, name: str) -> torch.device:
        """Where a parameter was."""
        return self._devices[name]

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Remove all wrapping and give the model these whole values.

        Args:
            tensors: all parameters by name; they become the parameters' memory.
        """
        parameters = {
            name: nn.Parameter(tensors[name], requires_grad=requires_grad)
            for name, requires_grad in self._requires_grad.items()
        }
        for module in self._modules:
            module.restore(parameters)


class _PlainModule:
    def __init__(self, module: nn.Module, names: Mapping[int, str]) -> None:
        self.module, self.kind, self.attributes = module, type(module), set(module.__dict__)
        self.hooks = {name: set(getattr(module, name)) for name in _HOOKS}
        self.parameters = {own: p if p is None else names[id(p)] for own, p in module._parameters.items()}
        self.buffer_devices = {own: b.device for own, b in module._buffers.items() if b is not None}

    def restore(self, parameters: Mapping[str, nn.Parameter]) -> None:
        module = self.module
        module.__class__ = self.kind
        for name in set(module.__dict__) - self.attributes:
            del module.__dict__[name]
        for name, before in self.hooks.items():
            hooks = getattr(module, name)
            for number in set(hooks) - before:
                del hooks[number]
        # DeepSpeed replaces this dictionary by one of its own class.
        module.__dict__["_parameters"] = {
            own: None if name is None else parameters[name] for own, name in self.parameters.items()
        }
        for own, device in self.buffer_devices.items():
            buffer = module._buffers[own]
            module._buffers[own] = buffer if buffer is None else buffer.to(device)
