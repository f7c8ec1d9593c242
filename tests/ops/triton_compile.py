"""Compiles Triton kernels for GPUs that are not there: every launch of the wrapped call is compiled, none is run.

The operators are called as always, on tensors of the CPU. What they would have launched is compiled with the very
arguments of the launch, specialised as Triton would: pointers and sizes that are multiples of 16 are known as such.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mohawkify.ops import triton_decode, triton_matrix_distance, triton_scan
from mohawkify.ops.mixing_matrices import AttentionMatrix, MixingMatrix

POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
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


def launch_everything(dtype: torch.dtype, p_width: int, n_width: int, biased: bool) -> None:
    """Call every operator once, forward and backward; a teacher with biased scores has a mask with holes as well."""
    batch, length, heads = 2, 256, 4

    def zeros(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype)

    document_starts_bl = torch.zeros(batch, length, dtype=torch.bool)
    x, b, c = (zeros(batch, length, heads, width).requires_grad_() for width in (p_width, n_width, n_width))
    log_decay = zeros(batch, length, heads, dtype=torch.float32)
    state = zeros(batch, heads, p_width, n_width, dtype=torch.float32)
    y, last = triton_scan.scan_triton(x, b, c, log_decay, state, document_starts_bl)
    (y.sum() + last.sum()).backward()

    mixing = MixingMatrix(b, c, log_decay, zeros(heads, dtype=torch.float32))
    q, k = zeros(batch, heads, length, p_width), zeros(batch, heads // 2, length, p_width)
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    attention = AttentionMatrix(q, k, 0.125, mask)
    if biased:
        mask[2, 1] = False
        attention = attention._replace(bias_bhls=zeros(1, heads, length, length, dtype=torch.float32))
    triton_matrix_distance.orient_loss_triton(mixing, attention, document_starts_bl)

    num_features, num_lags = heads * (p_width + 2 * n_width), 3
    convs = (zeros(num_features, num_lags + 1, dtype=torch.float32), zeros(num_features, dtype=torch.float32))
    for keep_b in (None, *(torch.ones(batch, 3, dtype=dtype)[:, -1] for dtype in (torch.int64, torch.bool))):
        triton_decode.decode_step(
            *(zeros(batch, heads * width) for width in (p_width, n_width, n_width, p_width)),
            *(zeros(batch, heads, dtype=torch.float32), convs),
            *(zeros(heads * p_width, dtype=torch.float32), zeros(heads, dtype=torch.float32)),
            *(zeros(batch, num_lags, num_features), state, keep_b),
        )


def spilled_bytes(cubin: bytes) -> int:
    """What a kernel keeps on the stack for want of registers, by the tool that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True, timeout=60
        )
    return int(re.search(r"STACK:(\d+)", done.stdout).group(1))


def main(arguments: list[str]) -> None:
    """Print a line of JSON per kernel for arguments like ``90:bfloat16:64:64``: capability, dtype, widths p and n.

    The dtype ``float32/bfloat16`` means inputs in float32 under autocast to bfloat16. A fifth word, ``bias``, gives the
    teacher a bias and a mask with holes.
    """
    modules = (triton_scan, triton_matrix_distance, triton_decode)
    kernels = [item for module in modules for item in vars(module).values() if isinstance(item, triton.JITFunction)]
    for argument in arguments:
        capability, dtypes, p_width, n_width, *bias = argument.split(":")
        dtype, *products = (getattr(torch, name) for name in dtypes.split("/"))
        precision = torch.autocast("cpu", products[0]) if products else nullcontext()

        def found(name: str, compiled: Any, argument: str = argument) -> None:
            facts = {
                "case": argument,
                "kernel": name,
                "shared": compiled.metadata.shared,
                "spilled": spilled_bytes(compiled.asm["cubin"]),
                "tensor_cores": [word for word in ("wgmma", "mma.sync") if word in compiled.asm["ptx"]],
            }
            print(json.dumps(facts), flush=True)

        unique = list({id(kernel): kernel for kernel in kernels}.values())
        with compiling(unique, int(capability), found), precision:
            launch_everything(dtype, int(p_width), int(n_width), biased=bool(bias))


if __name__ == "__main__":
    main(sys.argv[1:])
