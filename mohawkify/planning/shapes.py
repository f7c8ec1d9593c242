"""Tensors that have a shape and a type but no numbers, and the bytes that they would take.

PyTorch's FakeTensorMode makes such tensors too, for its compiler, in twice the time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

META, CPU = torch.device("meta"), torch.device("cpu")


class _ShapeTensor(FakeTensor):
    """A tensor that PyTorch takes for one of the CPU, autograd and autocast included, and transformers for a fake one.

    Args:
        meta: the tensor on the meta device on which operators run instead.
    """

    meta: Tensor
    device = Tensor.device
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, meta: Tensor) -> _ShapeTensor:
        made = Tensor._make_wrapper_subclass(
            cls, meta.size(), meta.stride(), meta.storage_offset(), dtype=meta.dtype, device=CPU
        )
        made.meta = meta
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func}: expected to run within `Shapes`")


class Shapes(TorchDispatchMode):
    """While it is entered, every operator gives tensors without numbers, and their bytes are counted.

    Attributes:
        bytes: of the tensors that were made since `start` and are alive.
        peak: the most there were.

    Raises:
        RuntimeError: by operators that read the values of tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.start(())

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the compiler never runs here, and turning it off takes longer than an operator

    def start(self, known: Iterable[Tensor]) -> None:
        """Count from zero; tensors that are known already do not count."""
        self.bytes = self.peak = 0
        metas = [tensor.meta for tensor in known if isinstance(tensor, _ShapeTensor)]
        self._storages: dict[int, Any] = {meta.untyped_storage()._cdata: None for meta in metas}

    @contextmanager
    def keeping_peak(self) -> Iterator[None]:
        """Leave the peak as it is, while tensors are replaced by others of the same size."""
        peak = self.peak
        yield
        self.peak = peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given: dict[int, Tensor] = {}

        def without_numbers(tensor: Tensor) -> Tensor:
            meta = tensor.meta if isinstance(tensor, _ShapeTensor) else tensor.to(META)
            given[id(meta)] = tensor
            return meta

        def with_shape(meta: Tensor) -> Tensor:
            if id(meta) in given:  # an operator that writes into its argument
                return given[id(meta)]
            self._add(meta)
            return _ShapeTensor(meta)

        kwargs = {name: _map_tensors(without_numbers, value) for name, value in (kwargs or {}).items()}
        if _takes_device(func):
            kwargs["device"] = META
        return _map_tensors(with_shape, func(*_map_tensors(without_numbers, args), **kwargs))

    def _add(self, meta: Tensor) -> None:
        storage = meta.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def on_free(_: object) -> None:
            self.bytes -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, on_free)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


@cache
def _takes_device(func: Any) -> bool:
    return any(argument.name == "device" for argument in func._schema.arguments)


def _map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Replace every tensor among the arguments or results of an operator, which are nested in lists and tuples alone.

    It is no closure that calls itself: such a cycle would keep tensors alive until Python's collector runs.
    """
    if isinstance(value, Tensor):
        return function(value)
    return type(value)(_map_tensors(function, each) for each in value) if type(value) in (list, tuple) else value
