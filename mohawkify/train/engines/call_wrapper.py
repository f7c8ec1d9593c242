"""The one module a sharding engine wraps, so that any function of the student runs inside a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class OutsideLayers(nn.Module):
    """The student beside its layers: embedding, final norm and head.

    It owns the head's weight and bias a second time, as its own parameters: a function that reads them directly, as a
    loss without logits does, finds them whole under ZeRO-3 too, which gathers the parameters of running modules.
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student
        head = student.get_output_embeddings()  # type: ignore[operator]
        for name, parameter in () if head is None else head.named_parameters(recurse=False):
            self.register_parameter(f"head_{name}", parameter)

    def forward(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call it."""
        return function(*args, **kwargs)


class CallWrapper(nn.Module):
    """A module whose forward pass is any function of the student.

    A function of one layer, which stages 1 and 2 call, gathers that layer alone. Any other may use the whole student,
    so the parts beside the layers are gathered too.
    """

    def __init__(self, student: nn.Module, layers: nn.ModuleList) -> None:
        super().__init__()
        self.outside_layers = OutsideLayers(student)
        self._inside_layers = {id(module) for layer in layers for module in layer.modules()}

    def forward(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function, a module of the student, or a method of one; arguments come by keyword, past all hooks."""
        if isinstance(function, nn.Module):
            if id(function) in self._inside_layers:
                return function(*args, **kwargs)
        elif id(getattr(function, "__self__", None)) in self._inside_layers:
            return call_as_forward(function, *args, **kwargs)
        return self.outside_layers(function=function, args=args, kwargs=kwargs)


def call_as_forward(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a module's method as if it were its forward pass, so that the hooks gather the module's parameters."""
    module: nn.Module = method.__self__  # type: ignore[attr-defined]
    module.__dict__["forward"] = method
    try:
        return module(*args, **kwargs)
    finally:
        del module.__dict__["forward"]
