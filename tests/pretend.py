"""A device that is not there: its tensors lie in the CPU's memory, and are as little to be mixed with its as a GPU's.

What runs on it gives the CPU's numbers, so that a whole conversion on it can be compared with one on the CPU.
"""

from __future__ import annotations

import sys
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
# What may take tensors of two devices: copies, and indices of the CPU's into a tensor of the device.
MIXING = {"aten::_to_copy", "aten::copy_", "aten::index", "aten::index_put_", "aten::_index_put_impl_"}


class OnDevice(Tensor):
    """A tensor that says it is on the device.

    Args:
        held: its numbers.
    """

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.size(), held.stride(), held.storage_offset(), dtype=held.dtype, device=device()
        )
        made.held = held
        return made  # type: ignore[no-any-return]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.held!r})"

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # As on a GPU, single numbers of the CPU's may be mixed in.
        foreign = [tensor for tensor in tensors if not isinstance(tensor, OnDevice) and tensor.dim()]
        if foreign and func._schema.name not in MIXING:
            raise RuntimeError(f"{func}: found tensors on {NAME} and on {foreign[0].device}")
        place = kwargs.get("device") or device()
        if func._schema.name == "aten::copy_":
            place = args[0].device
        on_cpu = {**kwargs, "device": torch.device("cpu")} if kwargs.get("device") is not None else kwargs
        found = func(*tree_map(_held, args), **tree_map(_held, on_cpu))
        if place.type != NAME:
            return found
        return return_and_correct_aliasing(func, args, kwargs, tree_map(_on_device, found))


@cache
def device() -> torch.device:
    """The device, which torch gets to know at the first call."""
    module = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        _is_in_bad_fork=lambda: False,
        device_count=lambda: 1,
        current_device=lambda: 0,
        manual_seed_all=lambda seed: None,
        get_amp_supported_dtype=lambda: [torch.bfloat16],
    )
    _setup_privateuseone_for_python_backend(NAME, module)
    global _LIBRARY
    _LIBRARY = torch.library.Library("aten", "IMPL")
    _LIBRARY.impl("empty.memory_format", _empty, "PrivateUse1")
    _LIBRARY.impl("empty_strided", _empty_strided, "PrivateUse1")
    _LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")
    return torch.device(NAME, 0)


def _empty(size: Any, *, dtype: Any = None, memory_format: Any = None, **rest: Any) -> Tensor:
    return OnDevice(
        torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format, device="cpu")
    )


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **rest: Any) -> Tensor:
    return OnDevice(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


def _copy_from(source: Tensor, to: Tensor, non_blocking: bool = False) -> Tensor:
    _held(to).copy_(_held(source))
    return to


def _held(value: Any) -> Any:
    return value.held if isinstance(value, OnDevice) else value


def _on_device(value: Any) -> Any:
    return OnDevice(value) if isinstance(value, Tensor) and not isinstance(value, OnDevice) else value


NEXT = "--next"  # between two commands
END = "\0\n"  # printed after each


def main() -> None:
    """Run commands of mohawkify on the device, wherever a recipe asks for one, in one process: its start takes most."""
    place = device()  # before the first backward pass, when torch asks once for all what devices there are
    torch.inference_mode = torch.no_grad  # which tensors of a class of their own do not know
    from mohawkify.cli import main
    from mohawkify.distributed import device as choose
    from mohawkify.planning import planner
    from mohawkify.student import save

    # huggingface_hub looks for tensors that share memory, which a GPU's can say and these cannot.
    write = save.save_torch_state_dict
    save.save_torch_state_dict = lambda weights, *more, **options: write(tree_map(_held, weights), *more, **options)
    planner.ASSUMED_FLOPS_PER_SECOND[NAME] = 1.0
    choose.choose_device = lambda name: place
    torch.set_num_threads(1)
    commands: list[list[str]] = [[]]
    for argument in sys.argv[1:]:
        if argument == NEXT:
            commands.append([])
        else:
            commands[-1].append(argument)
    for command in commands:
        try:
            main.main(command)
        except SystemExit as end:
            if end.code:
                raise
        print(end=END)


if __name__ == "__main__":
    main()
