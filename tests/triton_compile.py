"""Compiles Triton kernels for GPUs that are not there: every launch of the wrapped call is compiled, none is run.

The operators are called as always, on tensors of the CPU. What they would have launched is compiled with the very
arguments of the launch, specialised as Triton would: pointers and sizes that are multiples of 16 are known as such.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
}
OPTIONS = ("num_warps", "num_stages")


@contextmanager
def compiling(kernels: list[Any], capability: int, found: Callable[[str, Any], None]) -> Iterator[None]:
    """Within the block launches of the kernels are compiled for one architecture and reported instead of run."""

    def compile_launch(kernel: Any) -> Callable[..., None]:
        def run(*args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
            bound = inspect.signature(kernel.fn).bind(*args, **kwargs).arguments
            signature, constants, attributes = {}, {}, {}
            for index, (name, value) in enumerate(bound.items()):
                if isinstance(value, torch.Tensor):
                    signature[name] = POINTERS[value.dtype]
                    attributes[(index,)] = [["tt.divisibility", 16]]
                elif isinstance(value, float):
                    signature[name] = "fp32"
                elif value is None or kernel.params[index].is_constexpr or value == 1:
                    signature[name], constants[(index,)] = "constexpr", value
                else:
                    signature[name] = "i32"
                    if value % 16 == 0:
                        attributes[(index,)] = [["tt.divisibility", 16]]
            source = ASTSource(kernel, signature, constants, attributes)
            found(kernel.fn.__name__, triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options))

        return run

    before = [kernel.run for kernel in kernels]
    for kernel in kernels:
        kernel.run = compile_launch(kernel)
    try:
        yield
    finally:
        for kernel, run in zip(kernels, before, strict=True):
            kernel.run = run
